"""Bytes to a file that appears whole or not at all, hashed on the way."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartFile:
    """A file beside its destination; `commit` moves it there in one step, `discard` removes it."""

    def __init__(self, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        self.destination = destination
        self._descriptor, name = tempfile.mkstemp(dir=destination.parent, prefix=".part-")
        self.path = Path(name)

    def write(self, chunks: Iterable[bytes]) -> str:
        """Write everything to the disk; returns its sha256 in hex."""
        digest = hashlib.sha256()
        with os.fdopen(self._descriptor, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def commit(self) -> None:
        """The destination is this file from now on, readable as other new files are."""
        self.path.chmod(0o666 & ~_umask())
        self.path.replace(self.destination)

    def discard(self) -> None:
        """Forget it, if it was not committed."""
        self.path.unlink(missing_ok=True)


def read_chunks(path: Path) -> Iterable[bytes]:
    """A file piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
