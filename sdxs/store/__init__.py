"""Object storage: one small interface, an S3 adapter (any endpoint) and a folder adapter.

Every object is stored with its sha256, and every read checks it; objects that other tools wrote have none. This module
knows bytes and keys; what they mean is the callers' matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from sdxs.store.files import FileStore

__all__ = ["FileStore", "ObjectStore", "open_store", "open_url"]


class ObjectStore(Protocol):
    """Keys are `/`-separated relative paths.

    Every method raises Unavailable when the store cannot be reached and PermissionDenied when it refuses the credentials.
    """

    def put_bytes(self, key: str, data: bytes, content_type: str = ...) -> None:
        """Write an object; readers see the old or the new one, never half."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write an object from a file."""
        ...

    def put_if(self, key: str, data: bytes, tag: str | None) -> None:
        """Write a small object if it is still the one that `get_tagged` gave `tag` for; with None, if there is none.

        Raises:
            PreconditionFailed: someone else was faster.
        """
        ...

    def get_bytes(self, key: str) -> bytes:
        """Read an object. Raises NotFound, or CorruptArtifact when it is not what was written."""
        ...

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Read an object and the tag of this version of it, for `put_if`. Raises as get_bytes does."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Read an object into a file, which appears whole or not at all. Raises as get_bytes does."""
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


def open_store(settings: Settings) -> ObjectStore:
    """The store that `settings.store_url` names. Raises InvalidRequest when it is neither file:// nor s3://."""
    return open_url(settings.store_url, settings)


def open_url(url: str, settings: Settings) -> ObjectStore:
    """The store at `file:///folder` or `s3://bucket[/prefix]`; where that S3 is, the settings say."""
    parts = urlparse(url)
    if parts.scheme == "file":
        return FileStore(Path(parts.path))
    if parts.scheme != "s3" or not parts.netloc:
        raise InvalidRequest("store_url", url, "file:///folder or s3://bucket[/prefix]")
    from sdxs.store.s3 import S3Store, connect, connect_public

    return S3Store(connect(settings), parts.netloc, parts.path, connect_public(settings))
