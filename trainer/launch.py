"""Runs one stage as a Ray Train TorchTrainer: checkpoints in the object store, resume, live progress, result as an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from sdxs.errors import Aborted, InvalidRequest
from sdxs.settings import Settings
from trainer.data.files import s3_filesystem
from trainer.pool import PoolClient
from trainer.specs import TeacherSpec

ATTEMPTS = 14  # of a request to S3, with pauses of up to 20 s between them: it may be away for minutes
Progress = Callable[[str, int, int, dict[str, float]], None]


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


def storage(settings: Settings) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray Train for the configured store."""
    url = urlparse(settings.store_url)
    if url.scheme == "file":
        return {"storage_path": f"{url.path}/checkpoints"}
    path = f"{url.netloc}{url.path.rstrip('/')}/checkpoints"
    return {"storage_path": path, "storage_filesystem": s3_filesystem(settings, ATTEMPTS)}


def run_stage(job: StageJob, settings: Settings, progress: Progress) -> None:
    """Run a stage to its end, restarting workers that die. A run of the same digest that was interrupted is resumed.

    Raises:
        Aborted: the stage cannot go on, or failed more often than allowed; says why.
    """
    cluster = job.cluster
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,  # type: ignore[arg-type]  # a pair is elastic
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=cluster.resources(),
        ),
        run_config=RunConfig(
            name=f"{job.stage}-{job.digest}",
            **storage(settings),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    with _Watching(job, progress):
        cause = _fit(trainer)
    reason = ray.get(job.board.stopped.remote(job.stage)) or cause
    if reason is not None:
        raise Aborted(f"stage {job.stage}: {reason}. Run the same command again to go on from the last checkpoint")


def _fit(trainer: TorchTrainer) -> str | None:
    """Run it. Returns the last line of what went wrong, if something did."""
    try:
        trainer.fit()
    except TrainingFailedError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"failed too often; at last: {lines[-1].strip() if lines else error!r}"
    return None


class _Watching:
    """Polls the board in a thread and hands what is new to `progress`."""

    def __init__(self, job: StageJob, progress: Progress) -> None:
        import threading

        self.job, self.progress, self.stop = job, progress, threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        told = 0
        while True:
            last = self.stop.wait(0.5)
            notes = ray.get(self.job.board.since.remote(self.job.stage, told))
            told += len(notes)
            for note in notes:
                self.progress(self.job.stage, *note)
            if last:
                return

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def worker_loop(config: dict[str, Any]) -> None:
    """Body of one Ray Train worker. Imports here: the run's controller loads this module too, and needs no model library."""
    from trainer.worker import work

    work(config["job"])
