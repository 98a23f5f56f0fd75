"""Facts as the metadata of an object: short texts in ASCII, 2 KB in all (S3's limit, with the names)."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, unquote

MAX_BYTES = 2048 - 100
"""Less the mark that every object has."""
_PREFIX_BYTES = len("x-amz-meta-")
_SAFE = "-_.~!*'()/:;=,+@"  # no space: headers lose those at the ends


def encode(facts: Mapping[str, str], long: str) -> dict[str, str]:
    """Percent-encoded; empty ones are left out.

    Args:
        long: the one that is cut short where all together are too large; `<long>-characters` then says how many there were.
    """
    said = {name: quote(value, safe=_SAFE) for name, value in facts.items() if value}
    if _bytes(said) <= MAX_BYTES:
        return said
    text = facts[long]
    said[f"{long}-characters"] = str(len(text))
    room = MAX_BYTES - _bytes({**said, long: ""})
    low, high = 0, len(text)
    while low < high:  # the most characters that fit: their encoded lengths differ
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(quote(text[:middle], safe=_SAFE)) <= room else (low, middle - 1)
    return {**said, long: quote(text[:low], safe=_SAFE)}


def decode(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts again."""
    return {name: unquote(value) for name, value in metadata.items()}


def _bytes(said: Mapping[str, str]) -> int:
    return sum(_PREFIX_BYTES + len(name) + len(value) for name, value in said.items())
