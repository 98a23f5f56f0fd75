"""The bundle that a finished recipe becomes: the last networks, the teacher's text side, a one-step scheduler; float16 on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdxs import bundle, registry
from sdxs.errors import AlreadyExists
from sdxs.settings import Settings
from trainer.artifacts import Artifacts
from trainer.models.folders import conditioning_folders, slim, write_model_index, write_one_step_scheduler
from trainer.plan import Step
from trainer.recipe import DistillRecipe, StyleRecipe, digest


def assemble(recipe: DistillRecipe | StyleRecipe, plan: list[Step], teacher: Path, artifacts: Artifacts, output: Path) -> None:
    """Write and seal the bundle in `output`, whole or not at all.

    Raises:
        AlreadyExists: `output` holds something that is not a bundle.
    """
    trained = [step for step in plan if not step.drawn]
    fetched = {step.name: artifacts.fetch(step.name, step.digest) for step in trained}
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name, source in _sources(recipe, fetched, trained[-1].name, teacher).items():
        shutil.copytree(source, part / name)
    slim(part)
    logs = [f"# {step.name}\n" + (fetched[step.name] / "log.jsonl").read_text() for step in trained]
    (part / "training.txt").write_text("\n".join(logs))
    (part / "recipe.json").write_text(recipe.model_dump_json(indent=1))
    write_one_step_scheduler(teacher, part)
    write_model_index(part)
    lineage = {"teacher": recipe.teacher} | {step.name: step.digest for step in plan}
    bundle.seal(part, recipe.name, recipe_hash=digest(recipe), lineage=lineage)
    check_replaceable(output)
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)


def _sources(recipe: DistillRecipe | StyleRecipe, fetched: dict[str, Path], last: str, teacher: Path) -> dict[str, Path]:
    """Where each folder of the bundle comes from. A style's bundle is its base's with the LoRA folded in, and beside it."""
    if isinstance(recipe, StyleRecipe):
        base, _ = registry.open_model(recipe.base, Settings())
        found = {name: base / name for name in ("vae", *conditioning_folders(base))}
        return found | {"unet": fetched["style"] / "unet", "lora": fetched["style"] / "lora"}
    found = {name: teacher / name for name in conditioning_folders(teacher)}
    return found | {"unet": fetched[last] / "unet", "vae": fetched["decoder"] / "vae"}


def check_replaceable(output: Path) -> None:
    """Only an earlier bundle may be replaced. Raises AlreadyExists."""
    if output.exists() and not (output / "bundle.json").is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise AlreadyExists(f"output {str(output)!r} holds something that is not a bundle; name a new folder")
