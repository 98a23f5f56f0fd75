"""How long a call may still take."""

import time
from dataclasses import dataclass

from sdxs.errors import DeadlineExceeded


@dataclass(frozen=True)
class Deadline:
    """A point on the monotonic clock, in seconds; infinite when the caller set none."""

    at: float = float("inf")

    @classmethod
    def after(cls, seconds: float | None) -> "Deadline":
        """The deadline so many seconds from now; None means none."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    def within(self, seconds: float) -> "Deadline":
        """The earlier of this deadline and one so many seconds from now."""
        return Deadline(min(self.at, time.monotonic() + seconds))

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
