"""What is common to memory that one process lends another on its node, wherever the memory is.

Loans, which piece of a memory is whose, other processes' memory held open as long as they live, and the refusals. Knows bytes and
processes; services.fabric.handover lends the host's memory, services.fabric.device_handover a device's.
"""

import fcntl
import logging
import math
import mmap
import os
import select
import threading
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals

logger = logging.getLogger(__name__)

NONCE_BYTES = 16
_ALIGNMENT = 64  # bytes: a cache line
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MAX_PARTS, _MAX_RANK = 64, 8

Memory = TypeVar("Memory")


class Loan(Protocol):
    """One piece of a lender's memory."""

    field: ClassVar[str]
    """Of the DenoiseRequest, that tells where it is; who cannot read it refuses that field."""

    def encoded(self) -> bytes:
        """A DenoiseRequest with that field alone."""
        ...

    def write(self, *residuals: Residuals) -> None:
        """Copy them into it, one after the other along the images' axis: together of the loan's shapes."""
        ...

    def end(self) -> None:
        """Once, when nobody reads it any more."""
        ...


class Lends(Protocol):
    """Memory that others on the node may read."""

    def lend(self, shapes: Sequence[Sequence[int]]) -> Loan | None:
        """Room for arrays of those shapes, None when there is none left. Give it back with `Loan.end`."""
        ...

    def close(self) -> None:
        """No more loans."""
        ...


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


class Opened(Generic[Memory]):
    """Lenders' memory, opened once each. That of lenders that have died is dropped at the next question. Threads may share it."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, bytes], tuple[int, Memory]] = {}
        self._lock = threading.Lock()

    def get(self, pid: int, name: bytes, open_it: Callable[[], Memory]) -> Memory:
        """The memory of that name of a process. Raises OSError, OverflowError, and what `open_it` raises."""
        with self._lock:
            self._drop(key for key, (pidfd, _) in list(self._found.items()) if not _runs(pidfd))
            found = self._found.get((pid, name))
            if found is None:
                found = self._found[pid, name] = self._open(pid, open_it)
            return found[1]

    def close(self) -> None:
        """Drop all memory; views of it keep theirs."""
        with self._lock:
            self._drop(list(self._found))

    @staticmethod
    def _open(pid: int, open_it: Callable[[], Memory]) -> tuple[int, Memory]:
        """The process first: one that takes a dead lender's number later has not its memory."""
        pidfd = os.pidfd_open(pid)
        try:
            return pidfd, open_it()
        except BaseException:
            os.close(pidfd)
            raise

    def _drop(self, keys: Iterable[tuple[int, bytes]]) -> None:
        """Forget them: unmapped with the last view."""
        for key in keys:
            os.close(self._found.pop(key)[0])


def _runs(pidfd: int) -> bool:
    """A pidfd becomes readable when its process ends."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def map_sealed(pid: int, number: int, access: int) -> mmap.mmap:
    """A file of another process that cannot change its size. Raises OSError, ValueError for one that can, or is empty."""
    # A stranger's file there may be a FIFO, which without O_NONBLOCK is waited for.
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError("not sealed: it might shrink under its reader")
        return mmap.mmap(fd, 0, access=access)
    finally:
        os.close(fd)


def sealed_memory(size: int, name: str) -> int:
    """A new anonymous file whose size does not change: its descriptor. Raises OSError where the system has none.

    Args:
        name: for who looks at a process's mappings.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def out_of_reach(field: str, pid: int, error: Exception) -> InvalidRequest:
    """The refusal by which a sender knows that it must find another way."""
    logger.warning("cannot read the memory of process %d: %s", pid, error)
    return InvalidRequest(field, f"process {pid}", f"memory that can be read from here ({error})")


def check_lies(field: str, offset: int, shapes: Sequence[Sequence[int]], itemsize: int, room: range) -> None:
    """Raises InvalidRequest for arrays, one after the other from `offset` on, that do not lie in that room of bytes."""
    if not 1 <= len(shapes) <= _MAX_PARTS or any(not 1 <= len(shape) <= _MAX_RANK for shape in shapes):
        raise InvalidRequest(field, f"{len(shapes)} shapes", f"1 to {_MAX_PARTS} shapes of 1 to {_MAX_RANK} axes")
    end = offset + itemsize * sum(map(math.prod, shapes))
    if offset < room.start or offset % itemsize or end > room.stop:
        raise InvalidRequest(field, f"bytes {offset} to {end}", f"bytes {room.start} to {room.stop}")
