"""Runs one stage as a Ray Train TorchTrainer: checkpoints in the object store, resume, live progress, result as an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from sdxs.settings import Settings
from trainer.pool import PoolClient

Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Cluster:
    """How many training workers and what each gets; the science is in the recipe."""

    workers: int = 1
    cpus_per_worker: float = 1.0
    threads: int = 1
    checkpoint_every: int = 100
    max_failures: int = 3


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to run one stage; plain data and actor handles only."""

    stage: str
    digest: str
    recipe: dict[str, Any]
    teacher_folder: str
    settings: dict[str, str]  # SDXS_* variables
    cache: str
    inputs: dict[str, str]  # upstream stage -> digest
    client: PoolClient
    board: Any
    cluster: Cluster = field(default_factory=Cluster)


def storage(settings: Settings) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray Train for the configured store."""
    url = urlparse(settings.store_url)
    if url.scheme == "file":
        return {"storage_path": f"{url.path}/checkpoints"}
    from pyarrow.fs import S3FileSystem

    filesystem = S3FileSystem(
        endpoint_override=settings.s3_endpoint,
        scheme="https" if settings.s3_secure else "http",
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
    )
    return {"storage_path": f"{url.netloc}{url.path.rstrip('/')}/checkpoints", "storage_filesystem": filesystem}


def run_stage(job: StageJob, settings: Settings, progress: Progress) -> None:
    """Run a stage to its end, restarting workers that die. A run of the same digest that was interrupted is resumed.

    Raises:
        RuntimeError: the stage failed more often than allowed; the cause is chained.
    """
    cluster = job.cluster
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=cluster.workers, resources_per_worker={"CPU": cluster.cpus_per_worker}),
        run_config=RunConfig(
            name=f"{job.stage}-{job.digest}",
            **storage(settings),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    with _Watching(job, progress):
        trainer.fit()


class _Watching:
    """Polls the board in a thread and hands what is new to `progress`."""

    def __init__(self, job: StageJob, progress: Progress) -> None:
        import threading

        self.job, self.progress, self.stop = job, progress, threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self.stop.wait(0.5):
            entry = ray.get(self.job.board.read.remote()).get(self.job.stage)
            if entry:
                self.progress(self.job.stage, *entry)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def worker_loop(config: dict[str, Any]) -> None:
    """Body of one Ray Train worker. Imports here: the run's controller loads this module too, and needs no model library."""
    from trainer.worker import work

    work(config["job"])
