"""The folder adapter of `ObjectStore`, for one machine (locks by flock)."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PreconditionFailed
from sdxs.store.transfer import PartFile, read_chunks

T = TypeVar("T")


class FileStore:
    """A folder. The sha256 of each object stands beside it in a hidden file.

    Object and mark are two files, so a writer first marks both the old and the new digest as right, then replaces the object,
    then drops the old one: a reader, or a crash, in between finds an object that its mark admits.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def put_bytes(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        path = self._path(key)
        with self._lock():
            self._replace(path, [data])

    def put_file(self, key: str, path: Path) -> None:
        target = self._path(key)
        with self._lock():
            self._replace(target, read_chunks(path))

    def put_if(self, key: str, data: bytes, tag: str | None) -> None:
        path = self._path(key)
        with self._lock():
            present = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if present != tag:
                raise PreconditionFailed(f"object {key!r} has changed meanwhile")
            self._replace(path, [data])

    def get_bytes(self, key: str) -> bytes:
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)

        def read() -> tuple[bytes, str]:
            data = b"".join(self._chunks(key, path))
            digest = hashlib.sha256(data).hexdigest()
            self._check(key, path, digest)
            return data, digest

        return self._settled(read)

    def get_file(self, key: str, path: Path) -> None:
        source = self._path(key)

        def copy() -> None:
            part = PartFile(path)
            try:
                self._check(key, source, part.write(self._chunks(key, source)))
                part.commit()
            finally:
                part.discard()

        self._settled(copy)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        keys = (p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file() and not p.name.startswith("."))
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._lock():
            path.unlink(missing_ok=True)
            _mark(path).unlink(missing_ok=True)

    def presign_get(self, key: str, expires: timedelta) -> str:
        """A file:// URL; it does not expire."""
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root) or path == self.root or path.name.startswith("."):
            raise InvalidRequest("key", key, "a relative path inside the store, no hidden file")
        return path

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time, among all processes of this machine."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _replace(self, path: Path, chunks: Iterable[bytes]) -> None:
        part, mark = PartFile(path), _mark(path)
        try:
            digest = part.write(chunks)
            old = mark.read_text() if mark.is_file() else ""
            _write(mark, f"{digest} {old}")
            part.commit()
            _write(mark, digest)
        finally:
            part.discard()

    def _settled(self, read: Callable[[], T]) -> T:
        """What `read` gives. What seems corrupt may have been replaced between its two reads: again, while nobody writes."""
        try:
            return read()
        except CorruptArtifact:
            with self._lock():
                return read()

    @staticmethod
    def _chunks(key: str, path: Path) -> Iterator[bytes]:
        try:
            yield from read_chunks(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"object {key!r} is not in the store") from None

    @staticmethod
    def _check(key: str, path: Path, digest: str) -> None:
        mark = _mark(path)
        if mark.is_file() and digest not in mark.read_text().split():
            raise CorruptArtifact(f"object {key!r}: sha256 differs from what was written")


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _write(path: Path, text: str) -> None:
    part = PartFile(path)
    part.write([text.encode()])
    part.commit()
