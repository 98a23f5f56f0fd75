import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sdxs.v1 import control_pb2 as _control_pb2
from sdxs.v1 import decoder_pb2 as _decoder_pb2
from sdxs.v1 import lora_pb2 as _lora_pb2
from sdxs.v1 import stage_pb2 as _stage_pb2
from sdxs.v1 import stream_pb2 as _stream_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobPriority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_PRIORITY_UNSPECIFIED: _ClassVar[JobPriority]
    JOB_PRIORITY_HIGH: _ClassVar[JobPriority]
    JOB_PRIORITY_NORMAL: _ClassVar[JobPriority]
    JOB_PRIORITY_LOW: _ClassVar[JobPriority]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_SERVING: _ClassVar[ModelState]
    MODEL_STATE_ASLEEP: _ClassVar[ModelState]
    MODEL_STATE_STARTING: _ClassVar[ModelState]
    MODEL_STATE_BROKEN: _ClassVar[ModelState]
JOB_PRIORITY_UNSPECIFIED: JobPriority
JOB_PRIORITY_HIGH: JobPriority
JOB_PRIORITY_NORMAL: JobPriority
JOB_PRIORITY_LOW: JobPriority
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_SERVING: ModelState
MODEL_STATE_ASLEEP: ModelState
MODEL_STATE_STARTING: ModelState
MODEL_STATE_BROKEN: ModelState

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "model", "seed", "n", "width", "height", "format", "deterministic", "controls", "init_image", "strength", "loras", "init_image_uri")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_URI_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    model: str
    seed: int
    n: int
    width: int
    height: int
    format: _decoder_pb2.ImageFormat
    deterministic: bool
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    init_image: bytes
    strength: float
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.Lora]
    init_image_uri: str
    def __init__(self, prompt: _Optional[str] = ..., model: _Optional[str] = ..., seed: _Optional[int] = ..., n: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., format: _Optional[_Union[_decoder_pb2.ImageFormat, str]] = ..., deterministic: _Optional[bool] = ..., controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ..., init_image: _Optional[bytes] = ..., strength: _Optional[float] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.Lora, _Mapping]]] = ..., init_image_uri: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("images", "receipt")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[_decoder_pb2.Image]
    receipt: Receipt
    def __init__(self, images: _Optional[_Iterable[_Union[_decoder_pb2.Image, _Mapping]]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("model", "model_digest", "prompt", "seeds", "width", "height", "unet_batch", "decoder_batch", "deterministic", "seconds", "controlnet_batch", "controls", "init_image_sha256", "strength", "loras", "stages", "job_queue_seconds", "software")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    UNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    DECODER_BATCH_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CONTROLNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    JOB_QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_digest: str
    prompt: str
    seeds: _containers.RepeatedScalarFieldContainer[int]
    width: int
    height: int
    unet_batch: int
    decoder_batch: int
    deterministic: bool
    seconds: float
    controlnet_batch: int
    controls: _containers.RepeatedCompositeFieldContainer[AppliedControl]
    init_image_sha256: str
    strength: float
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.AppliedLora]
    stages: _containers.RepeatedCompositeFieldContainer[_stage_pb2.StageTime]
    job_queue_seconds: float
    software: str
    def __init__(self, model: _Optional[str] = ..., model_digest: _Optional[str] = ..., prompt: _Optional[str] = ..., seeds: _Optional[_Iterable[int]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., unet_batch: _Optional[int] = ..., decoder_batch: _Optional[int] = ..., deterministic: _Optional[bool] = ..., seconds: _Optional[float] = ..., controlnet_batch: _Optional[int] = ..., controls: _Optional[_Iterable[_Union[AppliedControl, _Mapping]]] = ..., init_image_sha256: _Optional[str] = ..., strength: _Optional[float] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.AppliedLora, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[_stage_pb2.StageTime, _Mapping]]] = ..., job_queue_seconds: _Optional[float] = ..., software: _Optional[str] = ...) -> None: ...

