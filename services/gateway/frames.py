"""What a stream's messages mean: settings put together, frames checked, errors named, resume tokens. Pure functions, but for the clock."""

import base64
import binascii
import hashlib
import hmac
import math
import re
import struct
import time
from dataclasses import dataclass, field, replace

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from sdxs.errors import InvalidRequest, SdxsError
from sdxs.v1 import gateway_pb2, stream_pb2
from services.fabric.deadline import Deadline
from services.gateway.checks import Order
from services.gateway.table import ModelTable

_MAX_TEXT = 1000  # of an error's message, as in a gRPC status
_MAC_BYTES = hashlib.sha256().digest_size
_HEADER = struct.Struct(">dQ")  # seconds since 1970, last answered frame
_UNSAID = stream_pb2.StreamFrame(prompt="unsaid")


@dataclass(eq=False)
class Frame:
    """A frame that has been checked, with the settings of its arrival."""

    id: int
    order: Order
    request: gateway_pb2.GenerateRequest
    """What the order was made of."""
    deadline: Deadline
    own: frozenset[str] = frozenset()
    """Fields that it sets itself; all else is the settings'."""
    arrived: float = field(default_factory=time.monotonic)


class Reader:
    """Turns messages into orders, for one model: each for the bundle that is served then.

    Args:
        model: as the client named it.
        terms: class and tenant of the session's frames.
    """

    def __init__(self, model: str, models: ModelTable, default_deadline_s: float, terms: Deadline) -> None:
        self.model = model
        self.models = models
        self._terms = terms
        self._default_deadline_s = default_deadline_s

    def check(self, settings: stream_pb2.StreamSettings) -> None:
        """Raises InvalidRequest, NotFound or Unavailable when frames with these settings cannot be drawn, fields named as in
        GenerateRequest."""
        frame = stream_pb2.StreamFrame() if settings.HasField("prompt") else _UNSAID
        self.models.order(self._request(settings, frame))

    async def settled(self, settings: stream_pb2.StreamSettings) -> stream_pb2.StreamSettings:
        """The settings with digests in place of the names of their LoRAs; they stay what they are now. Raises as `LoraNames.settle`."""
        if not settings.loras.loras:
            return settings
        found = stream_pb2.StreamSettings()
        found.CopyFrom(settings)
        found.ClearField("loras")
        found.loras.loras.extend(await self.models.loras.settle(settings.loras.loras, Deadline.after(self._default_deadline_s)))
        return found

    def read(self, message: stream_pb2.StreamFrame, settings: stream_pb2.StreamSettings) -> Frame:
        """The frame; what is in its images is not read. Raises InvalidRequest, NotFound or Unavailable."""
        own = frozenset(name.name for name, _ in message.ListFields())
        request = self._request(settings, message)
        try:
            order = self.models.order(request)
        except InvalidRequest as error:
            raise named(error, own) from None
        return Frame(message.id, order, request, self._deadline(message), own)

    def _request(self, settings: stream_pb2.StreamSettings, frame: stream_pb2.StreamFrame) -> gateway_pb2.GenerateRequest:
        """The frame as a request of its own."""
        init_image = frame.init_image or settings.init_image
        return gateway_pb2.GenerateRequest(
            model=self.model,
            prompt=frame.prompt if frame.HasField("prompt") else settings.prompt,
            seed=frame.seed if frame.HasField("seed") else settings.seed,
            format=settings.format,
            deterministic=settings.deterministic,
            controls=frame.controls or settings.controls.controls,
            init_image=init_image,
            strength=_strength(settings, frame, init_image),
            loras=settings.loras.loras,
            width=settings.width,
            height=settings.height,
        )

    def _deadline(self, message: stream_pb2.StreamFrame) -> Deadline:
        """The frame's own, at most the server's."""
        default = replace(self._terms, at=math.inf).within(self._default_deadline_s)  # that of the call is the session's
        return default.within(_seconds(message.timeout)) if message.HasField("timeout") else default


def _strength(settings: stream_pb2.StreamSettings, frame: stream_pb2.StreamFrame, init_image: bytes) -> float | None:
    """The frame's; that of the settings only has a meaning beside an init image."""
    if frame.HasField("strength"):
        return frame.strength
    return settings.strength if init_image and settings.HasField("strength") else None


def _seconds(duration: Duration) -> float:
    """As a number."""
    return duration.seconds + duration.nanos / 1e9


def named(error: InvalidRequest, own: frozenset[str]) -> InvalidRequest:
    """The same error about `frame.…` or `settings.…`, by who set the field; a prompt that nobody gave is missing in the frame."""
    name = re.split(r"\W", error.field)[0]
    nowhere = name == "prompt" and error.value == ""
    return _renamed(error, "frame." if name in own or nowhere else "settings.")


def prefixed(error: SdxsError, prefix: str) -> SdxsError:
    """The same error, its field after `prefix`."""
    if isinstance(error, InvalidRequest):
        return _renamed(error, prefix)
    if error.field:
        error.field = prefix + error.field
    return error


def _renamed(error: InvalidRequest, prefix: str) -> InvalidRequest:
    """Its words stay when they are another server's, which has seen the value."""
    found = InvalidRequest(prefix + error.field, error.value, error.allowed)
    if error.value is None:
        found.args = error.args
    return found


def error_message(error: SdxsError) -> stream_pb2.StreamError:
    """What a client is told."""
    return stream_pb2.StreamError(code=error.code, message=str(error)[:_MAX_TEXT], field=error.field)


class Tokens:
    """Signs and reads resume tokens: base64url of HMAC-SHA256, time, last answered frame, StreamOpen without images."""

    def __init__(self, secret: bytes, max_age_s: float) -> None:
        self._secret = secret
        self._max_age_s = max_age_s

    def make(self, model: str, settings: stream_pb2.StreamSettings, last_answered: int) -> str:
        """A token that any process with the secret can read."""
        kept = stream_pb2.StreamSettings()
        kept.CopyFrom(settings)
        kept.ClearField("controls")
        kept.ClearField("init_image")
        body = _HEADER.pack(time.time(), last_answered)
        body += stream_pb2.StreamOpen(model=model, settings=kept).SerializeToString()
        return base64.urlsafe_b64encode(self._sign(body) + body).decode()

    def read(self, token: str) -> tuple[stream_pb2.StreamOpen, int]:
        """What `make` was given. Raises InvalidRequest(field="resume_token")."""
        try:
            signed = base64.urlsafe_b64decode(token.encode())
        except (binascii.Error, ValueError):
            signed = b""
        body = signed[_MAC_BYTES:]
        if len(body) < _HEADER.size or not hmac.compare_digest(signed[:_MAC_BYTES], self._sign(body)):
            raise InvalidRequest("resume_token", token, "a token of this installation")
        made, last_answered = _HEADER.unpack_from(body)
        if time.time() - made > self._max_age_s:
            raise InvalidRequest("resume_token", token, f"a token of the last {self._max_age_s:g} s")
        try:
            return stream_pb2.StreamOpen.FromString(body[_HEADER.size :]), last_answered
        except DecodeError:
            raise InvalidRequest("resume_token", token, "a token of this version") from None

    def _sign(self, body: bytes) -> bytes:
        return hmac.new(self._secret, body, hashlib.sha256).digest()
