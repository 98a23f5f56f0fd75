"""Residuals from the process that computes them to the one that adds them, on one node: shared memory, without a wire.

The lender owns an anonymous file (memfd) and lends pieces of it; the borrower maps the file through /proc/<pid>/fd/<fd>, once, and
reads views of it. The file has no name and belongs to the processes that hold it: killed, they leave nothing behind. Its size never
changes, and pages that were never written take no memory.

Knows arrays and processes; does not know who calls whom (services.controlnet.sending and services.unet.receiving do).
"""

import contextlib
import math
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sdxs.residuals import Residuals
from sdxs.v1 import unet_pb2
from services.fabric.lending import NONCE_BYTES, Extents, Opened, check_lies, map_sealed, out_of_reach, sealed_memory

_HEADER = mmap.PAGESIZE  # holds the nonce
_FLOAT = np.dtype("<f4")


class Lender:
    """Memory of this process that others on the node may read.

    Args:
        size: most bytes lent at a time.

    Raises OSError where the system has no memfd.
    """

    def __init__(self, size: int) -> None:
        self._fd = sealed_memory(_HEADER + size, "sdxs-residuals")
        self._memory = mmap.mmap(self._fd, _HEADER + size)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._memory[:NONCE_BYTES] = self._nonce
        self._extents = Extents(size)

    def lend(self, shapes: Sequence[Sequence[int]]) -> "SharedLoan | None":
        """See Lends: of float32 arrays."""
        offset = self._extents.take(sum(map(_nbytes, shapes)))
        return None if offset is None else SharedLoan(self, offset, shapes)

    def close(self) -> None:
        """No more loans. Borrowers keep what they have mapped until they drop it."""
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # a loan that is being written ends it later
            self._memory.close()

    def _views(self, offset: int, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return _views(self._memory, offset, shapes)

    def _message(self, offset: int, shapes: Sequence[Sequence[int]]) -> unet_pb2.SharedResiduals:
        sizes = [unet_pb2.Shape(sizes=shape) for shape in shapes]
        return unet_pb2.SharedResiduals(pid=os.getpid(), fd=self._fd, nonce=self._nonce, offset=_HEADER + offset, shapes=sizes)


class SharedLoan:
    """See Loan."""

    field: ClassVar[str] = "shared"

    def __init__(self, lender: Lender, offset: int, shapes: Sequence[Sequence[int]]) -> None:
        self._lender, self._offset, self._shapes = lender, offset, shapes
        self.message = lender._message(offset, shapes)

    def encoded(self) -> bytes:
        """See Loan."""
        return unet_pb2.DenoiseRequest(shared=self.message).SerializeToString()

    def write(self, *residuals: Residuals) -> None:
        """See Loan."""
        views = self._lender._views(_HEADER + self._offset, self._shapes)
        for view, parts in zip(views, zip(*(each.parts for each in residuals), strict=True), strict=True):
            np.concatenate(parts, out=view)

    def end(self) -> None:
        """See Loan."""
        self._lender._extents.give(self._offset)


class Borrower:
    """Reads what lenders on this node lend."""

    def __init__(self) -> None:
        self._opened: Opened[mmap.mmap] = Opened()

    def read(self, message: unet_pb2.SharedResiduals) -> Residuals:
        """Views of the lender's memory, read-only, good until the call that brought the message is answered.

        Raises:
            InvalidRequest: field `shared`: the memory cannot be reached from here, or the message does not fit it.
        """
        name = message.fd.to_bytes(4) + message.nonce  # another's fd with the same nonce is another memory
        try:
            memory = self._opened.get(message.pid, name, lambda: _open(message))
        except (OSError, OverflowError, ValueError) as error:
            raise out_of_reach("shared", message.pid, error) from error
        shapes = [tuple(shape.sizes) for shape in message.shapes]
        check_lies("shared", message.offset, shapes, _FLOAT.itemsize, range(_HEADER, len(memory)))
        return Residuals(tuple(_views(memory, message.offset, shapes)))

    def close(self) -> None:
        """Drop all memory; views of it keep theirs."""
        self._opened.close()


def _open(message: unet_pb2.SharedResiduals) -> mmap.mmap:
    """Map a lender's memory. Raises OSError when it is out of reach, or is not that lender's."""
    memory = map_sealed(message.pid, message.fd, mmap.ACCESS_READ)
    if len(message.nonce) != NONCE_BYTES or memory[:NONCE_BYTES] != message.nonce:
        memory.close()
        raise OSError("another process has these numbers here")
    return memory


def _views(memory: mmap.mmap, offset: int, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """float32 arrays that lie one after the other in the memory."""
    views = []
    for shape in shapes:
        views.append(np.frombuffer(memory, _FLOAT, math.prod(shape), offset).reshape(shape))
        offset += _nbytes(shape)
    return views


def _nbytes(shape: Sequence[int]) -> int:
    """Of a float32 array."""
    return math.prod(shape) * _FLOAT.itemsize
