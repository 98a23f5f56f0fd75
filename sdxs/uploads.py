"""Send an image to the store once, then name it in requests."""

from __future__ import annotations

import hashlib

import urllib3

from sdxs.errors import CorruptArtifact, InvalidRequest, PermissionDenied, SdxsError, Unavailable
from sdxs.v1 import gateway_pb2

_KINDS = ((b"\x89PNG\r\n\x1a\n", 0, "image/png"), (b"\xff\xd8\xff", 0, "image/jpeg"), (b"WEBP", 8, "image/webp"))
"""First bytes, where they are, and what they say."""


def ask(image: bytes) -> gateway_pb2.CreateUploadRequest:
    """The message. Raises InvalidRequest for bytes that do not begin as a PNG, JPEG or WebP file."""
    for start, place, media_type in _KINDS:
        if image[place : place + len(start)] == start:
            digest = hashlib.sha256(image).hexdigest()
            return gateway_pb2.CreateUploadRequest(sha256=digest, size=len(image), media_type=media_type)
    raise InvalidRequest("image", f"{len(image)} bytes that begin with {image[:8]!r}", "a PNG, JPEG or WebP file")


def send(image: bytes, answer: gateway_pb2.CreateUploadResponse, timeout: float) -> str:
    """The image's URI, after it has been sent if the server did not have it.

    Raises Unavailable, PermissionDenied when the URL has expired, CorruptArtifact when something else arrived.
    """
    if answer.already_there:
        return answer.uri
    try:
        told = urllib3.request(answer.method, answer.url, body=image, headers=dict(answer.headers), timeout=timeout, retries=2)
    except urllib3.exceptions.HTTPError as error:
        raise Unavailable(f"the object store does not answer ({type(error).__name__})") from error
    if told.status != 200:
        raise _refused(told.status)
    return answer.uri


def _refused(status: int) -> SdxsError:
    if status == 400:
        return CorruptArtifact("the image was damaged on its way to the object store")
    if status in (401, 403):
        return PermissionDenied("the object store refuses the upload: its URL has expired, or is another's")
    return Unavailable(f"the object store did not take the image: status {status}")
