from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRequest(_message.Message):
    __slots__ = ("id", "call", "cancel")
    ID_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    id: int
    call: LineCall
    cancel: LineCancel
    def __init__(self, id: _Optional[int] = ..., call: _Optional[_Union[LineCall, _Mapping]] = ..., cancel: _Optional[_Union[LineCancel, _Mapping]] = ...) -> None: ...

class LineCall(_message.Message):
    __slots__ = ("method", "payload", "timeout_seconds", "priority", "tenant", "max_answer_bytes")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    method: str
    payload: bytes
    timeout_seconds: float
    priority: str
    tenant: str
    max_answer_bytes: int
    def __init__(self, method: _Optional[str] = ..., payload: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ..., priority: _Optional[str] = ..., tenant: _Optional[str] = ..., max_answer_bytes: _Optional[int] = ...) -> None: ...

class LineCancel(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("id", "payload", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    payload: bytes
    error: LineError
    def __init__(self, id: _Optional[int] = ..., payload: _Optional[bytes] = ..., error: _Optional[_Union[LineError, _Mapping]] = ...) -> None: ...

class LineError(_message.Message):
    __slots__ = ("code", "message", "status")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    status: bytes
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., status: _Optional[bytes] = ...) -> None: ...
