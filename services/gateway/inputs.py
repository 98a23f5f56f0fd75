"""Images that steer, in the store: requests that name some get their bytes, jobs that bring bytes leave them there.

What is read is checked by the name it was asked by (services.gateway.names).
"""

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sdxs.control.images import MAX_BYTES
from sdxs.errors import CorruptArtifact, DeadlineExceeded, InvalidRequest, NotFound
from sdxs.store import ObjectStore, Stat, Upload, open_store, open_url
from sdxs.v1 import gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.keys import INPUTS, SCHEME
from services.gateway.cache import ByteCache
from services.gateway.names import DIGEST, S3, Image, by_name, copied, images_of, place_of
from services.settings import ServingSettings

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
_KNOWN_S = 60.0  # a file that was there a minute ago is not looked for again


class Inputs:
    """Of one gateway: reads files that requests name, keeps those of jobs.

    Args:
        store: of artifacts; opened when it is first needed.
        bucket: opens one of those that the settings allow.
    """

    def __init__(
        self,
        store: Callable[[], ObjectStore],
        settings: ServingSettings,
        bucket: Callable[[str], ObjectStore] | None = None,
    ) -> None:
        self._store = functools.cache(store)
        self._bucket = functools.cache(bucket or (lambda name: open_url(f"{S3}{name}", settings)))
        self._url = settings.place("artifacts")
        self._allowed = tuple(each.strip() for each in settings.input_buckets.split(",") if each.strip())
        self._most = settings.max_image_bytes
        self._inline = settings.input_inline_bytes
        self._ttl_s = settings.inputs_ttl_s
        self._upload_s = settings.url_ttl_s
        self._cache = ByteCache(settings.input_cache_bytes)
        self._known: dict[str, float] = {}

    async def filled(self, request: gateway_pb2.GenerateRequest, deadline: Deadline) -> gateway_pb2.GenerateRequest:
        """The request with the bytes of all its images.

        Raises InvalidRequest and NotFound that name the field, DeadlineExceeded, and what the store does.
        """
        if not any(image.uri for image in images_of(request)):
            return request
        filled = copied(request)
        room = self._most - sum(len(image.data) for image in images_of(filled))
        for image in images_of(filled):
            if image.uri:
                data = await self._fetched(image, room, deadline)
                room -= len(data)
                image.fill(data)
        return filled

    async def kept(self, request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateRequest:
        """A filled request as it waits in the queue: its larger images in the store, where they stay as long as it needs them."""
        large = {hashlib.sha256(image.data).hexdigest(): image.data for image in images_of(request)}
        for digest, data in large.items():
            if len(data) > self._inline:
                await asyncio.to_thread(self._keep, digest, data)
        return by_name(request, above=self._inline)

    async def create_upload(self, request: gateway_pb2.CreateUploadRequest) -> gateway_pb2.CreateUploadResponse:
        """Where to send a file, unless it is there. Raises InvalidRequest, PreconditionFailed."""
        most = min(MAX_BYTES, self._most)
        if not DIGEST.fullmatch(request.sha256):
            raise InvalidRequest("sha256", request.sha256, "64 hexadecimal digits in lower case")
        if not 1 <= request.size <= most:
            raise InvalidRequest("size", request.size, f"1 to {most} bytes")
        if request.media_type not in MEDIA_TYPES:
            raise InvalidRequest("media_type", request.media_type, f"one of {', '.join(MEDIA_TYPES)}")
        answer = gateway_pb2.CreateUploadResponse(uri=SCHEME + request.sha256)
        if await asyncio.to_thread(self._has, request.sha256, request.size):
            answer.already_there = True
            return answer
        expires = timedelta(seconds=self._upload_s)
        upload = Upload(request.sha256, request.size, request.media_type)
        answer.url_expires.FromDatetime(datetime.now(UTC) + expires)
        signed = await asyncio.to_thread(lambda: self._store().presign_put(INPUTS + request.sha256, upload, expires))
        answer.method, answer.url = signed.method, signed.url
        answer.headers.update(signed.headers)
        return answer

    async def _fetched(self, image: Image, room: int, deadline: Deadline) -> bytes:
        """The bytes that an image's name stands for, of which there is room for so many."""
        field, uri = f"{image.field}_uri", image.uri
        place = place_of(uri, field, self._url, self._allowed)
        data = self._cache.get(place.digest) if place.digest else None
        if data is None:
            try:
                async with asyncio.timeout(deadline.remaining()):
                    if place.digest:
                        data = await asyncio.to_thread(self._ours, place.digest, field, room)
                        self._cache.put(place.digest, data)
                    else:
                        data = await asyncio.to_thread(self._theirs, place.bucket, place.key, field, room)
            except TimeoutError:
                raise DeadlineExceeded(f"{uri} was not read in time") from None
            except NotFound as error:
                missing = NotFound(f"{uri} is not there: never uploaded, or expired")
                missing.field = field
                raise missing from error
        if len(data) > room:
            raise self._too_large(field, len(data), room)
        return data

    def _ours(self, digest: str, field: str, room: int) -> bytes:
        """A file that was uploaded, or came with a job. One that is not what its name says is removed, so that it can be sent again."""
        store, key = self._store(), INPUTS + digest
        stat = store.stat(key)
        self._stay(store, key, stat)
        try:
            data = self._sized(store, key, stat, field, room)
        except CorruptArtifact:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            store.delete(key)
            raise InvalidRequest(field, SCHEME + digest, "a file of that digest; what was uploaded is another: send it again")
        return data

    def _theirs(self, bucket: str, key: str, field: str, room: int) -> bytes:
        """A file in a bucket that the settings allow; nothing is changed there."""
        store = self._bucket(bucket)
        return self._sized(store, key, store.stat(key), field, room)

    def _sized(self, store: ObjectStore, key: str, stat: Stat, field: str, room: int) -> bytes:
        """An object that is not too large, whatever was said of its size."""
        if stat.size > room:
            raise self._too_large(field, stat.size, room)
        try:
            return store.get_bytes(key, at_most=room)
        except InvalidRequest:
            raise self._too_large(field, room + 1, room) from None

    def _too_large(self, field: str, size: int, room: int) -> InvalidRequest:
        return InvalidRequest(
            field, f"{size} bytes", f"at most {room} bytes, for all images of a request together {self._most}"
        )

    def _has(self, digest: str, size: int) -> bool:
        """Whether the file is there, to stay."""
        try:
            stat = self._store().stat(INPUTS + digest)
            if stat.size == size:
                self._stay(self._store(), INPUTS + digest, stat)
        except NotFound:
            return False
        return stat.size == size

    def _keep(self, digest: str, data: bytes) -> None:
        """See to it that the file is there."""
        now = time.monotonic()
        known_s = min(_KNOWN_S, self._ttl_s / 4) if self._ttl_s else _KNOWN_S
        if now - self._known.get(digest, -known_s) < known_s:
            return
        if not self._has(digest, len(data)):
            self._store().put_bytes(INPUTS + digest, data)
        self._known = {each: at for each, at in self._known.items() if now - at < known_s}
        self._known[digest] = now

    def _stay(self, store: ObjectStore, key: str, stat: Stat) -> None:
        """One that is used again is young again, long before it is swept away. Raises NotFound."""
        if self._ttl_s and (datetime.now(UTC) - stat.modified).total_seconds() > self._ttl_s / 2:
            store.touch(key)


def open_inputs(settings: ServingSettings) -> Inputs:
    """Those of the settings' store of artifacts."""
    return Inputs(lambda: open_store(settings, "artifacts"), settings)
