"""What is said on a stream, and what it means: options to messages, messages to events, and where a conversation goes on after a break.

Does no input or output; `sdxs.streaming` does.
"""

import collections
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from sdxs import rpc
from sdxs.client import Image, add_loras, choice, fill, image_of
from sdxs.control import Control
from sdxs.errors import InvalidRequest, PreconditionFailed, SdxsError
from sdxs.lora import Lora
from sdxs.v1 import control_pb2, decoder_pb2, stream_pb2


class Look(TypedDict, total=False):
    """What frames have in common; see StreamSettings in stream.proto."""

    prompt: str
    seed: int
    format: str
    """jpeg (default), png, webp or raw."""
    deterministic: bool
    controls: Sequence[Control]
    """An empty list takes them away."""
    init_image: bytes
    """Empty bytes take it away."""
    strength: float
    width: int
    """Pixels; 0: the model's own."""
    height: int
    loras: Sequence[Lora]
    """An empty list takes them away."""


class FrameOptions(TypedDict, total=False):
    """What one frame has of its own; see StreamFrame in stream.proto."""

    prompt: str
    seed: int
    controls: Sequence[Control]
    init_image: bytes
    strength: float
    timeout: float
    """Seconds; a frame whose time runs out is dropped."""


@dataclass(frozen=True)
class Drawn:
    """A frame's image. Seconds are the server's, from the frame's arrival."""

    frame_id: int
    image: Image
    seed: int
    unet_batch: int
    queued_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Dropped:
    """A frame that was not drawn: overtaken, deadline, closed, or similar to the frame `standing_frame_id`, whose image still stands."""

    frame_id: int
    reason: str
    standing_frame_id: int = 0


@dataclass(frozen=True)
class Failed:
    """A frame that cannot be drawn; 0: settings that were refused, and changed nothing."""

    frame_id: int
    error: SdxsError


@dataclass(frozen=True)
class Phase:
    """Where the session stands: queued (1 is next), active, draining or closed (client, drained or idle)."""

    name: str
    position: int = 0
    reason: str = ""


Event = Drawn | Dropped | Failed | Phase


def merged(settings: stream_pb2.StreamSettings, changes: stream_pb2.StreamSettings) -> stream_pb2.StreamSettings:
    """What is set in `changes` in place of what is in `settings`."""
    found = stream_pb2.StreamSettings()
    found.CopyFrom(settings)
    if changes.HasField("controls"):
        found.ClearField("controls")  # protobuf would append to the list
    if changes.HasField("loras"):
        found.ClearField("loras")
    found.MergeFrom(changes)
    return found


def settings_of(look: Look) -> stream_pb2.StreamSettings:
    """The message. Raises InvalidRequest for a value the wire cannot carry."""
    message, fields = stream_pb2.StreamSettings(), dict(look)
    if "controls" in fields:
        message.controls.SetInParent()
        _add_controls(message.controls, fields.pop("controls"))
    if "loras" in fields:
        message.loras.SetInParent()
        add_loras(message.loras, fields.pop("loras"))
    if "format" in look:
        fields["format"] = choice("format", look["format"], decoder_pb2.ImageFormat, "IMAGE_FORMAT_")
    fill(message, fields)
    return message


def frame_of(frame_id: int, options: FrameOptions) -> stream_pb2.StreamFrame:
    """The message. Raises InvalidRequest for a value the wire cannot carry."""
    message, fields = stream_pb2.StreamFrame(id=frame_id), dict(options)
    _add_controls(message, fields.pop("controls", ()))
    if "timeout" in options:
        message.timeout.FromNanoseconds(round(1e9 * options["timeout"]))
        del fields["timeout"]
    fill(message, fields)
    return message


def _add_controls(message: Any, controls: Any) -> None:
    for i, control in enumerate(controls or ()):
        if not isinstance(control, Control):
            raise InvalidRequest(f"controls[{i}]", control, "an sdxs.control.Control")
        added: control_pb2.Control = message.controls.add()
        fill(added, asdict(control), f"controls[{i}].")


