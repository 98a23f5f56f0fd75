"""How alpha and lambda_FM are lowered during segmented Diff-Instruct (Alg. 1, arXiv:2403.16627, which says only "adjust")."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def progress(shape: str, step: int, steps: int) -> float:
    """Share of the way at a step, 0 at the first and 1 at the last: p = step / (steps - 1), or (1 - cos(pi p)) / 2 for "cosine"."""
    linear = min(1.0, step / max(1, steps - 1))
    return 0.5 * (1 - math.cos(math.pi * linear)) if shape == "cosine" else linear


def interpolate(start: float, end: float, share: float) -> float:
    """start + (end - start) p."""
    return start + (end - start) * share


def overlap_gap(x0_BCHW: Tensor, offline_BCHW: Tensor, online_BCHW: Tensor) -> Tensor:
    """g = mean |x_on - x_off| / mean |x - x_off| : how far the student's distribution is from the teacher's, relative to how far the
    offline model moves the sample at all.

    Both models see the same x_t. Where the distributions are one, so are the best estimates, and g is 0; an online model that merely
    returns the student's sample, having nothing in common with the offline one, gives 1. An online model that has learnt nothing yet
    is still the offline one and gives 0 as well, which `AdaptiveProgress` has to allow for.
    """
    return (online_BCHW - offline_BCHW).abs().mean() / (x0_BCHW - offline_BCHW).abs().mean().clamp_min(1e-8)


class AdaptiveProgress:
    """p = clamp((high - r) / (high - low), 0, 1) for r = G / max G, the moving average of the gap against its highest value so far; p
    never goes back.

    Against its highest, because the online model starts as the offline one: the gap begins near 0 whatever the student is, rises while
    the online model learns the student's distribution, and only then falls as that nears the teacher's. It also needs no thresholds of
    one's own for every teacher, guidance and range of t.

    Args:
        high: the share of the highest gap below which alpha and lambda_FM move.
        low: the share at which they have arrived; below `high`.
        decay: of the moving average.
    """

    def __init__(self, high: float, low: float, decay: float = 0.95) -> None:
        if not 1 >= high > low >= 0:
            raise ValueError(f"overlap ({high}, {low}): shares of the highest gap, the first above the second")
        self.high, self.low, self.decay = high, low, decay
        self.average: float | None = None
        self.highest = self.value = 0.0

    def note(self, gap: float) -> None:
        """Take the gap of one step into account."""
        self.average = gap if self.average is None else self.decay * self.average + (1 - self.decay) * gap
        self.highest = max(self.highest, self.average)
        share = self.average / self.highest if self.highest > 0 else 1.0
        reached = (self.high - share) / (self.high - self.low)
        self.value = max(self.value, min(1.0, reached))

    def state_dict(self) -> dict[str, float | None]:
        return {"average": self.average, "highest": self.highest, "value": self.value}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.average, self.highest, self.value = state["average"], float(state["highest"] or 0.0), float(state["value"] or 0.0)
