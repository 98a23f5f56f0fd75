"""What a recipe has to do, in order: each step's inputs, who answers its requests, and the digest its result is found by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from trainer.recipe import ControlNetRecipe, ControlRecipe, DistillRecipe, RunRecipe, StyleRecipe, digest
from trainer.sections import LoraSection, PairsSection, SampleImagesSection, Section
from trainer.sources import controlnet_folder, teacher_digest, teacher_folder
from trainer.specs import TeacherSpec

REVISION = 3  # raised when a stage's code changes what it computes, so that old results are not taken for new ones
DRAWN = ("samples", "pairs", "compositions", "controlled")
"""Steps that are pairs."""
IMAGES = ("images", "controlled_images")
"""Steps that are the images of pairs."""


@dataclass(frozen=True)
class Step:
    """One artifact, drawn from the teacher (a `PairsSection`) or trained.

    `reads` names earlier steps. `teacher` is None where nobody is asked."""

    name: str
    section: Section
    reads: tuple[str, ...]
    teacher: TeacherSpec | None
    digest: str = ""

    @property
    def drawn(self) -> bool:
        return isinstance(self.section, (PairsSection, SampleImagesSection))


def steps(recipe: RunRecipe) -> list[Step]:
    """All steps of a recipe in topological order, without digests."""
    if isinstance(recipe, ControlNetRecipe):
        return [Step("controlnet", recipe.controlnet, (), _teacher(recipe) if recipe.controlnet.images else None)]
    if isinstance(recipe, ControlRecipe):
        return _control_steps(recipe)
    return _style_steps(recipe) if isinstance(recipe, StyleRecipe) else _distill_steps(recipe)


def offline_spec(recipe: DistillRecipe | StyleRecipe | ControlRecipe) -> TeacherSpec:
    """Who gives the offline score: the teacher, or what the recipe names instead; with the style's LoRA, which goes nowhere else, or with
    the ControlNet that is distilled."""
    teacher = _teacher(recipe)
    if isinstance(recipe, ControlRecipe):
        return replace(teacher, controlnet=recipe.controlnet)
    if isinstance(recipe, StyleRecipe):
        return replace(teacher, lora=recipe.style)
    offline = recipe.offline
    return replace(teacher, source=offline.teacher or recipe.teacher, lora=offline.lora) if offline else teacher


def _teacher(recipe: RunRecipe) -> TeacherSpec:
    return TeacherSpec(recipe.teacher, recipe.compute.teacher_precision, embeddings=recipe.compute.embeddings)


def _drawing(recipe: RunRecipe, section: PairsSection) -> TeacherSpec:
    """Who draws samples: the teacher, or what their section names instead."""
    return replace(_teacher(recipe), source=section.teacher or recipe.teacher)


def _distill_steps(recipe: DistillRecipe) -> list[Step]:
    teacher = _teacher(recipe)
    found: list[Step] = []
    straightened: tuple[str, ...] = ()
    if recipe.straighten is not None:
        found = [
            Step("samples", recipe.straighten.samples, (), _drawing(recipe, recipe.straighten.samples)),
            Step("straighten", recipe.straighten, ("samples",), teacher),
        ]
        straightened = ("straighten",)
    drawn = {"pairs": recipe.pairs} | ({"compositions": recipe.compositions} if recipe.compositions else {})
    for name, section in drawn.items():
        found.append(Step(name, section, straightened, _drawing(recipe, section)))
    samples, chain = tuple(drawn), "unet"
    found += [Step("decoder", recipe.decoder, samples, teacher), Step("unet", recipe.unet, samples, teacher)]
    for name in ("warmup", "diff_instruct", "finish"):
        section = getattr(recipe, name)
        if section is None:
            continue
        pixels = ("decoder",) if section.encoder != "unet" else ()
        found.append(Step(name, section, (*samples, chain, *pixels), offline_spec(recipe) if name == "diff_instruct" else None))
        chain = name
    return found


def _style_steps(recipe: StyleRecipe) -> list[Step]:
    drawn = [Step("pairs", recipe.pairs, (), _drawing(recipe, recipe.pairs))] if recipe.pairs else []
    return [*drawn, Step("style", recipe.lora, tuple(step.name for step in drawn), offline_spec(recipe))]


def _control_steps(recipe: ControlRecipe) -> list[Step]:
    teacher = _teacher(recipe)
    drawn = {"pairs": recipe.pairs} | ({"compositions": recipe.compositions} if recipe.compositions else {})
    samples = tuple(drawn)
    found = [Step(name, section, (), _drawing(recipe, section)) for name, section in drawn.items()]
    found += [Step("images", recipe.images, samples, teacher), Step("unet", recipe.unet, samples, teacher)]
    triplets = (*samples, "images")
    if recipe.controlled is not None:
        found.append(Step("controlled", recipe.controlled, triplets, offline_spec(recipe)))
        found.append(Step("controlled_images", recipe.images, ("controlled",), teacher))
        triplets = ("controlled", "controlled_images")
    found.append(Step("control_shrink", recipe.shrink, (*triplets, "unet"), offline_spec(recipe)))
    chain = "control_shrink"
    if recipe.warmup is not None:
        found.append(Step("control_warmup", recipe.warmup, (*triplets, chain), None))
        chain = "control_warmup"
    if recipe.diff_instruct is not None:
        found.append(Step("control_diff_instruct", recipe.diff_instruct, (*triplets, chain), offline_spec(recipe)))
    return found


def dated(plan: list[Step], facts: Callable[[Step], dict[str, Any]], spread: Callable[[Section], Any]) -> list[Step]:
    """The steps with their digests: of facts about the run, their section, who answers them, and the results they read.

    Args:
        facts: what else of the run shapes a step's result.
        spread: what of the cluster changes a stage's result (its workers, where the recipe does not fix the micro-batch).
    """
    found: dict[str, Step] = {}
    for step in plan:
        reads = {name: found[name].digest for name in step.reads}
        parts = [facts(step), step.name, digest(step.section), step.teacher and spec_digest(step.teacher), reads]
        teacher = step.teacher
        if teacher is not None and step.drawn and "straighten" in reads:
            teacher = replace(teacher, straightened=reads["straighten"])
        found[step.name] = replace(step, teacher=teacher, digest=digest([*parts, None if step.drawn else spread(step.section)]))
    return list(found.values())


@cache
def source_digest(source: str) -> str:
    """Digest of the networks a source names."""
    return teacher_digest(teacher_folder(source))


def spec_digest(spec: TeacherSpec) -> str:
    """Digest of who answers: the networks' contents, not where they lie."""
    parts = [source_digest(spec.source), spec.precision, spec.lora and lora_digest(spec.lora)]
    return digest([*parts, controlnet_digest(spec.controlnet)] if spec.controlnet else parts)


@cache
def controlnet_digest(source: str) -> str:
    """Digest of the ControlNet a source names."""
    folder = controlnet_folder(source)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])


def lora_digest(lora: LoraSection) -> list[Any]:
    """Contents and scale of a LoRA."""
    path = Path(lora.path)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return [lora.scale, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]]
