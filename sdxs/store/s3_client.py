"""A client of an S3 endpoint, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from sdxs.errors import CorruptArtifact, NotFound, PermissionDenied, PreconditionFailed, SdxsError, Unavailable
from sdxs.settings import Settings

NO_BUCKET = "NoSuchBucket"
_ABSENT = ("NoSuchKey", "NoSuchObject", NO_BUCKET)
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_CHANGED = ("PreconditionFailed", "ConditionalRequestConflict")
_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")


class NoBucket(NotFound):
    """The bucket is not there: reading, that is as if it were empty."""


def connect(settings: Settings) -> Minio:
    """A client of the settings' endpoint. No request is made yet."""
    retries = urllib3.Retry(total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504))
    pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=60), retries=retries, maxsize=8)
    return Minio(
        settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        region=settings.s3_region,
        http_client=pool,
    )


def addresses(settings: Settings, public: bool) -> Minio:
    """Makes URLs, without a signature. A signature holds for the host it was made for: that of others is the public one."""
    if public and settings.s3_public_url:
        url = urlsplit(settings.s3_public_url)
        return Minio(url.netloc, secure=url.scheme == "https", region=settings.s3_region)
    return Minio(settings.s3_endpoint, secure=settings.s3_secure, region=settings.s3_region)


@contextmanager
def translated(key: str) -> Iterator[None]:
    """The SDK's errors as ours."""
    try:
        yield
    except S3Error as error:
        raise error_of(str(error.code), str(error.message), key) from error
    except (urllib3.exceptions.HTTPError, MinioException) as error:
        raise Unavailable(f"the object store does not answer ({type(error).__name__})") from error


def error_of(code: str, message: str, key: str) -> SdxsError:
    """Ours for an S3 error code."""
    if code in _ABSENT:
        kind = NoBucket if code == NO_BUCKET else NotFound
        return kind(f"object {key!r} is not in the store")
    if code in _REFUSED:
        return PermissionDenied(f"the object store refuses {key!r}: {code}")
    if code in _CHANGED:
        return PreconditionFailed(f"object {key!r} has changed meanwhile")
    if code in _DAMAGED:
        return CorruptArtifact(f"object {key!r} was damaged on its way to the store: {code}")
    return Unavailable(f"the object store failed on {key!r}: {code}: {message}")
