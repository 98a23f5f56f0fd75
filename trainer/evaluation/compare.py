"""Bundles side by side: the same prompts and noise, scores, times, what differs in how they were made; one HTML page by itself."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image

from sdxs import registry
from sdxs.bundle import Manifest
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from trainer import recipe as recipes
from trainer.evaluation.generators import SEED, Generate, choose_captions, served
from trainer.evaluation.judge import Judge
from trainer.evaluation.metrics.networks import Networks
from trainer.evaluation.report import judged, machine
from trainer.evaluation.rows import Row, table
from trainer.evaluation.scoring import Comparison, best_device, embedded_judge
from trainer.plan import offline_spec
from trainer.prompts import prompt_source
from trainer.recipe import DistillRecipe, StyleRecipe
from trainer.sources import hush
from trainer.specs import TeacherSpec
from trainer.teacher import Teacher

SHOWN = 6  # prompts of each split on the page
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Bundle:
    """One of them. `label` is its name, with the beginning of its digest where another has the same."""

    label: str
    folder: Path
    manifest: Manifest

    def recipe(self) -> dict[str, Any]:
        """As data; empty where the bundle carries none."""
        path = self.folder / RECIPE
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
        return found


@dataclass(frozen=True)
class Shown:
    """Images of one prompt from one noise, uint8 (H, W, 3), one of each bundle."""

    split: str
    prompt: str
    seed: int
    images: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Match:
    """All that the page tells."""

    bundles: tuple[Bundle, ...]
    rows: list[Row]
    judge: Judge | None
    notes: list[str]
    shown: list[Shown]
    machine: dict[str, Any]

    def differences(self) -> list[tuple[str, list[str]]]:
        """Fields in which the recipes differ: name, value in each ("" where it has none)."""
        return _rows_of([flat(bundle.recipe()) for bundle in self.bundles], differing=True)

    def lineage(self) -> list[tuple[str, list[str]]]:
        """What each was made from: stage, digest in each."""
        return _rows_of([bundle.manifest.lineage for bundle in self.bundles], differing=False)


def _rows_of(tables: list[dict[str, str]], differing: bool) -> list[tuple[str, list[str]]]:
    """Name and value in each table, by name; only where they differ, if so asked."""
    names = sorted({name for table in tables for name in table})
    rows = [(name, [table.get(name, "") for table in tables]) for name in names]
    return [(name, values) for name, values in rows if not differing or len(set(values)) > 1]


def compare_bundles(
    models: Sequence[str], images: int | None, networks: Networks, settings: Settings, progress: Callable[[str], None]
) -> Match:
    """Score two or more on the prompts of the first one that carries a recipe.

    Raises:
        NotFound, InvalidRequest: a bundle is not there, two are the same, or none says what prompts it was made for.
    """
    torch.set_num_threads(settings.torch_threads)
    hush()
    bundles = _open(models, settings)
    comparison = _comparison(bundles, images, networks, settings)
    rows = comparison.timed(comparison.scores(progress))
    progress("pictures")
    return Match(bundles, rows, comparison.judge, comparison.notes(), _pictures(comparison), machine())


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested data as dotted names with their values as JSON; what is null counts as absent."""
    if isinstance(value, dict):
        return {key: text for part, inner in value.items() for key, text in flat(inner, f"{name}.{part}".lstrip(".")).items()}
    return {} if value is None else {name: json.dumps(value, ensure_ascii=False)}


def _open(models: Sequence[str], settings: Settings) -> tuple[Bundle, ...]:
    opened = [registry.open_model(model, settings) for model in models]
    manifests = [manifest for _, manifest in opened]
    for index, manifest in enumerate(manifests):
        same = [m.digest for m in manifests].index(manifest.digest)
        if same != index:
            raise InvalidRequest("model", models[index], f"another bundle than {models[same]}: both are {manifest.digest}")
    names = Counter(manifest.name for manifest in manifests)
    labels = [f"{m.name}@{m.digest[7:14]}" if names[m.name] > 1 else m.name for m in manifests]
    return tuple(Bundle(label, folder, manifest) for label, (folder, manifest) in zip(labels, opened, strict=True))


def _comparison(bundles: tuple[Bundle, ...], images: int | None, networks: Networks, settings: Settings) -> Comparison:
    """On one CPU thread where a world's judge looks, as served; else on the GPU where there is one."""
    recipe = _recipe(bundles)
    world = recipe.world if isinstance(recipe, DistillRecipe) else None
    device = "cpu" if world else best_device()
    evaluation = recipe.evaluation
    if images is not None:
        evaluation = evaluation.model_copy(update={"train_images": images, "heldout_images": images})
    spec = offline_spec(recipe) if isinstance(recipe, StyleRecipe) else TeacherSpec(recipe.teacher)
    rows: dict[str, Generate] = {bundle.label: served(bundle.folder, bundle.manifest, device) for bundle in bundles}
    judge, prompts = (embedded_judge(world), None) if world else (None, prompt_source(recipe, settings))
    return Comparison(judge, Teacher.load(spec, device), rows, evaluation, networks, prompts, ceiling=False)


def _recipe(bundles: tuple[Bundle, ...]) -> DistillRecipe | StyleRecipe:
    for bundle in bundles:
        if (bundle.folder / RECIPE).is_file():
            return recipes.of_bundle(bundle.folder)
    raise InvalidRequest("model", bundles[0].label, f"a bundle that carries {RECIPE}, which says what prompts to compare on")


def _pictures(comparison: Comparison) -> list[Shown]:
    found = []
    for split, count in comparison.counts.items():
        for number, prompt in enumerate(choose_captions(comparison.source, split, min(SHOWN, count))):
            seed = SEED + number
            images = tuple(generate([prompt], [seed])[0] for generate in comparison.generators.values())
            found.append(Shown(split, prompt, seed, images))
    return found


def write_page(match: Match, path: Path) -> None:
    """The page: one file, nothing loaded from elsewhere."""
    page = resources.files("trainer.evaluation.pages").joinpath("comparison.html.jinja").read_text(encoding="utf8")
    splits = {split: [row for row in match.rows if row.split == split] for split in ("train", "heldout")}
    text = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(page).render(
        match=match,
        tables={split: table([replace(row, split="") for row in rows]) for split, rows in splits.items() if rows},
        judged=judged(match.judge),
        address=address,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def address(image_HWC: np.ndarray) -> str:
    """An image as a data: address; without loss up to 256 pixels, as WebP of high quality above."""
    buffer, image = io.BytesIO(), Image.fromarray(image_HWC)
    if max(image.size) <= 256:
        image.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, "WEBP", quality=92)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
