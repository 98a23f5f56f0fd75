"""Messages as bytes: put one inside another without decoding it, and say which field of a broken one is at fault.

Source: the protobuf encoding guide (protobuf.dev/programming-guides/encoding): a message is a concatenation of
(tag, value) pairs, a sub-message is a length-delimited value, and concatenated messages merge.
"""

from collections.abc import Iterator

from google.protobuf.message import DecodeError, Message

_LENGTH_DELIMITED = 2
_FIXED_SIZES = {1: 8, 5: 4}


def embed(field: int, payload: bytes) -> bytes:
    """The encoding of a message whose sub-message `field` is `payload`. Append another encoded message to set more fields."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(payload)) + payload


def broken_field(message: type[Message], payload: bytes) -> str:
    """Name of the first field that does not parse, `request` when the bytes are not even a list of fields."""
    fields = message.DESCRIPTOR.fields_by_number
    try:
        for number, field_bytes in _fields(payload):
            if not _parses(message, field_bytes) and number in fields:
                return str(fields[number].name)
    except (IndexError, ValueError):
        pass  # no tag to go by
    return "request"


def _parses(message: type[Message], payload: bytes) -> bool:
    """Whether the bytes are such a message."""
    try:
        message.FromString(payload)
    except DecodeError:
        return False
    return True


def _fields(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and encoding (tag included) of each top-level field; the last may be cut short. Raises on an unreadable tag."""
    position = 0
    while position < len(payload):
        start = position
        tag, position = _read_varint(payload, position)
        position = _end_of_value(payload, position, tag & 7)
        yield tag >> 3, payload[start:position]


def _end_of_value(payload: bytes, position: int, wire_type: int) -> int:
    """Where the value that starts at `position` ends."""
    if wire_type == 0:
        return _read_varint(payload, position)[1]
    if wire_type in _FIXED_SIZES:
        return position + _FIXED_SIZES[wire_type]
    if wire_type == _LENGTH_DELIMITED:
        size, position = _read_varint(payload, position)
        return position + size
    raise ValueError(f"wire type {wire_type}")


def _varint(value: int) -> bytes:
    """Base-128, least significant group first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _read_varint(payload: bytes, position: int) -> tuple[int, int]:
    """Value and the position after it. Raises IndexError at the end of the bytes, ValueError past ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        group = payload[position]
        position += 1
        value |= (group & 0x7F) << shift
        if group < 0x80:
            return value, position
    raise ValueError("varint of more than ten bytes")
