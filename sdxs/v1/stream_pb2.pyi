import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from sdxs.v1 import control_pb2 as _control_pb2
from sdxs.v1 import decoder_pb2 as _decoder_pb2
from sdxs.v1 import lora_pb2 as _lora_pb2
from sdxs.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_PHASE_UNSPECIFIED: _ClassVar[SessionPhase]
    SESSION_PHASE_QUEUED: _ClassVar[SessionPhase]
    SESSION_PHASE_ACTIVE: _ClassVar[SessionPhase]
    SESSION_PHASE_DRAINING: _ClassVar[SessionPhase]
    SESSION_PHASE_CLOSED: _ClassVar[SessionPhase]

class ClosedReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLOSED_REASON_UNSPECIFIED: _ClassVar[ClosedReason]
    CLOSED_REASON_CLIENT: _ClassVar[ClosedReason]
    CLOSED_REASON_DRAINED: _ClassVar[ClosedReason]
    CLOSED_REASON_IDLE: _ClassVar[ClosedReason]
    CLOSED_REASON_ERROR: _ClassVar[ClosedReason]

class DropReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DROP_REASON_UNSPECIFIED: _ClassVar[DropReason]
    DROP_REASON_OVERTAKEN: _ClassVar[DropReason]
    DROP_REASON_DEADLINE: _ClassVar[DropReason]
    DROP_REASON_SIMILAR: _ClassVar[DropReason]
    DROP_REASON_CLOSED: _ClassVar[DropReason]
SESSION_PHASE_UNSPECIFIED: SessionPhase
SESSION_PHASE_QUEUED: SessionPhase
SESSION_PHASE_ACTIVE: SessionPhase
SESSION_PHASE_DRAINING: SessionPhase
SESSION_PHASE_CLOSED: SessionPhase
CLOSED_REASON_UNSPECIFIED: ClosedReason
CLOSED_REASON_CLIENT: ClosedReason
CLOSED_REASON_DRAINED: ClosedReason
CLOSED_REASON_IDLE: ClosedReason
CLOSED_REASON_ERROR: ClosedReason
DROP_REASON_UNSPECIFIED: DropReason
DROP_REASON_OVERTAKEN: DropReason
DROP_REASON_DEADLINE: DropReason
DROP_REASON_SIMILAR: DropReason
DROP_REASON_CLOSED: DropReason

class StreamRequest(_message.Message):
    __slots__ = ("open", "settings", "frame", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: StreamOpen
    settings: StreamSettings
    frame: StreamFrame
    close: StreamClose
    def __init__(self, open: _Optional[_Union[StreamOpen, _Mapping]] = ..., settings: _Optional[_Union[StreamSettings, _Mapping]] = ..., frame: _Optional[_Union[StreamFrame, _Mapping]] = ..., close: _Optional[_Union[StreamClose, _Mapping]] = ...) -> None: ...

class StreamOpen(_message.Message):
    __slots__ = ("model", "settings", "resume_token")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    model: str
    settings: StreamSettings
    resume_token: str
    def __init__(self, model: _Optional[str] = ..., settings: _Optional[_Union[StreamSettings, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...

class StreamSettings(_message.Message):
    __slots__ = ("prompt", "seed", "format", "deterministic", "controls", "init_image", "strength", "loras", "width", "height")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    seed: int
    format: _decoder_pb2.ImageFormat
    deterministic: bool
    controls: StreamControls
    init_image: bytes
    strength: float
    loras: StreamLoras
    width: int
    height: int
    def __init__(self, prompt: _Optional[str] = ..., seed: _Optional[int] = ..., format: _Optional[_Union[_decoder_pb2.ImageFormat, str]] = ..., deterministic: _Optional[bool] = ..., controls: _Optional[_Union[StreamControls, _Mapping]] = ..., init_image: _Optional[bytes] = ..., strength: _Optional[float] = ..., loras: _Optional[_Union[StreamLoras, _Mapping]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class StreamLoras(_message.Message):
    __slots__ = ("loras",)
    LORAS_FIELD_NUMBER: _ClassVar[int]
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    def __init__(self, loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ...) -> None: ...

class StreamControls(_message.Message):
    __slots__ = ("controls",)
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    def __init__(self, controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ...) -> None: ...

class StreamFrame(_message.Message):
    __slots__ = ("id", "prompt", "seed", "controls", "init_image", "strength", "timeout")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    id: int
    prompt: str
    seed: int
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    init_image: bytes
    strength: float
    timeout: _duration_pb2.Duration
    def __init__(self, id: _Optional[int] = ..., prompt: _Optional[str] = ..., seed: _Optional[int] = ..., controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ..., init_image: _Optional[bytes] = ..., strength: _Optional[float] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class StreamClose(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("state", "image", "dropped", "error")
    STATE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    image: FrameImage
    dropped: FrameDropped
    error: FrameError
    def __init__(self, state: _Optional[_Union[SessionState, _Mapping]] = ..., image: _Optional[_Union[FrameImage, _Mapping]] = ..., dropped: _Optional[_Union[FrameDropped, _Mapping]] = ..., error: _Optional[_Union[FrameError, _Mapping]] = ...) -> None: ...

class SessionState(_message.Message):
    __slots__ = ("phase", "session_id", "position", "resume_token", "reason", "error", "last_answered", "settings_taken")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    phase: SessionPhase
    session_id: str
    position: int
    resume_token: str
    reason: ClosedReason
    error: StreamError
    last_answered: int
    settings_taken: int
    def __init__(self, phase: _Optional[_Union[SessionPhase, str]] = ..., session_id: _Optional[str] = ..., position: _Optional[int] = ..., resume_token: _Optional[str] = ..., reason: _Optional[_Union[ClosedReason, str]] = ..., error: _Optional[_Union[StreamError, _Mapping]] = ..., last_answered: _Optional[int] = ..., settings_taken: _Optional[int] = ...) -> None: ...

class FrameImage(_message.Message):
    __slots__ = ("frame_id", "image", "seed", "unet_batch", "decoder_batch", "controlnet_batch", "queued_seconds", "total_seconds", "stages")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    UNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    DECODER_BATCH_FIELD_NUMBER: _ClassVar[int]
    CONTROLNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    image: _decoder_pb2.Image
    seed: int
    unet_batch: int
    decoder_batch: int
    controlnet_batch: int
    queued_seconds: float
    total_seconds: float
    stages: _containers.RepeatedCompositeFieldContainer[_stage_pb2.StageTime]
    def __init__(self, frame_id: _Optional[int] = ..., image: _Optional[_Union[_decoder_pb2.Image, _Mapping]] = ..., seed: _Optional[int] = ..., unet_batch: _Optional[int] = ..., decoder_batch: _Optional[int] = ..., controlnet_batch: _Optional[int] = ..., queued_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., stages: _Optional[_Iterable[_Union[_stage_pb2.StageTime, _Mapping]]] = ...) -> None: ...

class FrameDropped(_message.Message):
    __slots__ = ("frame_id", "reason", "standing_frame_id")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STANDING_FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    reason: DropReason
    standing_frame_id: int
    def __init__(self, frame_id: _Optional[int] = ..., reason: _Optional[_Union[DropReason, str]] = ..., standing_frame_id: _Optional[int] = ...) -> None: ...

class FrameError(_message.Message):
    __slots__ = ("frame_id", "error")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    error: StreamError
    def __init__(self, frame_id: _Optional[int] = ..., error: _Optional[_Union[StreamError, _Mapping]] = ...) -> None: ...

class StreamError(_message.Message):
    __slots__ = ("code", "message", "field")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...
