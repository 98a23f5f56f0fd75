"""`sdxs train`: a recipe of either kind, from its file to its result. The composition root of training."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from sdxs import registry
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import teacher_stages
from trainer.distill import Distillation, ray_session
from trainer.launch import Cluster
from trainer.loop import run_local
from trainer.progress import Bars
from trainer.recipe import DistillRecipe, TeacherRecipe


def run_recipe(recipe: TeacherRecipe | DistillRecipe, output: Path, workers: int, teachers: int, gpus: float) -> None:
    """Run to the end and say where the result is."""
    console = Console()
    if isinstance(recipe, TeacherRecipe):
        train_teacher(recipe, output)
        console.print(f"teacher and judge of {recipe.world}: {output}")
        return
    settings = Settings()
    with ray_session(), Bars(console) as bars:
        cluster = Cluster(workers=workers, gpus_per_worker=gpus)
        result = Distillation(recipe, settings, cluster, bars, teachers).run(output)
    assert result.bundle is not None
    manifest = registry.publish(result.bundle, open_store(settings))
    console.print(f"bundle: {output}\npublished as {manifest.digest}")
    console.print(f"point a name at it:  sdxs models promote {manifest.name} {manifest.digest}")


def train_teacher(recipe: TeacherRecipe, output: Path) -> None:
    """Judge, autoencoder and denoiser, one after the other in this process; each resumes from its last checkpoint.

    Plain processes, not Ray: a teacher is given in a distillation, and this one is small.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in teacher_stages.ORDER:
        run_folder = output / "runs" / name
        run_local(teacher_stages.build(recipe, name, output), run_folder)
        for result in run_folder.iterdir():
            if result.is_dir():
                shutil.copytree(result, output / result.name, dirs_exist_ok=True)