class Conversation:
    """What is said on a stream and what it means, over any number of connections. Does no input or output; not thread-safe."""

    def __init__(self, model: str, settings: stream_pb2.StreamSettings) -> None:
        self.closed = False
        """Said goodbye, or heard it."""
        self._model = model
        self._settings = settings
        """Those the server has taken; what it refuses is never said again."""
        self._unconfirmed: collections.deque[stream_pb2.StreamSettings] = collections.deque()
        self._taken = 0
        self._token = ""
        self._last_id = 0
        self._newest = stream_pb2.StreamFrame()
        self._unanswered: dict[int, None] = {}
        self._outgoing: collections.deque[stream_pb2.StreamRequest] = collections.deque()
        self._phase = Phase("")
        self.events: collections.deque[Event] = collections.deque()
        """To be taken by the consumer."""

    def opening(self) -> stream_pb2.StreamRequest:
        """The first message of a connection."""
        opened = stream_pb2.StreamOpen(model=self._model, settings=self._settings, resume_token=self._token)
        return stream_pb2.StreamRequest(open=opened)

    def configure(self, changes: stream_pb2.StreamSettings) -> None:
        """Change what the frames from now on have in common."""
        self._check_open()
        self._unconfirmed.append(changes)
        self._outgoing.append(stream_pb2.StreamRequest(settings=changes))

    def send(self, options: FrameOptions) -> int:
        """The id of the new frame. One that has not left yet is overtaken here."""
        self._check_open()
        frame = frame_of(self._last_id + 1, options)
        self._last_id = frame.id
        for waiting in [each for each in self._outgoing if each.HasField("frame")]:
            self._outgoing.remove(waiting)
            self._answered(Dropped(waiting.frame.id, "overtaken"))
        self._newest = frame
        self._unanswered[frame.id] = None
        self._outgoing.append(stream_pb2.StreamRequest(frame=frame))
        return frame.id

    def finish(self) -> None:
        """No more frames."""
        if not self.closed:
            self.closed = True
            self._outgoing.append(stream_pb2.StreamRequest(close=stream_pb2.StreamClose()))

    def next(self) -> stream_pb2.StreamRequest | None:
        """What is to be sent next, if anything is."""
        return self._outgoing.popleft() if self._outgoing else None

    def hear(self, response: stream_pb2.StreamResponse) -> bool:
        """Understand one message; False when the server will not say more, and the session is over."""
        kind = response.WhichOneof("kind")
        if kind == "state":
            return self._hear_state(response.state)
        if kind == "image":
            self._answered(_drawn(response.image))
        elif kind == "error":
            error = response.error.error
            if not response.error.frame_id:
                self._confirm(self._taken + 1, refused=True)
            self._answered(Failed(response.error.frame_id, rpc.from_words(error.code, error.message, error.field)))
        elif kind == "dropped":
            dropped = response.dropped
            lost = dropped.reason == stream_pb2.DROP_REASON_CLOSED and dropped.frame_id == self._newest.id
            if not lost:  # that one will be sent again
                reason = stream_pb2.DropReason.Name(dropped.reason).removeprefix("DROP_REASON_").lower()
                self._answered(Dropped(dropped.frame_id, reason, dropped.standing_frame_id))
        return True

    def lose(self) -> None:
        """The connection is gone: the newest frame will go out again on the next, those before it are lost, as they would be stale."""
        self._outgoing.clear()
        self._taken = 0
        self._outgoing.extend(stream_pb2.StreamRequest(settings=changes) for changes in self._unconfirmed)
        for frame_id in list(self._unanswered):
            if frame_id == self._newest.id:
                self._outgoing.append(stream_pb2.StreamRequest(frame=self._newest))
            else:
                self._answered(Dropped(frame_id, "closed"))
        if self.closed:
            self._outgoing.append(stream_pb2.StreamRequest(close=stream_pb2.StreamClose()))

    def forget_token(self) -> None:
        """The next server does not know it; the settings are known here too."""
        self._token = ""

    @property
    def resumes(self) -> bool:
        """Whether the next opening asks for the session before."""
        return bool(self._token)

    def _confirm(self, taken: int, refused: bool = False) -> None:
        """So many settings messages of this connection have been taken."""
        while self._taken < taken and self._unconfirmed:
            changes = self._unconfirmed.popleft()
            self._taken += 1
            if not refused:
                self._settings = merged(self._settings, changes)

    def _hear_state(self, state: stream_pb2.SessionState) -> bool:
        self._token = state.resume_token
        self._confirm(state.settings_taken)
        reason = stream_pb2.ClosedReason.Name(state.reason).removeprefix("CLOSED_REASON_").lower() if state.reason else ""
        phase = Phase(stream_pb2.SessionPhase.Name(state.phase).removeprefix("SESSION_PHASE_").lower(), state.position, reason)
        if state.reason == stream_pb2.CLOSED_REASON_DRAINED:
            return True  # nothing will come, and another server takes over
        if phase != self._phase:
            self._phase = phase
            self.events.append(phase)
        self.closed = self.closed or phase.name == "closed"
        return phase.name != "closed"

    def _answered(self, event: Drawn | Dropped | Failed) -> None:
        self._unanswered.pop(event.frame_id, None)
        self.events.append(event)

    def _check_open(self) -> None:
        if self.closed:
            raise PreconditionFailed("the stream is closed")


def _drawn(image: stream_pb2.FrameImage) -> Drawn:
    """Without protobuf."""
    return Drawn(image.frame_id, image_of(image.image), image.seed, image.unet_batch, image.queued_seconds, image.total_seconds)
