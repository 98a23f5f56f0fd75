"""Object storage: one small interface, an S3 adapter (any endpoint, through the minio SDK) and a folder adapter."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlparse

from minio import Minio
from minio.error import S3Error

from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound
from sdxs.settings import Settings

_SHA256 = "x-amz-meta-sha256"


class ObjectStore(Protocol):
    """Keys are `/`-separated relative paths."""

    def put_bytes(self, key: str, data: bytes, content_type: str = ..., metadata: dict[str, str] | None = ...) -> None:
        """Write an object; readers see the old or the new one, never half."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write an object from a file."""
        ...

    def get_bytes(self, key: str) -> bytes:
        """Read an object. Raises NotFound, or CorruptArtifact when it is not what was written."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Read an object into a file, which appears whole or not at all."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        ...

    def presign_get(self, key: str, expires: timedelta) -> str:
        """A URL that reads the object without credentials until it expires."""
        ...


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class S3Store:
    """A bucket, optionally below a prefix. Every object carries its sha256 and every read checks it."""

    def __init__(self, client: Minio, bucket: str, prefix: str = "") -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix.strip("/")
        if not client.bucket_exists(bucket):
            try:
                client.make_bucket(bucket)
            except S3Error as error:  # another process was faster
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def put_bytes(
        self, key: str, data: bytes, content_type: str = "application/octet-stream", metadata: dict[str, str] | None = None
    ) -> None:
        marks = {_SHA256: hashlib.sha256(data).hexdigest()}
        marks |= {f"x-amz-meta-{name}": quote(value) for name, value in (metadata or {}).items()}
        self.client.put_object(
            self.bucket, self._key(key), io.BytesIO(data), len(data), content_type=content_type, metadata=dict(marks)
        )

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.client.fput_object(self.bucket, self._key(key), str(path), metadata={_SHA256: digest})

    def get_bytes(self, key: str) -> bytes:
        try:
            response = self.client.get_object(self.bucket, self._key(key))
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket"):
                raise NotFound(f"object {key!r} is not in the store") from error
            raise
        try:
            data, expected = bytes(response.read()), response.headers.get(_SHA256)
        finally:
            response.close()
            response.release_conn()
        if expected and hashlib.sha256(data).hexdigest() != expected:
            raise CorruptArtifact(f"object {key!r}: sha256 differs from what was written ({expected[:12]}...)")
        return data

    def get_file(self, key: str, path: Path) -> None:
        _write_atomically(path, self.get_bytes(key))

    def exists(self, key: str) -> bool:
        try:
            self.client.stat_object(self.bucket, self._key(key))
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject", "NoSuchBucket"):
                return False
            raise
        return True

    def list(self, prefix: str) -> Iterator[str]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        for found in self.client.list_objects(self.bucket, self._key(prefix), recursive=True):
            if found.object_name:
                yield found.object_name[skip:]

    def delete(self, key: str) -> None:
        self.client.remove_object(self.bucket, self._key(key))

    def presign_get(self, key: str, expires: timedelta) -> str:
        return str(self.client.presigned_get_object(self.bucket, self._key(key), expires=expires))


class FileStore:
    """A folder. The sha256 of each object stands beside it in a hidden file."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def _path(self, key: str) -> Path:
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root) or path == self.root:
            raise InvalidRequest("key", key, "a relative path inside the store")
        return path

    @staticmethod
    def _mark(path: Path) -> Path:
        return path.with_name(f".{path.name}.sha256")

    def put_bytes(
        self, key: str, data: bytes, content_type: str = "application/octet-stream", metadata: dict[str, str] | None = None
    ) -> None:
        path = self._path(key)
        _write_atomically(self._mark(path), hashlib.sha256(data).digest())
        _write_atomically(path, data)

    def put_file(self, key: str, path: Path) -> None:
        self.put_bytes(key, path.read_bytes())

    def get_bytes(self, key: str) -> bytes:
        path = self._path(key)
        if not path.is_file():
            raise NotFound(f"object {key!r} is not in the store")
        data, mark = path.read_bytes(), self._mark(path)
        if mark.exists() and mark.read_bytes() != hashlib.sha256(data).digest():
            raise CorruptArtifact(f"object {key!r}: sha256 differs from what was written")
        return data

    def get_file(self, key: str, path: Path) -> None:
        _write_atomically(path, self.get_bytes(key))

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        keys = (p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file() and not p.name.startswith("."))
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        self._mark(path).unlink(missing_ok=True)

    def presign_get(self, key: str, expires: timedelta) -> str:
        return self._path(key).as_uri()


def open_store(settings: Settings) -> S3Store | FileStore:
    """The store that `settings.store_url` names.

    Raises:
        InvalidRequest: the URL is neither file:// nor s3://.
    """
    url = urlparse(settings.store_url)
    if url.scheme == "file":
        return FileStore(Path(url.path))
    if url.scheme != "s3" or not url.netloc:
        raise InvalidRequest("store_url", settings.store_url, "file:///folder or s3://bucket[/prefix]")
    client = Minio(
        settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        region=settings.s3_region,
    )
    return S3Store(client, url.netloc, url.path)
