from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Control(_message.Message):
    __slots__ = ("image", "type", "controlnet", "scale", "guess", "preprocessed", "image_uri")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CONTROLNET_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    GUESS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_URI_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    type: str
    controlnet: str
    scale: float
    guess: bool
    preprocessed: bool
    image_uri: str
    def __init__(self, image: _Optional[bytes] = ..., type: _Optional[str] = ..., controlnet: _Optional[str] = ..., scale: _Optional[float] = ..., guess: _Optional[bool] = ..., preprocessed: _Optional[bool] = ..., image_uri: _Optional[str] = ...) -> None: ...
