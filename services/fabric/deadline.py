"""The terms of a call: how long it may still take, how urgent it is, and for whom it is done."""

import enum
import time
from dataclasses import dataclass, replace

from sdxs.errors import DeadlineExceeded


class Priority(enum.Enum):
    """A call's class of urgency. While several wait, each has its share of the device (services.fabric.fairness)."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True)
class Deadline:
    """A point on the monotonic clock, in seconds; infinite when the caller set none. With it, whose call it is."""

    at: float = float("inf")
    priority: Priority = Priority.NORMAL
    tenant: str = ""

    @classmethod
    def after(cls, seconds: float | None, priority: Priority = Priority.NORMAL, tenant: str = "") -> "Deadline":
        """The deadline so many seconds from now; None means none."""
        return cls(float("inf") if seconds is None else time.monotonic() + seconds, priority, tenant)

    def within(self, seconds: float) -> "Deadline":
        """The earlier of this deadline and one so many seconds from now."""
        return replace(self, at=min(self.at, time.monotonic() + seconds))

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at

    def remaining(self) -> float | None:
        """Seconds left, None without a limit. Raises DeadlineExceeded when none are left."""
        if self.at == float("inf"):
            return None
        left = self.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the answer was ready")
        return left
