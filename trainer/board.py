"""Where workers pin their latest metrics for whoever watches a run. Alone in its module: the actor's process imports nothing but Ray."""

from __future__ import annotations

import ray

Note = tuple[int, int, dict[str, float]]  # steps done, steps in all, metrics


@ray.remote(num_cpus=0)
class Board:
    """The latest note of every stage."""

    def __init__(self) -> None:
        self.latest: dict[str, Note] = {}

    def pin(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.latest[stage] = (step, steps, metrics)

    def read(self) -> dict[str, Note]:
        return self.latest
