"""What a worker notes of its stage beside the losses: speed, the share of time it waited for the teacher, and sample grids."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.artifacts import Artifacts
from trainer.cluster import StageJob
from trainer.loop import Metrics, Stage
from trainer.teacher import Array, Pending, Request, TeacherClient
from trainer.tracking.samples import sample_grid
from trainer.tracking.tracker import SAMPLED

LOG = logging.getLogger(__name__)
GRIDS = 20  # at most so many a stage


class Timed:
    """A teacher's client that counts the seconds its caller is held up: until a request is taken, until a reply is there."""

    def __init__(self, client: TeacherClient) -> None:
        self.client, self.seconds = client, 0.0

    def submit(self, request: Request) -> Pending:
        start = time.perf_counter()
        try:
            return _TimedPending(self, self.client.submit(request))
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class _TimedPending:
    client: Timed
    pending: Pending

    def result(self) -> list[Array]:
        start = time.perf_counter()
        try:
            return self.pending.result()
        finally:
            self.client.seconds += time.perf_counter() - start


class Observer:
    """Of one stage on one worker.

    Args:
        pin: puts a note on the board: (step, metrics). Only the first worker's is used.
    """

    def __init__(self, job: StageJob, stage: Any, artifacts: Artifacts, pin: Callable[[int, Metrics], None]) -> None:
        self.job, self.stage, self.artifacts, self.pin = job, stage, artifacts, pin
        self.client: Any = stage.context.teacher
        self._waited = self._seconds()

    def _seconds(self) -> float:
        return self.client.seconds if isinstance(self.client, Timed) else 0.0

    def measured(self, steps: int, metrics: Metrics) -> Metrics:
        """The metrics of so many steps with `images_per_second`, over all workers, and `teacher_wait`, 0 to 1, where one is asked."""
        seconds = metrics["seconds_per_step"]
        found = {**metrics, "images_per_second": self.stage.section.batch / seconds}
        if self.job.teacher is not None:
            waited, self._waited = self._seconds() - self._waited, self._seconds()
            found["teacher_wait"] = min(1.0, waited / (seconds * steps))
        return found

    def picture(self, step: int) -> None:
        """Leave a grid in the store beside the stage's result, and say so. All workers must ask together. One that fails is logged."""
        stage: Stage = self.stage
        every = max(1, -(-stage.steps // self.job.cluster.checkpoint_every // GRIDS)) * self.job.cluster.checkpoint_every
        if step % every and step != stage.steps:
            return
        try:
            self._leave(step, stage)
        except Exception:
            LOG.exception("no sample grid of stage %s at step %d; training goes on", self.job.stage, step)

    def _leave(self, step: int, stage: Stage) -> None:
        image = sample_grid(self.job.stage, stage, self.stage.context)
        if image is None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "grid.png"
            image.save(path)
            self.artifacts.put_part(self.job.stage, self.job.digest, f"samples/{step:06}.png", path)
        self.pin(step, {SAMPLED: 1.0})
