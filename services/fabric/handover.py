"""Residuals from the process that computes them to the one that adds them, on one node: shared memory, without a wire.

The lender owns an anonymous file (memfd) and lends pieces of it; the borrower maps the file through /proc/<pid>/fd/<fd>, once, and
reads views of it. The file has no name and belongs to the processes that hold it: killed, they leave nothing behind. Its size never
changes, and pages that were never written take no memory.

Knows arrays and processes; does not know who calls whom (services.controlnet.sending and services.unet.receiving do).
"""

import contextlib
import fcntl
import logging
import math
import mmap
import os
import secrets
import select
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import unet_pb2

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes: a cache line
_HEADER = mmap.PAGESIZE  # holds the nonce
_NONCE_BYTES = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FLOAT = np.dtype("<f4")
_MAX_PARTS, _MAX_RANK = 64, 8


class Extents:
    """Which pieces of a range of bytes are taken. First fit: the same low addresses, warm already, again and again."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]  # (offset, size), by offset, never touching one another
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """Offset of a piece of so many bytes, None when there is none left."""
        size = max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                self._taken[offset] = size
                return offset
        return None

    def give(self, offset: int) -> None:
        """Give a taken piece back. Raises KeyError for one that is not taken."""
        insort(self._free, (offset, self._taken.pop(offset)))
        merged: list[tuple[int, int]] = []
        for start, size in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._free = merged


class Lender:
    """Memory of this process that others on the node may read.

    Args:
        size: most bytes lent at a time.

    Raises OSError where the system has no memfd.
    """

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("sdxs-residuals", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, _HEADER + size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        self._memory = mmap.mmap(self._fd, _HEADER + size)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._memory[:_NONCE_BYTES] = self._nonce
        self._extents = Extents(size)

    def lend(self, shapes: Sequence[Sequence[int]]) -> "Loan | None":
        """Room for float32 arrays of those shapes, None when there is none left. Give it back with `Loan.end`."""
        offset = self._extents.take(sum(map(_nbytes, shapes)))
        return None if offset is None else Loan(self, offset, shapes)

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


class Loan:
    """One piece of a lender's memory; see Lender.lend."""

    def __init__(self, lender: Lender, offset: int, shapes: Sequence[Sequence[int]]) -> None:
        self._lender, self._offset, self._shapes = lender, offset, shapes
        self.message = lender._message(offset, shapes)

    def write(self, residuals: Residuals) -> None:
        """Copy arrays of the loan's shapes into it."""
        views = self._lender._views(_HEADER + self._offset, self._shapes)
        for view, part in zip(views, residuals.parts, strict=True):
            np.copyto(view, part)

    def end(self) -> None:
        """Once, when nobody reads it any more."""
        self._lender._extents.give(self._offset)


@dataclass
class _Segment:
    """A lender's memory, mapped for reading, and the process it belongs to."""

    memory: mmap.mmap
    pidfd: int

    @property
    def alive(self) -> bool:
        """Whether the lender still runs: a pidfd becomes readable when its process ends."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)


class Borrower:
    """Reads what lenders on this node lend. Memory of lenders that have died is dropped at the next read."""

    def __init__(self) -> None:
        self._segments: dict[tuple[int, int, bytes], _Segment] = {}

    def read(self, message: unet_pb2.SharedResiduals) -> Residuals:
        """Views of the lender's memory, read-only, good until the call that brought the message is answered.

        Raises:
            InvalidRequest: field `shared`: the memory cannot be reached from here, or the message does not fit it.
        """
        self._drop_dead()
        key = (message.pid, message.fd, message.nonce)
        segment = self._segments.get(key)
        if segment is None:
            segment = self._segments[key] = _open(message)
        shapes = [tuple(shape.sizes) for shape in message.shapes]
        _check(message, shapes, len(segment.memory))
        return Residuals(tuple(_views(segment.memory, message.offset, shapes)))

    def close(self) -> None:
        """Drop all memory; views of it keep theirs."""
        for key in list(self._segments):
            self._drop(key)

    def _drop_dead(self) -> None:
        for key, segment in list(self._segments.items()):
            if not segment.alive:
                self._drop(key)

    def _drop(self, key: tuple[int, int, bytes]) -> None:
        """Forget it: unmapped with the last view of it."""
        os.close(self._segments.pop(key).pidfd)


def _open(message: unet_pb2.SharedResiduals) -> _Segment:
    """Map a lender's memory. Raises InvalidRequest(field="shared") when it is out of reach, or is not that lender's."""
    pidfd = fd = -1
    try:
        pidfd = os.pidfd_open(message.pid)
        # A stranger's file there may be a FIFO, which without O_NONBLOCK is waited for.
        fd = os.open(f"/proc/{message.pid}/fd/{message.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError("not sealed: it might shrink under its reader")
        memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        if len(message.nonce) != _NONCE_BYTES or memory[:_NONCE_BYTES] != message.nonce:
            memory.close()
            raise OSError("another process has these numbers here")
        return _Segment(memory, os.dup(pidfd))
    except (OSError, OverflowError, ValueError) as error:
        logger.warning("cannot read the memory of process %d: %s", message.pid, error)
        raise InvalidRequest("shared", f"process {message.pid}", f"memory that can be read from here ({error})") from error
    finally:
        for each in (pidfd, fd):
            if each >= 0:
                os.close(each)


def _check(message: unet_pb2.SharedResiduals, shapes: Sequence[Sequence[int]], size: int) -> None:
    """Raises InvalidRequest(field="shared") for arrays that do not lie in the segment."""
    if not 1 <= len(shapes) <= _MAX_PARTS or any(not 1 <= len(shape) <= _MAX_RANK for shape in shapes):
        raise InvalidRequest("shared", f"{len(shapes)} shapes", f"1 to {_MAX_PARTS} shapes of 1 to {_MAX_RANK} axes")
    end = message.offset + sum(map(_nbytes, shapes))
    if message.offset < _HEADER or message.offset % _FLOAT.itemsize or end > size:
        raise InvalidRequest("shared", f"bytes {message.offset} to {end}", f"bytes {_HEADER} to {size}")


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
