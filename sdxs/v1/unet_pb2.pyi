from sdxs.v1 import tensor_pb2 as _tensor_pb2
from sdxs.v1 import text_encoder_pb2 as _text_encoder_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DenoiseRequest(_message.Message):
    __slots__ = ("text", "seeds", "deterministic")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    text: _text_encoder_pb2.EncodeResponse
    seeds: _containers.RepeatedScalarFieldContainer[int]
    deterministic: bool
    def __init__(self, text: _Optional[_Union[_text_encoder_pb2.EncodeResponse, _Mapping]] = ..., seeds: _Optional[_Iterable[int]] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class DenoiseResponse(_message.Message):
    __slots__ = ("latent", "model_digest", "batch")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    latent: _tensor_pb2.Tensor
    model_digest: str
    batch: int
    def __init__(self, latent: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., model_digest: _Optional[str] = ..., batch: _Optional[int] = ...) -> None: ...
