"""The folder adapter of `ObjectStore`, for one machine (locks by flock)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PreconditionFailed
from sdxs.store.objects import BINARY, Entry, SignedRequest, Stat, Upload
from sdxs.store.transfer import PartFile, read_chunks

T = TypeVar("T")


class FileStore:
    """A folder. The sha256 of each object stands beside it in a hidden file, and so does its metadata, where it has some.

    Object and mark are two files, so a writer first marks both the old and the new digest as right, then replaces the object,
    then drops the old one: a reader, or a crash, in between finds an object that its mark admits.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def put_bytes(self, key: str, data: bytes, content_type: str = BINARY, metadata: Mapping[str, str] | None = None) -> None:
        path = self._path(key)
        with self._lock():
            self._replace(path, [data], content_type, metadata or {})

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

    def get_bytes(self, key: str, at_most: int | None = None) -> bytes:
        if at_most is not None and (size := self.stat(key).size) > at_most:
            raise InvalidRequest("key", f"{key}: {size} bytes", f"at most {at_most} bytes")
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

    def stat(self, key: str) -> Stat:
        path = self._path(key)
        about = json.loads(_about(path).read_text(encoding="utf8")) if _about(path).is_file() else {}
        try:
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(key) from None
        return Stat(facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC), **about)

    def touch(self, key: str) -> None:
        try:
            os.utime(self._path(key))
        except FileNotFoundError:
            raise _missing(key) from None

    def list(self, prefix: str) -> Iterator[str]:
        keys = (p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file() and not p.name.startswith("."))
        yield from sorted(key for key in keys if key.startswith(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        for key in self.list(prefix):
            with suppress(NotFound):  # deleted meanwhile
                stat = self.stat(key)
                yield Entry(key, stat.size, stat.modified)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._lock():
            for file in (path, _mark(path), _about(path)):
                file.unlink(missing_ok=True)

    def presign_get(self, key: str, expires: timedelta) -> str:
        """A file:// URL; it does not expire."""
        return self._path(key).as_uri()

    def presign_put(self, key: str, upload: Upload, expires: timedelta) -> SignedRequest:
        """None: a folder has no server to send to."""
        raise PreconditionFailed("this server's store is a folder and takes no uploads: send the image in the request")

    def expire_after(self, days: Mapping[str, int]) -> None:
        """Nobody to do it."""

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

    def _replace(
        self, path: Path, chunks: Iterable[bytes], content_type: str = BINARY, metadata: Mapping[str, str] | None = None
    ) -> None:
        part, mark = PartFile(path), _mark(path)
        try:
            digest = part.write(chunks)
            old = mark.read_text() if mark.is_file() else ""
            _write(mark, f"{digest} {old}")
            part.commit()
            _write(mark, digest)
            if metadata or content_type != BINARY:
                _write(_about(path), json.dumps({"content_type": content_type, "metadata": dict(metadata or {})}))
            else:
                _about(path).unlink(missing_ok=True)
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
            raise _missing(key) from None

    @staticmethod
    def _check(key: str, path: Path, digest: str) -> None:
        mark = _mark(path)
        if mark.is_file() and digest not in mark.read_text().split():
            raise CorruptArtifact(f"object {key!r}: sha256 differs from what was written")


def _missing(key: str) -> NotFound:
    return NotFound(f"object {key!r} is not in the store")


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _about(path: Path) -> Path:
    return path.with_name(f".{path.name}.about")


def _write(path: Path, text: str) -> None:
    part = PartFile(path)
    part.write([text.encode()])
    part.commit()
