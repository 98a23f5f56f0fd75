"""Object storage: one small interface, an S3 adapter (any endpoint) and a folder adapter.

Every object is stored with its sha256. Every write is checked by it, on the server and by its answer, and every read again; objects
that other tools wrote have none. This module knows bytes and keys; what they mean is the callers' matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from sdxs.errors import InvalidRequest
from sdxs.settings import Kind, Settings
from sdxs.store.files import FileStore
from sdxs.store.objects import BINARY, Entry, SignedRequest, Stat, Upload

__all__ = ["Entry", "FileStore", "ObjectStore", "SignedRequest", "Stat", "Upload", "open_store", "open_url"]


class ObjectStore(Protocol):
    """Keys are `/`-separated relative paths.

    Every method raises Unavailable when the store cannot be reached and PermissionDenied when it refuses the credentials. Writes raise
    CorruptArtifact when what arrives is not what was sent, however often; nothing is left of it then.
    """

    def put_bytes(self, key: str, data: bytes, content_type: str = BINARY, metadata: Mapping[str, str] | None = None) -> None:
        """Write an object; readers see the old or the new one, never half.

        Args:
            metadata: names in lower case, values in ASCII, 2 KB in all: see sdxs.store.metadata.
        """
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

    def get_bytes(self, key: str, at_most: int | None = None) -> bytes:
        """Read an object. Raises NotFound, or CorruptArtifact when it is not what was written.

        Args:
            at_most: raises InvalidRequest(field="key") for more bytes than these, without reading them.
        """
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

    def stat(self, key: str) -> Stat:
        """Size, time and metadata. Raises NotFound."""
        ...

    def touch(self, key: str) -> None:
        """Make it as young as if it had been written now. Raises NotFound."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, sorted."""
        ...

    def entries(self, prefix: str) -> Iterator[Entry]:
        """The same with sizes and times."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        ...

    def presign_get(self, key: str, expires: timedelta) -> str:
        """A URL that reads the object without credentials until it expires."""
        ...

    def presign_put(self, key: str, upload: Upload, expires: timedelta) -> SignedRequest:
        """A request that writes these bytes, and no others, without credentials. Raises PreconditionFailed where there are no such URLs."""
        ...

    def expire_after(self, days: Mapping[str, int]) -> None:
        """Have the server itself delete what is older, by prefix: 0 days: never. A store without such rules does nothing."""
        ...


def open_store(settings: Settings, kind: Kind) -> ObjectStore:
    """The store of one life cycle, where `settings.place` says; nothing is asked of it yet. Raises InvalidRequest."""
    own = f"{kind}_url"
    return open_url(settings.place(kind), settings, own if getattr(settings, own) else "store_url")


def open_url(url: str, settings: Settings, field: str = "store_url") -> ObjectStore:
    """The store at `file:///folder` or `s3://bucket[/prefix]`; where that S3 is, the settings say."""
    parts = urlparse(url)
    if parts.scheme == "file":
        return FileStore(Path(parts.path))
    if parts.scheme != "s3" or not parts.netloc:
        raise InvalidRequest(field, url, "file:///folder or s3://bucket[/prefix]")
    from sdxs.store.s3 import connected

    return connected(settings, parts.netloc, parts.path)
