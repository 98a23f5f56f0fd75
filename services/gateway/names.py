"""Images that steer, by name: where a name leads, and the places in a request that can hold one. Pure functions and views of messages.

A file's name is its digest, `sdxs-input:<sha256>`. Nothing but the configured S3 can be named: no name leads anywhere else.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdxs.errors import InvalidRequest
from sdxs.v1 import gateway_pb2
from services.fabric.keys import INPUTS, SCHEME

DIGEST = re.compile(r"[0-9a-f]{64}")
S3 = "s3://"


@dataclass(frozen=True)
class Place:
    """Where a file is: a digest of ours, or a key in a bucket of others."""

    digest: str = ""
    bucket: str = ""
    key: str = ""


def place_of(uri: str, field: str, artifacts_url: str, allowed: tuple[str, ...]) -> Place:
    """Where a URI leads. Raises InvalidRequest for anywhere else than our inputs and what lies under `allowed`.

    Args:
        artifacts_url: of the store of artifacts.
        allowed: `bucket` or `bucket/prefix`.
    """
    for ours in (SCHEME, f"{artifacts_url.rstrip('/')}/{INPUTS}"):
        if uri.startswith(ours) and DIGEST.fullmatch(digest := uri.removeprefix(ours)):
            return Place(digest=digest)
    path = uri.removeprefix(S3)
    bucket, _, key = path.partition("/")
    steps = key.split("/")
    if uri.startswith(S3) and key and path.isprintable() and "" not in steps and not {".", ".."} & set(steps):
        for each in allowed:
            if path.startswith(f"{each.strip('/')}/"):
                return Place(bucket=bucket, key=key)
    others = f", or a file below {', '.join(S3 + each for each in allowed)}" if allowed else ""
    raise InvalidRequest(field, uri, f"{SCHEME}<sha256 in hexadecimal> as CreateUpload says{others}")


class Image:
    """One of a request's images, to be read and replaced where it stands."""

    def __init__(self, message: Any, name: str, field: str) -> None:
        self._message, self._name, self.field = message, name, field

    @property
    def data(self) -> bytes:
        return bytes(getattr(self._message, self._name))

    @property
    def uri(self) -> str:
        return str(getattr(self._message, f"{self._name}_uri"))

    def fill(self, data: bytes) -> None:
        """Bytes in place of a name."""
        self._message.ClearField(f"{self._name}_uri")
        setattr(self._message, self._name, data)

    def name(self, uri: str) -> None:
        """A name in place of bytes."""
        self._message.ClearField(self._name)
        setattr(self._message, f"{self._name}_uri", uri)


def images_of(request: gateway_pb2.GenerateRequest) -> Iterator[Image]:
    """Those that are there, by bytes or by name. Raises InvalidRequest where one is both."""
    found = [Image(each, "image", f"controls[{i}].image") for i, each in enumerate(request.controls)]
    for image in [*found, Image(request, "init_image", "init_image")]:
        if image.uri and image.data:
            raise InvalidRequest(f"{image.field}_uri", image.uri, f"none beside {image.field}")
        if image.uri or image.data:
            yield image


def by_name(request: gateway_pb2.GenerateRequest, above: int) -> gateway_pb2.GenerateRequest:
    """The request with the names of its images in place of those of more than `above` bytes."""
    named = copied(request)
    for image in images_of(named):
        if len(image.data) > above:
            image.name(SCHEME + hashlib.sha256(image.data).hexdigest())
    return named


def copied(request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateRequest:
    """Another one."""
    copy = gateway_pb2.GenerateRequest()
    copy.CopyFrom(request)
    return copy
