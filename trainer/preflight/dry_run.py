"""`sdxs train --dry-run`: what a recipe costs, and the proof that it runs: every stage, small, in this process, to a bundle that paints.

No Ray, no GPU, no download: of a teacher that is not on this machine the published shapes are taken.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from sdxs.control import Control, map_of
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from trainer import loop
from trainer.artifacts import open_artifacts
from trainer.assemble import assemble
from trainer.cluster import Cluster, StageJob
from trainer.distill import Distillation
from trainer.plan import Step
from trainer.preflight.checks import check, check_world, in_file
from trainer.preflight.cost import costs
from trainer.preflight.cost_table import tables
from trainer.preflight.given import Recipe, absent
from trainer.preflight.networks import Networks
from trainer.preflight.small import BATCH, STEPS, WORLD, small_recipe
from trainer.real_images import encode_images
from trainer.recipe import AnyRecipe, ControlNetRecipe, ControlRecipe, TeacherRecipe
from trainer.sections import ControlNetSection
from trainer.sources import hush, latent_shape
from trainer.teacher import Decode, InProcessTeacher, Sample, Teacher, image_size
from trainer.teacher_run import train_teacher
from trainer.triplets import pixels
from trainer.worker import build_stage
from trainer.worlds.base import get_world

PROMPT, DRAWN = "a red circle", "a large red star at the left on white"
Tell = Callable[[str], None]


def dry_run(recipe: AnyRecipe, cluster: Cluster, file: str, console: Console) -> None:
    """Check the recipe, print its costs, run it small.

    Raises:
        InvalidRequest, NotFound: what is wrong with it.
    """
    hush()
    if isinstance(recipe, TeacherRecipe):
        with in_file(file):
            check_world(recipe.world)
        with tempfile.TemporaryDirectory(prefix="sdxs-dry-run-") as scratch:
            rehearse_teacher(recipe, Path(scratch))
        console.print("every stage ran for two steps; what a teacher costs is not estimated")
        return
    cluster = _with_gpus(recipe, cluster, console)
    teacher = check(recipe, cluster, Settings(), file, fetch=False)
    if teacher.folder is None:
        console.print(f"teacher {teacher.source}: not on this machine; its shapes as published, its files unchecked")
    for field, path in absent(recipe):
        console.print(f"{field}: {path} is not on this machine; needed when the run starts")
    console.print(tables(costs(recipe, cluster, Networks(recipe, teacher)), recipe.compute, cluster))
    with tempfile.TemporaryDirectory(prefix="sdxs-dry-run-") as scratch:
        image = rehearse(recipe, Path(scratch), console.print)
    painter = "the teacher with its ControlNet" if isinstance(recipe, ControlNetRecipe) else "the bundle"
    console.print(f"every stage ran on random small weights; {painter} painted {image.shape[1]}x{image.shape[0]} pixels")


def _with_gpus(recipe: Recipe, cluster: Cluster, console: Console) -> Cluster:
    """The cluster, with a GPU each where the recipe cannot do without and none was asked for: a dry run takes none."""
    compute = recipe.compute
    if cluster.gpus_per_worker or (compute.precision, compute.teacher_precision) == ("float32", "float32"):
        return cluster
    console.print("counted for one GPU a worker and one a teacher; name others with --gpus-per-worker and --gpus-per-teacher")
    return replace(cluster, gpus_per_worker=1, gpus_per_teacher=cluster.gpus_per_teacher or 1)


def rehearse_teacher(recipe: TeacherRecipe, folder: Path) -> Path:
    """Run the stages of a teacher's own recipe for two steps under `folder`. Returns the teacher's folder."""
    few = {"steps": STEPS, "batch": BATCH, "warmup": 0, "restarts": None}
    names = ("judge", "autoencoder", "denoiser")
    small = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=few) for name in names})
    denoiser = small.denoiser.model_copy(update={"views": 1})
    train_teacher(small.model_copy(update={"denoiser": denoiser}), folder)
    return folder / "teacher"


def rehearse(recipe: Recipe, folder: Path, tell: Tell) -> np.ndarray:
    """Run a recipe small, in this process, under `folder`. Returns an image of its result, uint8 (H, W, 3); of a ControlNet's one that
    follows a control image."""
    small = small_recipe(recipe, folder)
    elsewhere = dict.fromkeys(("models_url", "checkpoints_url", "artifacts_url", "datasets_url"), "")
    settings = Settings(store_url=f"file://{folder}/store", cache_dir=folder / "cache", **elsewhere)
    with environment(settings.environment()):
        run = Distillation(small, settings, Cluster(teachers=0), lambda *_: None)
        plan = run.plan()
        for step in plan:
            _draw(run, step) if step.drawn else _train(run, step, tell)
        assemble(small, plan, run.folder, open_artifacts(settings), folder / "bundle")
        if isinstance(small, ControlNetRecipe):
            return _teacher_paints(run.folder, folder / "bundle", small.conditions[0])
        pipeline = OneStepPipeline.from_bundle(folder / "bundle", settings)
        controls = [_drawing(small.conditions[0], small.control_name)] if isinstance(small, ControlRecipe) else []
        return np.asarray(pipeline(PROMPT, 0, controls=controls)[0])


def _drawing(kind: str, controlnet: str) -> Control:
    """An image to follow."""
    canvas = io.BytesIO()
    Image.fromarray(get_world(WORLD).reference_images([DRAWN])[0]).save(canvas, "PNG")
    return Control(canvas.getvalue(), type=kind, controlnet=controlnet)


def _teacher_paints(teacher: Path, controlnet: Path, kind: str) -> np.ndarray:
    """A sample of the teacher with a ControlNet."""
    loaded = Teacher(teacher)
    loaded.attach(controlnet)
    latent, size = latent_shape(teacher), image_size(loaded.unet.config, loaded.vae.config)
    map_HWC = map_of(_drawing(kind, ""), size, "control")
    asked = Sample(latent_noise(0, latent)[None], [PROMPT], STEPS, 2.0, "ddim", map_HWC[None])
    [latent_BCHW] = loaded.answer(asked)
    image: np.ndarray = pixels(loaded.answer(Decode(latent_BCHW))[0])[0]
    return image


def _draw(run: Distillation, step: Step) -> None:
    assert step.teacher is not None
    client = InProcessTeacher(Teacher.load(step.teacher))
    run.draw(step, client)


def _train(run: Distillation, step: Step, tell: Tell) -> None:
    """As a worker does, without Ray."""
    if isinstance(step.section, ControlNetSection) and step.section.images is not None:
        client = InProcessTeacher(Teacher(run.folder))
        encode_images(step.section.images, run.recipe.teacher, client, run.settings, lambda _: None)
    job = StageJob(
        stage=step.name, digest=step.digest, recipe=run.recipe.model_dump(mode="json"), prompts=run.prompts.digest, settings={},
        inputs={name: run.result.digests[name] for name in step.reads}, teacher=step.teacher, client=None, board=None,
        cluster=run.cluster,
    )  # fmt: skip
    stage = build_stage(job, run.artifacts, torch.device("cpu"))
    losses: list[float] = []
    loop.run(stage, report_every=1, report=lambda _, metrics: losses.append(metrics["loss"]), checkpoint=lambda _: None)
    with tempfile.TemporaryDirectory() as scratch:
        stage.export(Path(scratch))
        (Path(scratch) / "log.jsonl").touch()
        run.artifacts.save(step.name, step.digest, Path(scratch), {"stage": step.name, "steps": stage.steps})
    tell(f"{step.name:14} {stage.steps} steps, loss {', '.join(f'{loss:.3f}' for loss in losses)}")


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables of this process for a while: some parts of a run find the store by them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
