"""The bundle that a finished recipe becomes: the last networks, the teacher's text side, a one-step scheduler; float16 on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sdxs import bundle, registry
from sdxs.bundle import CONTROL_TYPES
from sdxs.errors import AlreadyExists
from sdxs.settings import Settings
from trainer.artifacts import Artifacts
from trainer.models.folders import conditioning_folders, slim, write_model_index, write_one_step_scheduler
from trainer.plan import Step
from trainer.recipe import ControlNetRecipe, ControlRecipe, DistillRecipe, RunRecipe, StyleRecipe, digest


def assemble(recipe: RunRecipe, plan: list[Step], teacher: Path, artifacts: Artifacts, output: Path) -> None:
    """Write and seal the bundle in `output`, whole or not at all; of a ControlNet's recipe the ControlNet's folder.

    Raises:
        AlreadyExists: `output` holds something that is not the like.
    """
    trained = [step for step in plan if not step.drawn]
    fetched = {step.name: artifacts.fetch(step.name, step.digest) for step in trained}
    last = fetched[trained[-1].name]
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    logs = "\n".join(f"# {step.name}\n" + (fetched[step.name] / "log.jsonl").read_text() for step in trained)
    lineage = {"teacher": recipe.teacher} | {step.name: step.digest for step in plan}
    if isinstance(recipe, ControlNetRecipe):
        _controlnet(recipe, last, logs, part)
    elif isinstance(recipe, ControlRecipe):
        _controlled(recipe, last, logs, lineage, part)
    else:
        for name, source in _sources(recipe, fetched, trained[-1].name, teacher).items():
            shutil.copytree(source, part / name)
        slim(part)
        _notes(recipe, logs, part)
        write_one_step_scheduler(teacher, part)
        write_model_index(part)
        bundle.seal(part, recipe.name, recipe_hash=digest(recipe), lineage=lineage)
    check_replaceable(output)
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)


def _notes(recipe: RunRecipe, logs: str, folder: Path) -> None:
    """How it was made, and the curves."""
    (folder / "training.txt").write_text(logs)
    (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1))


def _controlnet(recipe: ControlNetRecipe | ControlRecipe, trained: Path, logs: str, folder: Path) -> None:
    """A ControlNet's folder: the network in diffusers' format, and which conditions it knows."""
    shutil.copytree(trained / "controlnet", folder)
    slim(folder)
    (folder / CONTROL_TYPES).write_text(json.dumps(list(recipe.conditions)) + "\n")
    _notes(recipe, logs, folder)


def _controlled(recipe: ControlRecipe, trained: Path, logs: str, lineage: dict[str, str], part: Path) -> None:
    """The base's bundle with one more ControlNet, which has its own notes; one of the same name makes room."""
    base, manifest = registry.open_model(recipe.base, Settings())
    shutil.copytree(base, part, ignore=shutil.ignore_patterns(bundle.MANIFEST))
    _name_plain_controlnet(part)
    prefix = f"controlnet/{recipe.control_name}/"
    shutil.rmtree(part / prefix, ignore_errors=True)
    _controlnet(recipe, trained, logs, part / prefix)
    metrics, before = (
        {name: value for name, value in facts.items() if not name.startswith(prefix)}
        for facts in (manifest.metrics, manifest.lineage)
    )
    ours = {prefix + name: value for name, value in {**lineage, "base": manifest.digest}.items()}
    bundle.seal(part, recipe.name, recipe_hash=manifest.recipe_hash, metrics=metrics, lineage=before | ours)


def _name_plain_controlnet(folder: Path) -> None:
    """diffusers keeps a model's only ControlNet in `controlnet/` itself: beside others it is in a folder of the name it had."""
    plain = folder / "controlnet"
    if (plain / "config.json").is_file():
        plain.rename(folder / "controlnet.part")
        plain.mkdir()
        (folder / "controlnet.part").rename(plain / "controlnet")


def _sources(recipe: DistillRecipe | StyleRecipe, fetched: dict[str, Path], last: str, teacher: Path) -> dict[str, Path]:
    """Where each folder of the bundle comes from. A style's bundle is its base's with the LoRA folded in, and beside it."""
    if isinstance(recipe, StyleRecipe):
        base, _ = registry.open_model(recipe.base, Settings())
        found = {name: base / name for name in ("vae", *conditioning_folders(base))}
        return found | {"unet": fetched["style"] / "unet", "lora": fetched["style"] / "lora"}
    found = {name: teacher / name for name in conditioning_folders(teacher)}
    return found | {"unet": fetched[last] / "unet", "vae": fetched["decoder"] / "vae"}


def check_replaceable(output: Path) -> None:
    """Only an earlier bundle or ControlNet may be replaced. Raises AlreadyExists."""
    known = any((output / name).is_file() for name in (bundle.MANIFEST, CONTROL_TYPES))
    if output.exists() and not known and not (output.is_dir() and not any(output.iterdir())):
        raise AlreadyExists(f"output {str(output)!r} holds something that is not a bundle; name a new folder")
