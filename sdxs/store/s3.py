"""The S3 adapter of `ObjectStore`, through the minio SDK, for any endpoint that speaks S3."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from xml.etree import ElementTree as ET

import urllib3
from minio import Minio
from minio.commonconfig import REPLACE, CopySource
from minio.error import S3Error

from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, SdxsError, Unavailable
from sdxs.settings import Settings
from sdxs.store.checksums import Checksums, base64_of
from sdxs.store.objects import BINARY, Entry, SignedRequest, Stat, Upload
from sdxs.store.s3_client import NoBucket, addresses, connect, error_of, translated
from sdxs.store.s3_lifecycle import set_rules
from sdxs.store.signing import Signer
from sdxs.store.transfer import CHUNK_BYTES, PartFile

_META = "x-amz-meta-"
_SHA256 = f"{_META}sha256"
_WRITES = 3
"""Of an object that arrives damaged, until it is given up."""
_MINUTES = timedelta(minutes=5)
T = TypeVar("T")


def connected(settings: Settings, bucket: str, prefix: str) -> S3Store:
    """A bucket of the settings' endpoint. No request is made yet."""
    signer = Signer(settings.s3_access_key, settings.s3_secret_key, settings.s3_region)
    return S3Store(connect(settings), bucket, prefix, signer, addresses(settings, False), addresses(settings, True))


