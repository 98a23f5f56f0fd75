from sdxs.v1 import lora_pb2 as _lora_pb2
from sdxs.v1 import stage_pb2 as _stage_pb2
from sdxs.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("prompt", "loras")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    loras: _containers.RepeatedCompositeFieldContainer[_lora_pb2.LoraUse]
    def __init__(self, prompt: _Optional[str] = ..., loras: _Optional[_Iterable[_Union[_lora_pb2.LoraUse, _Mapping]]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("text", "model_digest", "pooled", "time")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    text: _tensor_pb2.Tensor
    model_digest: str
    pooled: _tensor_pb2.Tensor
    time: _stage_pb2.StageTime
    def __init__(self, text: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., model_digest: _Optional[str] = ..., pooled: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., time: _Optional[_Union[_stage_pb2.StageTime, _Mapping]] = ...) -> None: ...
