"""What a Ray Train worker does with one stage: resume, train, report, checkpoint, and at the end save the result."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device

from sdxs import registry
from sdxs.bundle import read_config
from sdxs.errors import SdxsError, Unavailable
from sdxs.settings import Settings
from trainer import loop
from trainer.artifacts import Artifacts, open_artifacts
from trainer.cluster import StageJob
from trainer.data.latent_cache import EncodedImages
from trainer.data.source import Captions
from trainer.disk import full_disk
from trainer.pairs import Pairs
from trainer.placement import Placement, world_size
from trainer.prompts import fetch_source
from trainer.real_images import encoded_images
from trainer.recipe import ControlNetRecipe, ControlRecipe, RunRecipe, StyleRecipe, TeacherRecipe, parse
from trainer.sources import hush, latent_shape, teacher_folder
from trainer.specs import TeacherSpec
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, NobodyToAsk, Teacher, TeacherClient
from trainer.tracking.observer import Observer, Timed
from trainer.triplets import learnt_from


def work(job: StageJob) -> None:
    """Build the stage, resume it, run it, and save its result.

    Ray starts the workers again when one fails. Where that cannot help (a loss that is not finite, a full disk, a bad recipe) the
    reason goes to the board first, and the workers that are started next end at once, however many there are.
    """
    if ray.get(job.board.stopped.remote(job.stage)) is not None:
        return
    try:
        _work(job)
    except Exception as error:
        reason = _final(error)
        if reason is None:
            raise
        ray.get(job.board.stop.remote(job.stage, reason))
        if world_size() > 1:
            raise


def _final(error: Exception) -> str | None:
    """Why to try again is of no use; None if it may be of some."""
    if isinstance(error, Unavailable):
        return None
    if isinstance(error, SdxsError):
        return str(error)
    full = full_disk(error)
    if full is not None:
        return f"no space left on {socket.gethostname()} for a checkpoint ({full.filename or tempfile.gettempdir()})"
    return None


def _work(job: StageJob) -> None:
    torch.set_num_threads(job.cluster.threads)
    os.environ.update(job.settings)
    with contextlib.suppress(OSError):  # another machine may not have it: then only addresses can be meant
        os.chdir(job.folder)  # Ray Train works in a folder of its own
    artifacts = open_artifacts(Settings())
    stage = build_stage(job, artifacts, get_device())
    first = ray.train.get_context().get_world_rank() == 0
    with tempfile.TemporaryDirectory() as scratch:
        curve = Path(scratch) / "log.jsonl"
        start = _restore(stage, curve)
        started = time.perf_counter()
        _train(stage, job, start, curve)
        result = Path(scratch) / "result"
        result.mkdir()
        stage.export(result)  # the workers gather the weights together
        if first:
            (result / "log.jsonl").write_bytes(curve.read_bytes())
            facts = {"stage": job.stage, "steps": stage.steps, "seconds": round(time.perf_counter() - started, 1)}
            artifacts.save(job.stage, job.digest, result, facts)


def build_stage(job: StageJob, artifacts: Artifacts, device: torch.device) -> loop.Stage:
    """The stage with its inputs fetched from the store."""
    hush()
    recipe = parse(job.recipe)
    assert not isinstance(recipe, TeacherRecipe)
    inputs = {name: artifacts.fetch(name, digest) for name, digest in job.inputs.items()}
    folder = teacher_folder(recipe.teacher)
    pairs, images = learnt_from(inputs)
    if isinstance(recipe, (StyleRecipe, ControlRecipe)):
        inputs["base"], _ = registry.open_model(recipe.base, Settings())
    if isinstance(recipe, ControlRecipe) and read_config(inputs["base"], "vae/config.json")["_class_name"] == "AutoencoderTiny":
        inputs["decoder"] = inputs["base"]
    if isinstance(recipe, (StyleRecipe, ControlNetRecipe)):
        pairs = pairs or _prompts_alone(recipe, folder, job.prompts)
    assert pairs is not None
    context = StageContext(
        recipe=recipe,
        teacher_folder=folder,
        teacher=Timed(job.client or _own_teacher(job.teacher, device)),
        pairs=pairs,
        inputs=inputs,
        placement=Placement.of(recipe.compute, device),
        images=_real_images(recipe, job.stage),
        sample_images=images,
    )
    return STAGES[job.stage](context)


def _real_images(recipe: RunRecipe, stage: str) -> EncodedImages | None:
    """Those that the recipe distils the U-Net on, encoded before."""
    if stage != "unet" or isinstance(recipe, (StyleRecipe, ControlNetRecipe)) or recipe.unet.images is None:
        return None
    return encoded_images(recipe.unet.images, recipe.teacher, Settings())


def _prompts_alone(recipe: StyleRecipe | ControlNetRecipe, folder: Path, prompts: str) -> Pairs:
    """Every prompt once with noise of its own, for a run that needs no samples."""
    captions = Captions(fetch_source(recipe, prompts, Settings()), "train")
    return Pairs.of_prompts(captions, latent_shape(folder), recipe.seed + 1)


def _own_teacher(spec: TeacherSpec | None, device: torch.device) -> TeacherClient:
    """A teacher on the worker's own device; none where the stage asks nobody."""
    return NobodyToAsk() if spec is None else InProcessTeacher(Teacher.load(spec, device))


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
    rank = ray.train.get_context().get_world_rank()
    observer = Observer(
        job, stage, open_artifacts(Settings()), lambda step, note: job.board.pin.remote(job.stage, step, stage.steps, note)
    )
    reported = start

    def report(step: int, metrics: loop.Metrics) -> None:
        nonlocal reported
        metrics, reported = observer.measured(step - reported, metrics), step
        latest.clear()
        latest.update(metrics)
        with curve.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in metrics.items()}}) + "\n")
        if rank == 0:
            note = {**metrics, "worker_pid": os.getpid(), "workers": world_size()}
            job.board.pin.remote(job.stage, step, stage.steps, note)

    def checkpoint(step: int) -> None:
        observer.picture(step)
        if step == stage.steps:
            return  # the result follows at once
        with tempfile.TemporaryDirectory() as folder:
            first = rank == 0
            loop.save_state(stage, step, Path(folder) / "state.pt", write=first)
            if first:
                (Path(folder) / "log.jsonl").write_bytes(curve.read_bytes())
                ray.train.report({"step": step, **latest}, checkpoint=Checkpoint.from_directory(folder))
            else:
                ray.train.report({"step": step, **latest})

    every = job.cluster.checkpoint_every
    loop.run(stage, start=start, report_every=10, checkpoint_every=every, report=report, checkpoint=checkpoint)
