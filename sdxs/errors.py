"""One tree of errors; each knows its gRPC status name and its exit code. The translation to gRPC lives in `sdxs.rpc` alone.

SdxsError              UNKNOWN              1
|- InvalidRequest      INVALID_ARGUMENT     2   a field of a request, recipe or setting is out of what is allowed
|- NotFound            NOT_FOUND            3   no such model, job, recipe or object
|- AlreadyExists       ALREADY_EXISTS       4   the id is taken by something else
|- PreconditionFailed  FAILED_PRECONDITION  5   the state has changed, or something needed is not installed
|- Unavailable         UNAVAILABLE          6   warming up, or a peer is down; try again
|- Overloaded          RESOURCE_EXHAUSTED   7   full; try again later
|- DeadlineExceeded    DEADLINE_EXCEEDED    8
|- Cancelled           CANCELLED            9
|- CorruptArtifact     DATA_LOSS           10   a file is not what its manifest says
|- Internal            INTERNAL            11   a bug
|- PermissionDenied    PERMISSION_DENIED   12   the credentials are refused
`- Aborted             ABORTED             13   a long run ended early; it says why, and goes on when run again
"""

from __future__ import annotations


class SdxsError(Exception):
    """Base of everything this project raises on purpose."""

    code = "UNKNOWN"
    exit_code = 1
    field = ""
    """Of the request, where one is at fault."""
    retry_after_s: float | None = None
    """After how many seconds the same call may succeed; None where nobody can say, or never."""

    def __init__(self, *args: object, retry_after_s: float | None = None) -> None:
        super().__init__(*args)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InvalidRequest(SdxsError):
    """A field is out of what is allowed."""

    code = "INVALID_ARGUMENT"
    exit_code = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: got {shown}, allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.allowed)


class NotFound(SdxsError):
    """There is no such thing."""

    code = "NOT_FOUND"
    exit_code = 3


class AlreadyExists(SdxsError):
    """The id is taken by something else."""

    code = "ALREADY_EXISTS"
    exit_code = 4


class PreconditionFailed(SdxsError):
    """The state has changed meanwhile, or a needed part is missing."""

    code = "FAILED_PRECONDITION"
    exit_code = 5


class Unavailable(SdxsError):
    """Not ready or not reachable; the same call may succeed later."""

    code = "UNAVAILABLE"
    exit_code = 6
    retry_after_s = 1.0


class Overloaded(SdxsError):
    """Full; the same call may succeed later."""

    code = "RESOURCE_EXHAUSTED"
    exit_code = 7
    retry_after_s = 0.5  # what is full empties at the pace of single images; a queue of jobs says more


class DeadlineExceeded(SdxsError):
    """The caller's time ran out."""

    code = "DEADLINE_EXCEEDED"
    exit_code = 8


class Cancelled(SdxsError):
    """The caller left."""

    code = "CANCELLED"
    exit_code = 9


class CorruptArtifact(SdxsError):
    """A file is not what its manifest says."""

    code = "DATA_LOSS"
    exit_code = 10


class Internal(SdxsError):
    """A bug of ours; the message says nothing of the inside."""

    code = "INTERNAL"
    exit_code = 11


class PermissionDenied(SdxsError):
    """The credentials are refused."""

    code = "PERMISSION_DENIED"
    exit_code = 12


class Aborted(SdxsError):
    """A long run ended before its end. Says why; what was done is kept."""

    code = "ABORTED"
    exit_code = 13