class S3Store:
    """A bucket, optionally below a prefix. The first write makes it if it is missing; who only reads needs no right to.

    Args:
        inside, outside: make URLs as this process, and as others, see the endpoint.
    """

    def __init__(self, client: Minio, bucket: str, prefix: str, signer: Signer, inside: Minio, outside: Minio) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix.strip("/")
        self._signer, self._inside, self._outside = signer, inside, outside

    def put_bytes(self, key: str, data: bytes, content_type: str = BINARY, metadata: Mapping[str, str] | None = None) -> None:
        self._put(key, Checksums.of([data], len(data)), lambda: io.BytesIO(data), content_type, metadata)

    def put_file(self, key: str, path: Path) -> None:
        self._put(key, Checksums.of_file(path), lambda: path.open("rb"))

    def put_if(self, key: str, data: bytes, tag: str | None) -> None:
        """The SDK has no conditional writes, so this one is a presigned PUT."""
        sums = Checksums.of([data], len(data))
        headers = {**sums.headers(), _SHA256: sums.sha256, **({"If-Match": tag} if tag else {"If-None-Match": "*"})}

        def put() -> tuple[str, Mapping[str, str]]:
            url = self._signer.sign("PUT", self._plain_url(self._inside, "PUT", key), _MINUTES, headers)
            # Not sent again by itself: the second time it could not tell its own first write from someone else's.
            answer = urllib3.request("PUT", url, body=data, headers=headers, retries=False, timeout=30)
            if answer.status != 200:
                raise _refusal(answer, key)
            return answer.headers.get("etag", "").strip('"'), answer.headers

        self._checked(key, sums, lambda: self._in_bucket(put, key))

    def get_bytes(self, key: str, at_most: int | None = None) -> bytes:
        return self._read(key, at_most)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        data, headers = self._read(key)
        return data, str(headers.get("etag", ""))

    def get_file(self, key: str, path: Path) -> None:
        part = PartFile(path)
        try:
            with self._opened(key) as response:
                digest, headers = part.write(response.stream(CHUNK_BYTES)), response.headers
            _check(key, headers, digest)
            part.commit()
        finally:
            part.discard()

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def stat(self, key: str) -> Stat:
        with translated(key):
            found = self.client.stat_object(self.bucket, self._key(key))
        named = {name.lower(): value for name, value in (found.metadata or {}).items()}
        metadata = {name.removeprefix(_META): value for name, value in named.items() if name.startswith(_META)}
        assert found.last_modified is not None
        return Stat(found.size or 0, found.last_modified, found.content_type or BINARY, metadata)

    def touch(self, key: str) -> None:
        """A copy onto itself: no byte moves."""
        stat = self.stat(key)
        metadata: dict[str, Any] = {_META + name: value for name, value in stat.metadata.items()}
        metadata["Content-Type"] = stat.content_type
        with translated(key):
            source = CopySource(self.bucket, self._key(key))
            self.client.copy_object(self.bucket, self._key(key), source, metadata=metadata, metadata_directive=REPLACE)

    def list(self, prefix: str) -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        try:
            with translated(prefix):
                for found in self.client.list_objects(self.bucket, self._key(prefix), recursive=True):
                    if found.object_name and found.last_modified:
                        yield Entry(found.object_name[skip:], found.size or 0, found.last_modified)
        except NoBucket:
            return

    def delete(self, key: str) -> None:
        try:
            with translated(key):
                self.client.remove_object(self.bucket, self._key(key))
        except NotFound:
            return

    def presign_get(self, key: str, expires: timedelta) -> str:
        return self._signer.sign("GET", self._plain_url(self._outside, "GET", key), expires)

    def presign_put(self, key: str, upload: Upload, expires: timedelta) -> SignedRequest:
        headers = {
            "content-length": str(upload.size),
            "content-type": upload.content_type,
            "x-amz-checksum-sha256": base64_of(upload.sha256),
            _SHA256: upload.sha256,
        }
        with translated(self.bucket):
            if not self.client.bucket_exists(self.bucket):
                self.make_bucket()
        url = self._signer.sign("PUT", self._plain_url(self._outside, "PUT", key), expires, headers)
        return SignedRequest("PUT", url, headers)

    def expire_after(self, days: Mapping[str, int]) -> None:
        rules = {self._key(prefix): after for prefix, after in days.items()}
        self._in_bucket(lambda: set_rules(self.client, self.bucket, rules), "")

    def make_bucket(self) -> None:
        """Nothing happens if another process was faster."""
        try:
            self.client.make_bucket(self.bucket)
        except S3Error as error:
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    def _put(
        self,
        key: str,
        sums: Checksums,
        opened: Callable[[], BinaryIO],
        content_type: str = BINARY,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        headers: dict[str, Any] = {_META + name: value for name, value in (metadata or {}).items()}
        headers |= {_SHA256: sums.sha256, **sums.headers()}

        def put() -> tuple[str, Mapping[str, str]]:
            with opened() as stream:
                found = self.client.put_object(
                    self.bucket, self._key(key), stream, sums.size, content_type, dict(headers), part_size=sums.part_bytes
                )
            return found.etag or "", found.http_headers or {}

        self._checked(key, sums, lambda: self._in_bucket(put, key))

    def _in_bucket(self, call: Callable[[], T], key: str) -> T:
        """What `call` gives, once more after the bucket has been made if it is missing."""
        try:
            with translated(key):
                return call()
        except NoBucket:
            with translated(self.bucket):
                self.make_bucket()
                return call()

    def _checked(self, key: str, sums: Checksums, put: Callable[[], tuple[str, Mapping[str, str]]]) -> None:
        """Write until the server has the bytes. Raises CorruptArtifact when it never gets them; then none are left there."""
        reason = ""
        for _ in range(_WRITES):
            try:
                etag, headers = put()
            except CorruptArtifact as error:
                reason = str(error)
                continue
            if sums.admits(etag, headers):
                return
            reason = f"object {key!r}: the store says that it has other bytes (ETag {etag})"
            self.delete(key)
        raise CorruptArtifact(f"{reason}; {_WRITES} times")

    def _read(self, key: str, at_most: int | None = None) -> tuple[bytes, Mapping[str, str]]:
        with self._opened(key) as response:
            data, headers = bytes(response.read(None if at_most is None else at_most + 1)), response.headers
        if at_most is not None and len(data) > at_most:
            raise InvalidRequest("key", f"{key}: {headers.get('content-length', 'more')} bytes", f"at most {at_most} bytes")
        _check(key, headers, hashlib.sha256(data).hexdigest())
        return data, headers

    @contextmanager
    def _opened(self, key: str) -> Iterator[Any]:
        with translated(key):
            response = self.client.get_object(self.bucket, self._key(key))
            try:
                yield response
            finally:
                response.close()
                response.release_conn()

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _plain_url(self, addresses: Minio, method: str, key: str) -> str:
        return str(addresses.get_presigned_url(method, self.bucket, self._key(key)))


def _refusal(answer: Any, key: str) -> SdxsError:
    """The error that a server's answer is."""
    try:
        code = ET.fromstring(answer.data).findtext("Code") or ""  # noqa: S314  (of the store, which is trusted)
    except ET.ParseError:
        code = ""
    codes = {401: "AccessDenied", 403: "AccessDenied", 409: "PreconditionFailed", 412: "PreconditionFailed"}
    known = error_of(code, f"status {answer.status}", key)
    return known if type(known) is not Unavailable else error_of(codes.get(answer.status, code), f"status {answer.status}", key)


def _check(key: str, headers: Any, digest: str) -> None:
    """Raises CorruptArtifact. What another tool wrote has no mark of ours and passes."""
    if headers.get(_SHA256, digest) != digest:
        raise CorruptArtifact(f"object {key!r}: its sha256 is not the one it was written with")
