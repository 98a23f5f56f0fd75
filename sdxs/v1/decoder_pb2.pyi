from sdxs.v1 import stage_pb2 as _stage_pb2
from sdxs.v1 import tensor_pb2 as _tensor_pb2
from sdxs.v1 import unet_pb2 as _unet_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_RAW: _ClassVar[ImageFormat]
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_RAW: ImageFormat

class DecodeRequest(_message.Message):
    __slots__ = ("latent", "format", "deterministic", "receipts")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    latent: _unet_pb2.DenoiseResponse
    format: ImageFormat
    deterministic: bool
    receipts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, latent: _Optional[_Union[_unet_pb2.DenoiseResponse, _Mapping]] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., deterministic: _Optional[bool] = ..., receipts: _Optional[_Iterable[str]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("images", "batch", "unet_batch", "controlnet_batch", "times")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    UNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    CONTROLNET_BATCH_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    batch: int
    unet_batch: int
    controlnet_batch: int
    times: _containers.RepeatedCompositeFieldContainer[_stage_pb2.StageTime]
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., batch: _Optional[int] = ..., unet_batch: _Optional[int] = ..., controlnet_batch: _Optional[int] = ..., times: _Optional[_Iterable[_Union[_stage_pb2.StageTime, _Mapping]]] = ...) -> None: ...

class EncodeImageRequest(_message.Message):
    __slots__ = ("init_image", "width", "height")
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    init_image: bytes
    width: int
    height: int
    def __init__(self, init_image: _Optional[bytes] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class EncodeImageResponse(_message.Message):
    __slots__ = ("latent", "model_digest", "time")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    latent: _tensor_pb2.Tensor
    model_digest: str
    time: _stage_pb2.StageTime
    def __init__(self, latent: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., model_digest: _Optional[str] = ..., time: _Optional[_Union[_stage_pb2.StageTime, _Mapping]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data", "format", "width", "height")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    format: ImageFormat
    width: int
    height: int
    def __init__(self, data: _Optional[bytes] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...
