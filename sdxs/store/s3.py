"""The S3 adapter of `ObjectStore`, through the minio SDK, for any endpoint that speaks S3."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from sdxs.errors import CorruptArtifact, NotFound, PermissionDenied, PreconditionFailed, SdxsError, Unavailable
from sdxs.settings import Settings
from sdxs.store.transfer import CHUNK_BYTES, PartFile, sha256_file

_SHA256 = "x-amz-meta-sha256"
_ABSENT = ("NoSuchKey", "NoSuchObject", "NoSuchBucket")
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_CHANGED = ("PreconditionFailed", "ConditionalRequestConflict")


def connect(settings: Settings) -> Minio:
    """A client of the settings' endpoint. No request is made yet."""
    return _client(settings, settings.s3_endpoint, settings.s3_secure)


def connect_public(settings: Settings) -> Minio:
    """The same S3 under its public address: a signature holds for the host it was made for."""
    if not settings.s3_public_url:
        return connect(settings)
    url = urlsplit(settings.s3_public_url)
    return _client(settings, url.netloc, url.scheme == "https")


def _client(settings: Settings, endpoint: str, secure: bool) -> Minio:
    retries = urllib3.Retry(total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504))
    pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=60), retries=retries, maxsize=8)
    return Minio(
        endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=secure,
        region=settings.s3_region,
        http_client=pool,
    )


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """The SDK's errors as ours."""
    try:
        yield
    except S3Error as error:
        raise _of(str(error.code), str(error.message), key) from error
    except (urllib3.exceptions.HTTPError, MinioException) as error:
        raise Unavailable(f"the object store does not answer ({type(error).__name__})") from error


def _of(code: str, message: str, key: str) -> SdxsError:
    if code in _ABSENT:
        return NotFound(f"object {key!r} is not in the store")
    if code in _REFUSED:
        return PermissionDenied(f"the object store refuses {key!r}: {code}")
    if code in _CHANGED:
        return PreconditionFailed(f"object {key!r} has changed meanwhile")
    return Unavailable(f"the object store failed on {key!r}: {code}: {message}")


class S3Store:
    """A bucket, optionally below a prefix; the bucket is made if it is missing. `public` only signs what others will read."""

    def __init__(self, client: Minio, bucket: str, prefix: str = "", public: Minio | None = None) -> None:
        self.client, self.bucket, self.prefix, self.public = client, bucket, prefix.strip("/"), public or client
        with _translated(bucket):
            if not client.bucket_exists(bucket):
                self._make_bucket()

    def put_bytes(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        marks: dict[str, Any] = {_SHA256: hashlib.sha256(data).hexdigest()}
        with _translated(key):
            self.client.put_object(
                self.bucket, self._key(key), io.BytesIO(data), len(data), content_type=content_type, metadata=marks
            )

    def put_file(self, key: str, path: Path) -> None:
        marks: dict[str, Any] = {_SHA256: sha256_file(path)}
        with _translated(key):
            self.client.fput_object(self.bucket, self._key(key), str(path), metadata=marks)

    def put_if(self, key: str, data: bytes, tag: str | None) -> None:
        """The SDK has no conditional writes, so this one is a presigned PUT, which the server checks by Content-MD5."""
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        headers = {"If-Match": tag} if tag else {"If-None-Match": "*"}
        headers |= {"Content-MD5": base64.b64encode(md5).decode()}
        with _translated(key):
            url = self.client.get_presigned_url("PUT", self.bucket, self._key(key), expires=timedelta(minutes=5))
            # Not sent again by itself: the second time it could not tell its own first write from someone else's.
            answer = urllib3.request("PUT", url, body=data, headers=headers, retries=False, timeout=30)
        if answer.status in (409, 412):
            raise PreconditionFailed(f"object {key!r} has changed meanwhile")
        if answer.status in (401, 403):
            raise PermissionDenied(f"the object store refuses {key!r}")
        if answer.status != 200:
            raise Unavailable(f"the object store failed on {key!r}: status {answer.status}")

    def get_bytes(self, key: str) -> bytes:
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        with self._opened(key) as response:
            data, headers = bytes(response.read()), response.headers
        _check(key, headers, hashlib.sha256(data).hexdigest())
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
            with _translated(key):
                self.client.stat_object(self.bucket, self._key(key))
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        with _translated(prefix):
            for found in self.client.list_objects(self.bucket, self._key(prefix), recursive=True):
                if found.object_name:
                    yield found.object_name[skip:]

    def delete(self, key: str) -> None:
        with _translated(key):
            self.client.remove_object(self.bucket, self._key(key))

    def presign_get(self, key: str, expires: timedelta) -> str:
        with _translated(key):
            return str(self.public.presigned_get_object(self.bucket, self._key(key), expires=expires))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _make_bucket(self) -> None:
        try:
            self.client.make_bucket(self.bucket)
        except S3Error as error:  # another process was faster
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    @contextmanager
    def _opened(self, key: str) -> Iterator[Any]:
        with _translated(key):
            response = self.client.get_object(self.bucket, self._key(key))
            try:
                yield response
            finally:
                response.close()
                response.release_conn()


def _check(key: str, headers: Any, digest: str) -> None:
    """Raises CorruptArtifact. What `put_if` or another tool wrote has no mark of ours and passes."""
    if headers.get(_SHA256, digest) != digest:
        raise CorruptArtifact(f"object {key!r}: its sha256 is not the one it was written with")
