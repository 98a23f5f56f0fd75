"""`sdxs train`: a recipe of either kind, from its file to its result. The composition root of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sdxs import bundle, registry
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer.artifacts import open_artifacts
from trainer.assemble import check_replaceable
from trainer.cluster import Cluster
from trainer.distill import Distillation
from trainer.evaluation.card import add_card
from trainer.evaluation.control import compare_controls
from trainer.evaluation.control_card import add_control_card
from trainer.evaluation.scoring import compare_recipe
from trainer.preflight.checks import check, check_world, in_file
from trainer.recipe import AnyRecipe, ControlNetRecipe, ControlRecipe, DistillRecipe, StyleRecipe, TeacherRecipe
from trainer.session import ray_session
from trainer.teacher_run import train_teacher
from trainer.tracking.progress import Bars
from trainer.tracking.sinks import sinks
from trainer.tracking.tracker import Tracker, told


def run_recipe(recipe: AnyRecipe, output: Path, cluster: Cluster, file: str) -> None:
    """Check a recipe, read from `file`, run it to the end and say where the result is."""
    console = Console()
    if isinstance(recipe, TeacherRecipe):
        with in_file(file):
            check_world(recipe.world)
        train_teacher(recipe, output)
        console.print(f"teacher{f' and judge of {recipe.world}' if recipe.world else ''}: {output}")
        return
    settings = Settings()
    check_replaceable(output)
    check(recipe, cluster, settings, file)
    run_folder = output.with_name(f"{output.name}.run")
    tracker = Tracker(run_folder, open_artifacts(settings), sinks(run_folder))
    with ray_session(), Bars(console) as bars:
        with in_file(file):
            distillation = Distillation(recipe, settings, cluster, told(tracker, bars))
            digests = {step.name: step.digest for step in distillation.plan()}
        with tracker.run(recipe, digests):
            result = distillation.run(output)
    assert result.bundle is not None
    if isinstance(recipe, ControlNetRecipe):
        console.print(f"ControlNet: {output}\nrun: {run_folder / 'index.html'}")
        return
    with console.status("evaluating") as status:
        _evaluate(result.bundle, recipe, settings, status.update)
    manifest = registry.publish(result.bundle, open_store(settings, "models"))
    console.print(f"bundle: {output}\nrun: {run_folder / 'index.html'}\npublished as {manifest.digest}")
    console.print(f"point a name at it:  sdxs models promote {manifest.name} {manifest.digest}")


def _evaluate(
    folder: Path, recipe: DistillRecipe | StyleRecipe | ControlRecipe, settings: Settings, progress: Callable[[str], None]
) -> None:
    """Score what a bundle's recipe has just made and write its card, sealed with it."""
    manifest = bundle.read(folder)
    if isinstance(recipe, ControlRecipe):
        controls = compare_controls(folder, manifest, recipe.control_name, recipe, settings)
        rows, judge = controls.timed(controls.scores(progress)), controls.comparison.judge
        accuracy = judge.accuracy if judge else None
        add_control_card(folder, recipe.control_name, recipe, rows, accuracy, controls.notes())
        return
    comparison = compare_recipe(folder, manifest, recipe, settings)
    rows, judge = comparison.timed(comparison.scores(progress)), comparison.judge
    add_card(folder, recipe, rows, judge.accuracy if judge else None, comparison.notes())
