"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long and at what rate: linear warm-up, then constant or cosine to `floor` x `lr`.

    A cosine begins again at each step of `restarts`, at full rate (SGDR, arXiv:1608.03983).
    """

    steps: int
    lr: float
    warmup: int = 0
    cosine: bool = False
    floor: float = 0.02
    restarts: tuple[int, ...] = ()

    def rate(self, step: int) -> float:
        """Learning rate of update `step` (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if not self.cosine:
            return self.lr
        start = max((r for r in self.restarts if r <= step), default=self.warmup)
        end = min((r for r in self.restarts if r > step), default=self.steps)
        progress = (step - start) / max(1, end - start)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
