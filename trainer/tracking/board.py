"""Where workers pin what whoever watches a run should know. Alone in its module: the actor's process imports nothing but Ray."""

from __future__ import annotations

import ray

Note = tuple[int, int, dict[str, float]]  # steps done, steps in all, metrics


@ray.remote(num_cpus=0)
class Board:
    """Every note of every stage, in their order, and why a stage stopped for good."""

    def __init__(self) -> None:
        self.latest: dict[str, Note] = {}
        self.notes: dict[str, list[Note]] = {}
        self.reasons: dict[str, str] = {}

    def pin(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.latest[stage] = (step, steps, metrics)
        self.notes.setdefault(stage, []).append(self.latest[stage])

    def read(self) -> dict[str, Note]:
        return self.latest

    def since(self, stage: str, count: int) -> list[Note]:
        """The notes of a stage but for the first `count`."""
        return self.notes.get(stage, [])[count:]

    def stop(self, stage: str, reason: str) -> None:
        self.reasons.setdefault(stage, reason)

    def stopped(self, stage: str) -> str | None:
        return self.reasons.get(stage)
