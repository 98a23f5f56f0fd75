"""Errors across the wire, both ways, in one place; and the channel options client and servers share.

An SdxsError leaves as its gRPC status with google.rpc details: BadRequest for a field at fault, RetryInfo where another try may
succeed. It arrives as the same class.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from sdxs.errors import InvalidRequest, SdxsError

DETAILS_KEY = "grpc-status-details-bin"
PRIORITY_KEY, TENANT_KEY = "x-sdxs-priority", "x-sdxs-tenant"
"""Metadata of a call: its class (high, normal, low), and for whom it is."""
_MAX_TEXT = 1000  # of a message: metadata is limited to 8 KB

# A peer that vanished without a word (power, network) is noticed within 15 seconds.
KEEPALIVE_CLIENT = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000)]
KEEPALIVE_SERVER = [("grpc.http2.min_ping_interval_without_data_ms", 5_000)]  # or such pings end a call that is silent for 40 s

Metadata = tuple[tuple[str, bytes], ...]
Terms = tuple[tuple[str, str], ...]
TrailingMetadata = Iterable[tuple[str, str | bytes]] | None


def terms(priority: str, tenant: str) -> Terms:
    """Metadata that say a call's class and tenant; nothing of the usual ones."""
    said = ((PRIORITY_KEY, priority),) if priority != "normal" else ()
    return (*said, (TENANT_KEY, tenant)) if tenant else said


def to_status(error: SdxsError) -> tuple[grpc.StatusCode, str, Metadata]:
    """Arguments for `context.abort`."""
    code = grpc.StatusCode[error.code]
    message = str(error)[:_MAX_TEXT]
    status = status_pb2.Status(code=code.value[0], message=message)
    if error.field:
        description = str(getattr(error, "allowed", message))[:_MAX_TEXT]
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=description)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return code, message, ((DETAILS_KEY, status.SerializeToString()),)


def violations(metadata: TrailingMetadata) -> list[error_details_pb2.BadRequest.FieldViolation]:
    """The fields at fault, as a server's trailing metadata names them."""
    return [violation for bad in _details(metadata, error_details_pb2.BadRequest) for violation in bad.field_violations]


def retry_after_s(metadata: TrailingMetadata) -> float | None:
    """When to try again, as a server's trailing metadata says; None where it does not."""
    for info in _details(metadata, error_details_pb2.RetryInfo):
        return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def _details(metadata: TrailingMetadata, kind: type[Message]) -> Iterator[Any]:
    """The google.rpc details of that kind."""
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                found = kind()
                if detail.Unpack(found):
                    yield found


def from_rpc_error(error: Any) -> SdxsError:
    """The SdxsError a failed call stands for; takes the RpcError of grpc and the AioRpcError of grpc.aio."""
    return from_status(error.code().name, error.details() or error.code().name, error.trailing_metadata())


def from_status(code: str, message: str, metadata: TrailingMetadata) -> SdxsError:
    """The SdxsError of a status code's name, its message and its trailing metadata."""
    fields = violations(metadata)
    field, description = (fields[0].field, fields[0].description) if fields else ("", message)
    arrived = from_words(code, message, field, description)
    arrived.retry_after_s = retry_after_s(metadata)
    return arrived


def from_words(code: str, message: str, field: str = "", allowed: str = "") -> SdxsError:
    """The SdxsError of a status code's name, in the server's words."""
    kind = _class_of(code)
    if issubclass(kind, InvalidRequest):
        found = kind(field, None, allowed or message)
        found.args = (message,)  # they show the value
        return found
    arrived = kind(message)
    arrived.field = field
    return arrived


def _class_of(code: str) -> type[SdxsError]:
    """The first class of the tree, from its root down, with that code."""
    level: list[type[SdxsError]] = [SdxsError]
    while level:
        for kind in level:
            if kind.code == code:
                return kind
        level = [below for kind in level for below in kind.__subclasses__()]
    return SdxsError
