"""Arrays on the wire: `sdxs.v1.Tensor`, raw little-endian bytes in row-major order, without a copy on the way in.

Knows element types and shapes; does not know what an array means. Decoded arrays are read-only views of the message's bytes.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxs.errors import InvalidRequest
from sdxs.v1 import tensor_pb2

Array = NDArray[Any]

_DTYPES: dict[tensor_pb2.ElementType, np.dtype[Any]] = {
    tensor_pb2.ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.ELEMENT_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.ELEMENT_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.ELEMENT_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.ELEMENT_TYPE_INT64: np.dtype("<i8"),
}
_ELEMENT_TYPES = {dtype: element_type for element_type, dtype in _DTYPES.items()}
MAX_RANK = 8


def encode(array: Array) -> tensor_pb2.Tensor:
    """Any array of a known type and byte order as a message. Raises TypeError for a type the wire does not have."""
    dtype = array.dtype.newbyteorder("<")
    element_type = _ELEMENT_TYPES.get(dtype)
    if element_type is None:
        raise TypeError(f"the wire has no element type for {array.dtype}")
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return tensor_pb2.Tensor(element_type=element_type, shape=array.shape, data=data)


def decode(message: tensor_pb2.Tensor, field: str, shape: tuple[int | None, ...] | None = None) -> Array:
    """The message's array, a read-only view of its bytes.

    `shape` is what the caller expects, None for a free axis. Raises InvalidRequest that names `field` and the part at fault.
    """
    dtype = _DTYPES.get(message.element_type)
    if dtype is None:
        allowed = ", ".join(tensor_pb2.ElementType.Name(known) for known in _DTYPES)
        raise InvalidRequest(f"{field}.element_type", message.element_type, f"one of {allowed}")
    found = tuple(message.shape)
    if len(found) > MAX_RANK or (shape is not None and not _fits(found, shape)):
        raise InvalidRequest(f"{field}.shape", list(found), _describe(shape))
    size = math.prod(found) * dtype.itemsize
    if size != len(message.data):
        raise InvalidRequest(f"{field}.data", f"{len(message.data)} bytes", f"{size} bytes, as shape and element type say")
    return np.frombuffer(message.data, dtype=dtype).reshape(found)


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether the shape has the expected axes."""
    return len(found) == len(expected) and all(want in (None, have) for have, want in zip(found, expected, strict=True))


def _describe(shape: tuple[int | None, ...] | None) -> str:
    """An expected shape in words."""
    if shape is None:
        return f"at most {MAX_RANK} axes"
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
