"""What a run has of a cluster, and what one stage of it is told. Plain data: Ray's own processes unpickle it, and load no model library."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from sdxs.errors import InvalidRequest
from trainer.pool.client import PoolClient
from trainer.specs import TeacherSpec


def parse_workers(text: str) -> int | tuple[int, int]:
    """ "8", or "2:8" for elastic training with at least 2 and at most 8. Raises InvalidRequest for anything else."""
    try:
        bounds = [int(part) for part in text.split(":")]
    except ValueError:
        bounds = []
    if len(bounds) not in (1, 2) or bounds[0] < 1 or bounds[-1] < bounds[0]:
        raise InvalidRequest("workers", text, "a number, or FEWEST:MOST")
    return bounds[0] if len(bounds) == 1 else (bounds[0], bounds[1])


@dataclass(frozen=True)
class Cluster:
    """How many training workers and teachers, and what each gets; the science is in the recipe.

    `workers` is a number, or (fewest, most) for elastic training. `teachers` 0 puts a teacher inside each worker.
    """

    workers: int | tuple[int, int] = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads: int = 1
    teachers: int = 1
    gpus_per_teacher: float = 0.0
    checkpoint_every: int = 100
    max_failures: int = 3

    @property
    def elastic(self) -> bool:
        return not isinstance(self.workers, int)

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def resources(self) -> dict[str, float]:
        """What one worker gets, by Ray's names."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    def wanted(self, stages: int = 1) -> dict[str, float]:
        """What the fewest workers of some stages and the whole pool take together."""
        fewest = stages * (self.workers if isinstance(self.workers, int) else self.workers[0])
        return {
            "CPU": self.cpus_per_worker * (fewest + self.teachers),
            "GPU": self.gpus_per_worker * fewest + self.gpus_per_teacher * self.teachers,
        }


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to run one stage; plain data and actor handles only."""

    stage: str
    digest: str
    recipe: dict[str, Any]
    prompts: str  # digest of their source
    settings: dict[str, str]  # SDXS_* variables
    inputs: dict[str, str]  # upstream stage -> digest
    teacher: TeacherSpec | None  # who answers this stage's requests
    client: PoolClient | None  # the pool of them; without, each worker has its own
    board: Any
    cluster: Cluster = field(default_factory=Cluster)
    folder: str = field(default_factory=os.getcwd)  # what relative paths in the recipe are meant from
