"""An evaluation: who is compared, where their weights come from, what their images are measured against, and what cannot be measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from sdxs.bundle import Manifest
from sdxs.settings import Settings
from trainer.artifacts import Artifacts, open_artifacts
from trainer.evaluation.generators import (
    SEED,
    Captioned,
    Generate,
    Generators,
    Images,
    choose_captions,
    gflops,
    in_batches,
    latencies_ms,
    multi_step,
    reconstruct,
    served,
)
from trainer.evaluation.judge import Judge
from trainer.evaluation.metrics.base import ImageFeatures
from trainer.evaluation.metrics.diversity import diversity
from trainer.evaluation.metrics.latents import LatentFeatures
from trainer.evaluation.metrics.manifold import NEIGHBOURS
from trainer.evaluation.metrics.networks import Networks, distribution_scores
from trainer.evaluation.rows import Row
from trainer.models.judge import JudgeNet
from trainer.plan import offline_spec
from trainer.prompts import prompt_source
from trainer.recipe import DistillRecipe, StyleRecipe
from trainer.sections import EvaluationSection
from trainer.sources import ASSETS, hush, teacher_folder
from trainer.teacher import Teacher
from trainer.worlds.base import get_world

REFERENCE_SEED, DIVERSITY_SEED = SEED + 1_000_000, SEED + 2_000_000


def embedded_judge(world: str) -> Judge:
    """The judge that ships with a world."""
    folder = ASSETS / world / "judge"
    accuracy = json.loads((folder / "judge.json").read_text())["accuracy_on_real_renders"]
    return Judge(JudgeNet.load(folder), get_world(world), accuracy)


def students(bundle: Path, lineage: dict[str, str], artifacts: Artifacts) -> dict[str, Path]:
    """Folders of the student's U-Net after each stage, where the store still has them; the bundle itself is "final"."""
    folders = {}
    for row, stage in (("kd", "unet"), ("warmup", "warmup"), ("sdi", "diff_instruct")):
        digest = lineage.get(stage)
        if stage == "diff_instruct" and "finish" not in lineage:
            continue  # it is the bundle
        if digest and artifacts.facts(stage, digest) is not None:
            folders[row] = artifacts.fetch(stage, digest)
    return {**folders, "final": bundle}


@dataclass(frozen=True)
class Comparison:
    """Ways to make an image, in the order of the report, and what their images are measured by.

    With a `judge`, against the real images of its world. Without one, prompts are those of `prompts` and there are no real images: then
    distances are to the teacher's images of the same prompts from other noise, in the eyes of `networks`.
    """

    judge: Judge | None
    teacher: Teacher
    generators: dict[str, Generate]
    evaluation: EvaluationSection
    networks: Networks = field(default_factory=Networks)
    prompts: Captioned | None = None
    ceiling: bool = True  # a row of real images through the teacher's autoencoder

    @property
    def source(self) -> Captioned:
        """Of the captions."""
        source = self.judge.world if self.judge else self.prompts
        assert source is not None
        return source

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {"train": self.evaluation.train_images, "heldout": self.evaluation.heldout_images}

    def eyes(self) -> list[ImageFeatures]:
        """The networks at hand."""
        return [*([self.judge] if self.judge else []), *self.networks.all()]

    def scores(self, progress: Callable[[str], None]) -> list[Row]:
        """How good the images are; without latencies. `progress` is told what is being scored."""
        return [
            row
            for split, count in self.counts.items()
            if (captions := choose_captions(self.source, split, count))
            for row in Split(self, split, captions, progress).rows()
        ]

    def timed(self, rows: list[Row]) -> list[Row]:
        """The same rows with latencies and FLOPs; measured apart from the scores, when the machine is quiet."""
        caption = next(text for split in self.counts for text in self.source.captions(split))
        latencies, counted = latencies_ms(self.generators, caption), gflops(self.generators, caption)
        return [replace(row, latency_ms=latencies.get(row.row), gflop=counted.get(row.row)) for row in rows]

    def notes(self) -> list[str]:
        """What was measured by a makeshift, or could not be measured, and why; one sentence each."""
        found = [f"{split}: there are no such captions" for split in self.counts if not self.source.captions(split)]
        if min(self.counts.values()) <= NEIGHBOURS:
            found.append(f"precision and recall need more than {NEIGHBOURS} images of a split")
        return found if self.judge else found + self._notes_without_judge()

    def _notes_without_judge(self) -> list[str]:
        if not self.networks.all():
            unseen = "Frechet distance, KID, precision and recall were not measured: no judge knows these prompts, and no network was named"
            how = "name Inception's weights with --inception or a CLIP model with --clip"
            return [
                f"{unseen}; {how}",
                "diversity is of latents of the teacher's autoencoder, which see layout and colour only",
            ]
        found = [
            "distances are to the teacher's images of the same prompts from other noise; the teacher's own row is the floor"
        ]
        if self.networks.clip is None:
            found.append("how well images fit their prompts was not measured: that needs a CLIP model, --clip")
        return found


