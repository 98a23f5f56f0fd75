"""Runs one stage as a Ray Train TorchTrainer: checkpoints in the object store, resume, live progress, result as an artifact."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlparse

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from sdxs.errors import Aborted
from sdxs.settings import Settings
from trainer.cluster import StageJob
from trainer.data.files import s3_filesystem
from trainer.tracking.board import Note

LOG = logging.getLogger(__name__)
ATTEMPTS = 14  # of a request to S3, with pauses of up to 20 s between them: it may be away for minutes
Progress = Callable[[str, int, int, dict[str, float]], None]


def storage(settings: Settings) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray Train for the configured store of checkpoints."""
    url = urlparse(settings.place("checkpoints"))
    if url.scheme == "file":
        return {"storage_path": f"{url.path}/runs"}
    path = f"{url.netloc}{url.path.rstrip('/')}/runs"
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
        self.logged: set[str] = set()

    def _poll(self) -> None:
        told, last = 0, False
        while not last:
            last = self.stop.wait(0.5)
            try:
                notes = ray.get(self.job.board.since.remote(self.job.stage, told))
            except ray.exceptions.RayError:
                self._log_once("the board of stage %s cannot be read; training goes on")
                continue
            told += len(notes)
            for note in notes:
                self._tell(note)

    def _tell(self, note: Note) -> None:
        """Whatever a watcher raises, the next note is for it again."""
        try:
            self.progress(self.job.stage, *note)
        except Exception:
            self._log_once("whoever watches stage %s failed; training goes on")

    def _log_once(self, text: str) -> None:
        if text not in self.logged:
            LOG.error(text, self.job.stage, exc_info=sys.exc_info())
        self.logged.add(text)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def worker_loop(config: dict[str, Any]) -> None:
    """Body of one Ray Train worker. Imports here: the run's controller loads this module too, and needs no model library."""
    from trainer.worker import work

    work(config["job"])
