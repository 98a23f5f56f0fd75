"""What a store tells of its objects, and what it signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

BINARY = "application/octet-stream"


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Stat:
    """All about an object but its bytes."""

    size: int
    modified: datetime
    content_type: str = BINARY
    metadata: Mapping[str, str] = field(default_factory=dict)
    """As it was written; names in lower case."""


@dataclass(frozen=True)
class Upload:
    """The bytes that a presigned URL is to take: no others."""

    sha256: str
    size: int
    content_type: str


@dataclass(frozen=True)
class SignedRequest:
    """A request that needs no credentials until it expires. All of its headers must be sent, as they are."""

    method: str
    url: str
    headers: Mapping[str, str]