class AppliedControl(_message.Message):
    __slots__ = ("controlnet", "type", "scale", "guess", "preprocessed", "image_sha256")
    CONTROLNET_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    GUESS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    controlnet: str
    type: str
    scale: float
    guess: bool
    preprocessed: bool
    image_sha256: str
    def __init__(self, controlnet: _Optional[str] = ..., type: _Optional[str] = ..., scale: _Optional[float] = ..., guess: _Optional[bool] = ..., preprocessed: _Optional[bool] = ..., image_sha256: _Optional[str] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("request", "request_id", "priority", "requests", "webhook_url")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_URL_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    request_id: str
    priority: JobPriority
    requests: _containers.RepeatedCompositeFieldContainer[GenerateRequest]
    webhook_url: str
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., request_id: _Optional[str] = ..., priority: _Optional[_Union[JobPriority, str]] = ..., requests: _Optional[_Iterable[_Union[GenerateRequest, _Mapping]]] = ..., webhook_url: _Optional[str] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job_id", "state")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    state: JobState
    def __init__(self, job_id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job_id", "state", "images", "receipt", "error", "deliveries", "created", "finished", "priority", "position", "progress", "items", "tenant")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    state: JobState
    images: _containers.RepeatedCompositeFieldContainer[JobImage]
    receipt: Receipt
    error: JobError
    deliveries: int
    created: _timestamp_pb2.Timestamp
    finished: _timestamp_pb2.Timestamp
    priority: JobPriority
    position: int
    progress: JobProgress
    items: _containers.RepeatedCompositeFieldContainer[JobItem]
    tenant: str
    def __init__(self, job_id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., images: _Optional[_Iterable[_Union[JobImage, _Mapping]]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ..., deliveries: _Optional[int] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., finished: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., priority: _Optional[_Union[JobPriority, str]] = ..., position: _Optional[int] = ..., progress: _Optional[_Union[JobProgress, _Mapping]] = ..., items: _Optional[_Iterable[_Union[JobItem, _Mapping]]] = ..., tenant: _Optional[str] = ...) -> None: ...

class JobProgress(_message.Message):
    __slots__ = ("done", "total", "failed")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    failed: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., failed: _Optional[int] = ...) -> None: ...

class JobItem(_message.Message):
    __slots__ = ("state", "images", "receipt", "error")
    STATE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    state: JobState
    images: _containers.RepeatedCompositeFieldContainer[JobImage]
    receipt: Receipt
    error: JobError
    def __init__(self, state: _Optional[_Union[JobState, str]] = ..., images: _Optional[_Iterable[_Union[JobImage, _Mapping]]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "states")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[JobState]
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[JobState, str]]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[GetJobResponse]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[GetJobResponse, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: GetJobResponse
    def __init__(self, job: _Optional[_Union[GetJobResponse, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: GetJobResponse
    def __init__(self, job: _Optional[_Union[GetJobResponse, _Mapping]] = ...) -> None: ...

class CreateUploadRequest(_message.Message):
    __slots__ = ("sha256", "size", "media_type")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    media_type: str
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ..., media_type: _Optional[str] = ...) -> None: ...

class CreateUploadResponse(_message.Message):
    __slots__ = ("uri", "already_there", "method", "url", "headers", "url_expires")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    URI_FIELD_NUMBER: _ClassVar[int]
    ALREADY_THERE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    URL_EXPIRES_FIELD_NUMBER: _ClassVar[int]
    uri: str
    already_there: bool
    method: str
    url: str
    headers: _containers.ScalarMap[str, str]
    url_expires: _timestamp_pb2.Timestamp
    def __init__(self, uri: _Optional[str] = ..., already_there: _Optional[bool] = ..., method: _Optional[str] = ..., url: _Optional[str] = ..., headers: _Optional[_Mapping[str, str]] = ..., url_expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class JobImage(_message.Message):
    __slots__ = ("key", "url", "url_expires", "format", "size", "sha256")
    KEY_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    URL_EXPIRES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    key: str
    url: str
    url_expires: _timestamp_pb2.Timestamp
    format: _decoder_pb2.ImageFormat
    size: int
    sha256: str
    def __init__(self, key: _Optional[str] = ..., url: _Optional[str] = ..., url_expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., format: _Optional[_Union[_decoder_pb2.ImageFormat, str]] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("code", "message", "field")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class ListLorasRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListLorasResponse(_message.Message):
    __slots__ = ("loras",)
    LORAS_FIELD_NUMBER: _ClassVar[int]
    loras: _containers.RepeatedCompositeFieldContainer[PublishedLora]
    def __init__(self, loras: _Optional[_Iterable[_Union[PublishedLora, _Mapping]]] = ...) -> None: ...

class PublishedLora(_message.Message):
    __slots__ = ("name", "pointer", "digest", "model", "rank", "trigger_words", "description")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POINTER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_WORDS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    pointer: str
    digest: str
    model: str
    rank: int
    trigger_words: _containers.RepeatedScalarFieldContainer[str]
    description: str
    def __init__(self, name: _Optional[str] = ..., pointer: _Optional[str] = ..., digest: _Optional[str] = ..., model: _Optional[str] = ..., rank: _Optional[int] = ..., trigger_words: _Optional[_Iterable[str]] = ..., description: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "digest", "width", "height", "max_prompt_tokens", "controlnets", "status", "size_step", "min_side", "max_side", "max_pixels")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTROLNETS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SIZE_STEP_FIELD_NUMBER: _ClassVar[int]
    MIN_SIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    width: int
    height: int
    max_prompt_tokens: int
    controlnets: _containers.RepeatedCompositeFieldContainer[ControlNet]
    status: ModelStatus
    size_step: int
    min_side: int
    max_side: int
    max_pixels: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., controlnets: _Optional[_Iterable[_Union[ControlNet, _Mapping]]] = ..., status: _Optional[_Union[ModelStatus, _Mapping]] = ..., size_step: _Optional[int] = ..., min_side: _Optional[int] = ..., max_side: _Optional[int] = ..., max_pixels: _Optional[int] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("state", "reference", "next_digest", "error")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    NEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    state: ModelState
    reference: str
    next_digest: str
    error: str
    def __init__(self, state: _Optional[_Union[ModelState, str]] = ..., reference: _Optional[str] = ..., next_digest: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class ControlNet(_message.Message):
    __slots__ = ("name", "types")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    name: str
    types: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., types: _Optional[_Iterable[str]] = ...) -> None: ...