class Split:
    """The rows of one split: the same captions and noise for all."""

    def __init__(self, comparison: Comparison, split: str, captions: list[str], progress: Callable[[str], None]) -> None:
        self.of, self.split, self.captions, self.progress = comparison, split, captions, progress
        self.eyes = comparison.eyes()
        self.real = {network.name: network.features(self.reference) for network in self.eyes}

    @cached_property
    def reference(self) -> Images:
        """What the images are measured against."""
        return self._reference()

    def _reference(self) -> Images:
        """Real images, or the teacher's from other noise."""
        if self.of.judge:
            return self.of.judge.world.reference_images(self.captions)
        self.progress(f"{self.split} reference")
        return in_batches(multi_step(self.of.teacher, self.of.evaluation), self.captions, REFERENCE_SEED)

    def rows(self) -> list[Row]:
        found = []
        if self.of.judge and self.of.ceiling:
            self.progress(f"{self.split} vae")
            found.append(self.row("vae", reconstruct(self.of.teacher, self.reference), {}))
        for name, generate in self.of.generators.items():
            self.progress(f"{self.split} {name}")
            found.append(self.row(name, in_batches(generate, self.captions), self._diversity(generate)))
        return found

    def row(self, name: str, images: Images, diverse: dict[str, float]) -> Row:
        """The scores of images of the split's captions; `diverse` joins them."""
        scores: dict[str, float] = {}
        for network in self.eyes:
            scores |= distribution_scores(network, self.real[network.name], network.features(images))
        if self.of.networks.clip:
            scores["clip_score"] = round(self.of.networks.clip.score(images, self.captions), 3)
        scores |= diverse
        if not self.of.judge:
            return Row(None, self.split, name, None, None, None, None, len(images), scores=scores)
        judged, world = self.of.judge.score(images, self.captions), self.of.judge.world.name
        frechet = scores.pop("frechet_judge", judged.frechet)  # it has its own column
        top5 = None if judged.top5 is None else round(judged.top5, 4)
        row = Row(world, self.split, name, round(judged.top1, 4), top5, round(frechet, 4), None, len(images))
        return replace(row, scores=scores)

    def _diversity(self, generate: Generate) -> dict[str, float]:
        """In the eyes of each network; the same prompts and noise for every row."""
        prompts, each = list(dict.fromkeys(self.captions)), self.of.evaluation.diversity_images
        count = min(len(prompts), self.of.evaluation.diversity_prompts)
        chosen = [prompts[i * len(prompts) // count] for i in range(count)]
        if not chosen:
            return {}
        images = in_batches(generate, [prompt for prompt in chosen for _ in range(each)], DIVERSITY_SEED)
        found = {}
        for network in self.eyes or [LatentFeatures(self.of.teacher)]:
            features_PNF = network.features(images).reshape(count, each, -1)
            found[f"diversity_{network.name.lower()}"] = round(diversity(features_PNF), 4)
        return found


def with_recorded(rows: list[Row], recorded: list[Row]) -> list[Row]:
    """Rows in the order of the record, those that could not be measured now filled in from it and marked so."""

    def place(row: Row) -> tuple[str, str | None, str]:
        return row.split, row.condition, row.row

    measured, known = {place(row): row for row in rows}, {place(row) for row in recorded}
    filled = [measured.get(place(row), replace(row, recorded=True)) for row in recorded]
    return filled + [row for row in rows if place(row) not in known]


def compare(
    bundle: Path,
    manifest: Manifest,
    world: str,
    evaluation: EvaluationSection,
    artifacts: Artifacts,
    networks: Networks | None = None,
) -> Comparison:
    """The teacher, the student after each stage that the store still has, and the bundle. Sets this process to one thread, as served."""
    torch.set_num_threads(1)
    hush()
    teacher = Teacher(teacher_folder(manifest.lineage["teacher"]))
    made, folders = Generators(teacher, bundle, evaluation), students(bundle, manifest.lineage, artifacts)
    rows: dict[str, Generate] = {"teacher": made.multi_step_teacher()}
    if "kd" in folders:
        rows["kd"] = made.multi_step_student(folders["kd"])
        rows["naive"] = made.one_step(folders["kd"])
    rows |= {name: made.one_step(folders[name]) for name in ("warmup", "sdi", "final") if name in folders}
    return Comparison(embedded_judge(world), teacher, rows, evaluation, networks or Networks())


def compare_recipe(
    bundle: Path, manifest: Manifest, recipe: DistillRecipe | StyleRecipe, settings: Settings, networks: Networks | None = None
) -> Comparison:
    """A bundle beside its teacher, as its recipe has it.

    A world's on one CPU thread, as served. Of one's own prompts, and of a style (whose teacher carries the style's LoRA, and which no
    judge of real images can judge), the bundle and its teacher, on the GPU where there is one.
    """
    if isinstance(recipe, DistillRecipe) and recipe.world is not None:
        return compare(bundle, manifest, recipe.world, recipe.evaluation, open_artifacts(settings), networks)
    torch.set_num_threads(settings.torch_threads)
    hush()
    device = best_device()
    is_style = isinstance(recipe, StyleRecipe)
    teacher = (
        Teacher.load(offline_spec(recipe), device) if is_style else Teacher(teacher_folder(manifest.lineage["teacher"]), device)
    )
    rows: dict[str, Generate] = {"teacher": multi_step(teacher, recipe.evaluation), "final": served(bundle, manifest, device)}
    return Comparison(None, teacher, rows, recipe.evaluation, networks or Networks(), prompt_source(recipe, settings))


def best_device() -> str:
    """Where full-size networks are evaluated."""
    return "cuda" if torch.cuda.is_available() else "cpu"
