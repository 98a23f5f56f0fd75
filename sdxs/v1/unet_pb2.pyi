from sdxs.v1 import control_pb2 as _control_pb2
from sdxs.v1 import lora_pb2 as _lora_pb2
from sdxs.v1 import stage_pb2 as _stage_pb2
from sdxs.v1 import tensor_pb2 as _tensor_pb2
from sdxs.v1 import text_encoder_pb2 as _text_encoder_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DenoiseRequest(_message.Message):
    __slots__ = ("text", "seeds", "deterministic", "controls", "shared", "inline", "device", "init_latent", "strength", "loras", "width", "height")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INIT_LATENT_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    text: _text_encoder_pb2.EncodeResponse
    seeds: _containers.RepeatedScalarFieldContainer[int]
    deterministic: bool
    controls: _containers.RepeatedCompositeFieldContainer[_control_pb2.Control]
    shared: SharedResiduals
    inline: InlineResiduals
    device: DeviceResiduals
    init_latent: _tensor_pb2.Tensor
    strength: float
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.LoraUse]
    width: int
    height: int
    def __init__(self, text: _Optional[_Union[_text_encoder_pb2.EncodeResponse, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., deterministic: _Optional[bool] = ..., controls: _Optional[_Iterable[_Union[_control_pb2.Control, _Mapping]]] = ..., shared: _Optional[_Union[SharedResiduals, _Mapping]] = ..., inline: _Optional[_Union[InlineResiduals, _Mapping]] = ..., device: _Optional[_Union[DeviceResiduals, _Mapping]] = ..., init_latent: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., strength: _Optional[float] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.LoraUse, _Mapping]]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class InlineResiduals(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    def __init__(self, parts: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ...) -> None: ...

class SharedResiduals(_message.Message):
    __slots__ = ("pid", "fd", "nonce", "offset", "shapes")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    nonce: bytes
    offset: int
    shapes: _containers.RepeatedCompositeFieldContainer[Shape]
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., nonce: _Optional[bytes] = ..., offset: _Optional[int] = ..., shapes: _Optional[_Iterable[_Union[Shape, _Mapping]]] = ...) -> None: ...

class DeviceResiduals(_message.Message):
    __slots__ = ("pid", "nonce", "host", "cuda", "offset", "element_type", "shapes")
    PID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CUDA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    pid: int
    nonce: bytes
    host: HostMemory
    cuda: CudaMemory
    offset: int
    element_type: _tensor_pb2.ElementType
    shapes: _containers.RepeatedCompositeFieldContainer[Shape]
    def __init__(self, pid: _Optional[int] = ..., nonce: _Optional[bytes] = ..., host: _Optional[_Union[HostMemory, _Mapping]] = ..., cuda: _Optional[_Union[CudaMemory, _Mapping]] = ..., offset: _Optional[int] = ..., element_type: _Optional[_Union[_tensor_pb2.ElementType, str]] = ..., shapes: _Optional[_Iterable[_Union[Shape, _Mapping]]] = ...) -> None: ...

class HostMemory(_message.Message):
    __slots__ = ("fd",)
    FD_FIELD_NUMBER: _ClassVar[int]
    fd: int
    def __init__(self, fd: _Optional[int] = ...) -> None: ...

class CudaMemory(_message.Message):
    __slots__ = ("device_uuid", "handle", "size", "offset", "ref_counter_handle", "ref_counter_offset")
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    REF_COUNTER_HANDLE_FIELD_NUMBER: _ClassVar[int]
    REF_COUNTER_OFFSET_FIELD_NUMBER: _ClassVar[int]
    device_uuid: str
    handle: bytes
    size: int
    offset: int
    ref_counter_handle: bytes
    ref_counter_offset: int
    def __init__(self, device_uuid: _Optional[str] = ..., handle: _Optional[bytes] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ..., ref_counter_handle: _Optional[bytes] = ..., ref_counter_offset: _Optional[int] = ...) -> None: ...

class Shape(_message.Message):
    __slots__ = ("sizes",)
    SIZES_FIELD_NUMBER: _ClassVar[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class DenoiseResponse(_message.Message):
    __slots__ = ("latent", "model_digest", "batch", "controlnet_batch", "times")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CONTROLNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    latent: _tensor_pb2.Tensor
    model_digest: str
    batch: int
    controlnet_batch: int
    times: _containers.RepeatedCompositeFieldContainer[_stage_pb2.StageTime]
    def __init__(self, latent: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., model_digest: _Optional[str] = ..., batch: _Optional[int] = ..., controlnet_batch: _Optional[int] = ..., times: _Optional[_Iterable[_Union[_stage_pb2.StageTime, _Mapping]]] = ...) -> None: ...
