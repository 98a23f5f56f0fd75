"""Runs one stage as a Ray Train TorchTrainer: checkpoints in the object store, resume, live progress, result as an artifact."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import loop
from trainer.artifacts import Artifacts
from trainer.pairs import Pairs
from trainer.pool import PoolClient
from trainer.recipe import DistillRecipe
from trainer.stages import STAGES
from trainer.stages.context import StageContext

Progress = Callable[[str, int, int, dict[str, float]], None]


@ray.remote(num_cpus=0)
class Board:
    """Where workers pin their latest metrics, for whoever watches the run."""

    def __init__(self) -> None:
        self.latest: dict[str, tuple[int, int, dict[str, float]]] = {}

    def pin(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.latest[stage] = (step, steps, metrics)

    def read(self) -> dict[str, tuple[int, int, dict[str, float]]]:
        return self.latest


@dataclass(frozen=True)
class Cluster:
    """How many training workers and what each gets; the science is in the recipe."""

    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
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
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
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
    """Body of one Ray Train worker."""
    import torch

    job: StageJob = config["job"]
    torch.set_num_threads(job.cluster.threads)
    context = ray.train.get_context()
    os.environ.update(job.settings)
    artifacts = Artifacts(open_store(Settings()), Path(job.cache))
    stage = build_stage(job, artifacts, context.get_world_rank())
    with tempfile.TemporaryDirectory() as scratch:
        curve = Path(scratch) / "log.jsonl"
        start = _restore(stage, curve)
        started = time.perf_counter()
        _train(stage, job, start, curve)
        if context.get_world_rank() == 0:
            result = Path(scratch) / "result"
            result.mkdir()
            stage.export(result)
            (result / "log.jsonl").write_bytes(curve.read_bytes())
            facts = {"stage": job.stage, "steps": stage.steps, "seconds": round(time.perf_counter() - started, 1)}
            artifacts.save(job.stage, job.digest, result, facts)
        stage.close()


def build_stage(job: StageJob, artifacts: Artifacts, rank: int) -> loop.Stage:
    """The stage with its inputs fetched from the store."""
    inputs = {name: artifacts.fetch(name, digest) for name, digest in job.inputs.items()}
    context = StageContext(
        recipe=DistillRecipe(**job.recipe),
        teacher_folder=Path(job.teacher_folder),
        teacher=job.client,
        pairs=Pairs.load(inputs["pairs"] / "pairs.safetensors"),
        inputs=inputs,
        rank=rank,
    )
    return STAGES[job.stage](context)


def _restore(stage: loop.Stage, curve: Path) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        curve.touch()
        return 0
    with checkpoint.as_directory() as folder:
        curve.write_bytes((Path(folder) / "log.jsonl").read_bytes())
        return loop.load_state(stage, Path(folder) / "state.pt")


def _train(stage: loop.Stage, job: StageJob, start: int, curve: Path) -> None:
    latest: dict[str, float] = {}

    def report(step: int, metrics: loop.Metrics) -> None:
        latest.clear()
        latest.update(metrics)
        with curve.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
        if ray.train.get_context().get_world_rank() == 0:
            job.board.pin.remote(job.stage, step, stage.steps, {**metrics, "worker_pid": os.getpid()})

    def checkpoint(step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if ray.train.get_context().get_world_rank() == 0:
                loop.save_state(stage, step, Path(folder) / "state.pt")
                (Path(folder) / "log.jsonl").write_bytes(curve.read_bytes())
                ray.train.report({"step": step, **latest}, checkpoint=Checkpoint.from_directory(folder))
            else:
                ray.train.report({"step": step, **latest})

    every = job.cluster.checkpoint_every
    loop.run(stage, start=start, report_every=10, checkpoint_every=every, report=report, checkpoint=checkpoint)
