"""What a Ray Train worker does with one stage: resume, train, report, checkpoint, and at the end save the result."""

from __future__ import annotations

import json
import os
import tempfile
import time
from functools import reduce
from operator import add
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint

from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import loop
from trainer.artifacts import Artifacts
from trainer.launch import StageJob
from trainer.pairs import Pairs
from trainer.recipe import DistillRecipe
from trainer.stages import STAGES
from trainer.stages.context import StageContext


def work(job: StageJob) -> None:
    """Build the stage, resume it, run it, and save its result."""
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
    drawn = [Pairs.load(inputs[name] / "pairs.safetensors") for name in ("pairs", "compositions") if name in inputs]
    context = StageContext(
        recipe=DistillRecipe(**job.recipe),
        teacher_folder=Path(job.teacher_folder),
        teacher=job.client,
        pairs=reduce(add, drawn),
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
        if step == stage.steps:
            return  # the result follows at once
        with tempfile.TemporaryDirectory() as folder:
            if ray.train.get_context().get_world_rank() == 0:
                loop.save_state(stage, step, Path(folder) / "state.pt")
                (Path(folder) / "log.jsonl").write_bytes(curve.read_bytes())
                ray.train.report({"step": step, **latest}, checkpoint=Checkpoint.from_directory(folder))
            else:
                ray.train.report({"step": step, **latest})

    every = job.cluster.checkpoint_every
    loop.run(stage, start=start, report_every=10, checkpoint_every=every, report=report, checkpoint=checkpoint)
