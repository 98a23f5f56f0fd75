"""How well one step with a small ControlNet does what control images say, beside the teacher with the ControlNet that was distilled."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdxs import control
from sdxs.bundle import Manifest
from sdxs.settings import Settings
from trainer.artifacts import Artifacts, open_artifacts
from trainer.conditions import condition_map
from trainer.evaluation.generators import (
    BATCH,
    SEED,
    Controllable,
    Generate,
    Images,
    choose_captions,
    gflops,
    latencies_ms,
    multi_step,
    served,
)
from trainer.evaluation.metrics.edges import colour_error, mean_edge_f1
from trainer.evaluation.metrics.networks import Networks
from trainer.evaluation.report import contact_sheet
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import Comparison, Split, best_device, embedded_judge
from trainer.plan import offline_spec
from trainer.prompts import prompt_source
from trainer.recipe import ControlRecipe
from trainer.sources import hush
from trainer.teacher import Teacher
from trainer.warps import warped

TEACHER, STUDENT = "teacher+control", "final+control"
BENT = "bent images"  # a row: what can be reached
MAP_REPEATS = 30  # maps timed; the median is told


@dataclass(frozen=True)
class Way:
    """One way to make images, and whether it is shown the control images."""

    generate: Controllable
    controlled: bool

    def images(self, captions: list[str], map_NHWC: Images, first: int = SEED) -> Images:
        """Of all captions, in batches; image i has seed `first` + i."""
        parts = []
        for i in range(0, len(captions), BATCH):
            rows = slice(i, min(i + BATCH, len(captions)))
            parts.append(self.bound(map_NHWC[rows])(captions[rows], list(range(first + i, first + rows.stop))))
        return np.concatenate(parts)

    def bound(self, map_NHWC: Images) -> Generate:
        """With these control images, if it is shown any."""
        return lambda captions, seeds: self.generate(captions, seeds, map_NHWC if self.controlled else None)


def maps_of(image_NHWC: Images, captions: Sequence[str], kind: str) -> Images:
    """Control images of one kind. A caption's sketch is drawn with the same strokes every time."""
    rngs = map(_rng, captions)
    return np.stack([condition_map(image, kind, rng) for image, rng in zip(image_NHWC, rngs, strict=True)])


def _rng(caption: str) -> np.random.Generator:
    """The same for a caption whenever it is asked for."""
    return np.random.default_rng([SEED, zlib.crc32(caption.encode())])


class BentSplit(Split):
    """Measured against images that are bent, each in one way, so that a control image says what its caption does not."""

    def _reference(self) -> Images:
        bent = [
            warped(image, _rng(caption), self.of.evaluation.warp)
            for image, caption in zip(super()._reference(), self.captions, strict=True)
        ]
        return np.stack(bent)


def faithfulness(image_NHWC: Images, map_NHWC: Images, kind: str) -> dict[str, float]:
    """How closely images keep to control images of a kind. Empty for a kind that neither edges nor colours can tell of."""
    if kind == "colour":
        return {"colour_error": round(colour_error(image_NHWC, map_NHWC), 2)}
    return {"edge_f1": round(mean_edge_f1(image_NHWC, map_NHWC), 4)} if kind in ("edge", "sketch", "lineart") else {}


@dataclass(frozen=True)
class ControlComparison:
    """Ways to make an image with and without control images, all judged against the same ones.

    Control images are extracted from what `comparison` measures against: real images of a world, or the teacher's samples of the prompts.
    `missing` says which ways are gone.
    """

    comparison: Comparison
    ways: dict[str, Way]
    conditions: tuple[str, ...]
    missing: list[str] = field(default_factory=list)

    def scores(self, progress: Callable[[str], None]) -> list[Row]:
        """All rows without their times. What sees no control image is generated once and judged against those of each condition."""
        rows: list[Row] = []
        for split, count in self.comparison.counts.items():
            captions = choose_captions(self.comparison.source, split, count)
            if captions:
                rows += self._of_split(Split(self.comparison, split, captions, progress))
        if self.comparison.evaluation.warp:
            rows += self._of_split(self._unseen(self.comparison.counts, progress))
        return rows

    def _unseen(self, counts: dict[str, int], progress: Callable[[str], None]) -> Split:
        """Captions that were held out, else others; their images bent, where the recipe bends them."""
        split = "heldout" if self.comparison.source.captions("heldout") else "train"
        captions = choose_captions(self.comparison.source, split, counts[split])
        if self.comparison.evaluation.warp:
            return BentSplit(self.comparison, f"{split}-bent", captions, progress)
        return Split(self.comparison, split, captions, progress)

    def sheet(self, count: int, seeds: Sequence[int] = (0, 1, 2)) -> Image.Image:
        """The conditions in turn: control image, teacher and one step with it, one step without."""
        split = self._unseen(dict.fromkeys(self.comparison.counts, count), lambda _: None)
        captions, images = split.captions, split.reference
        kinds = [self.conditions[i % len(self.conditions)] for i in range(len(captions))]
        map_NHWC = np.concatenate([maps_of(images[i : i + 1], captions[i : i + 1], kind) for i, kind in enumerate(kinds)])
        columns = {"real image" if self.comparison.judge else "sample": images, "control image": map_NHWC}
        columns |= pictures(self.ways, captions, map_NHWC, seeds)
        return contact_sheet(columns, [f"{caption} ({kind})" for caption, kind in zip(captions, kinds, strict=True)])

    def _of_split(self, split: Split) -> list[Row]:
        blank = np.zeros_like(split.reference)
        free: dict[str, tuple[Images, Row]] = {}
        for name, way in self.ways.items():
            if not way.controlled:
                split.progress(f"{split.split} {name}")
                images = way.images(split.captions, blank)
                free[name] = images, _plain(split.row(name, images, {}))
        names = list(self.ways)
        if isinstance(split, BentSplit):
            free[BENT] = split.reference, _plain(split.row(BENT, split.reference, {}))
            names.insert(0, BENT)
        found = []
        for kind in self.conditions:
            map_NHWC = maps_of(split.reference, split.captions, kind)
            for name in names:
                if name in free:
                    images, row = free[name]
                else:
                    split.progress(f"{split.split} {kind} {name}")
                    images = self.ways[name].images(split.captions, map_NHWC)
                    row = _plain(split.row(name, images, {}))
                found.append(replace(row, condition=kind, scores={**row.scores, **faithfulness(images, map_NHWC, kind)}))
        return found

    def timed(self, rows: list[Row]) -> list[Row]:
        """The same rows with times at batch 1, FLOPs, and how many times faster than the controlled teacher they are. A map's extraction
        is timed apart and added in a column of its own."""
        caption, image = self._one()
        bound = {name: way.bound(maps_of(image, [caption], self.conditions[0])) for name, way in self.ways.items()}
        latencies, counted = latencies_ms(bound, caption), gflops(bound, caption)
        extraction = {kind: map_ms(image[0], kind) for kind in self.conditions}
        found = []
        for row in rows:
            if row.row not in latencies:
                found.append(row)
                continue
            ms, scores = latencies[row.row], dict(row.scores)
            if self.ways[row.row].controlled and row.condition:
                scores["ms_with_map"] = round(ms + extraction[row.condition], 2)
            if TEACHER in latencies:
                scores["times_faster"] = round(latencies[TEACHER] / ms, 2)
            found.append(replace(row, latency_ms=ms, gflop=counted[row.row], scores=scores))
        return found

    def _one(self) -> tuple[str, Images]:
        """A caption and its reference image, shape (1, H, W, 3)."""
        split = next(name for name in self.comparison.counts if self.comparison.source.captions(name))
        captions = choose_captions(self.comparison.source, split, 1)
        return captions[0], Split(replace(self.comparison, networks=Networks()), split, captions, lambda _: None).reference

    def notes(self) -> list[str]:
        """What was not measured, and why; one sentence each."""
        found = [note for note in self.comparison.notes() if "precision" not in note and "diversity" not in note]
        if self.comparison.judge is None:
            found.append("control images were extracted from the teacher's samples of the prompts")
            found.append("whether an image shows its prompt was not measured: there is no judge")
        return [*found, *self.missing]


def _plain(row: Row) -> Row:
    """Without what says little of control: the table is wide as it is."""
    return replace(row, scores={k: v for k, v in row.scores.items() if k.startswith("frechet") or k == "clip_score"})


def map_ms(image_HWC: Images, kind: str) -> float:
    """Median milliseconds that extracting one map takes."""
    times = []
    for _ in range(MAP_REPEATS):
        start = time.perf_counter()
        control.extract(image_HWC, kind, image_HWC.shape[0])
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def compare_controls(
    bundle: Path, manifest: Manifest, name: str, recipe: ControlRecipe, settings: Settings, networks: Networks | None = None
) -> ControlComparison:
    """The ControlNet `name` of a bundle, made by `recipe`, beside the teacher's. A world's on one CPU thread, as it is served; of one's own
    prompts on the GPU where there is one."""
    device = "cpu" if recipe.world else best_device()
    torch.set_num_threads(1 if recipe.world else settings.torch_threads)
    hush()
    teacher = Teacher.load(offline_spec(recipe), device)
    judge = embedded_judge(recipe.world) if recipe.world else None
    prompts = None if recipe.world else prompt_source(recipe, settings)
    comparison = Comparison(judge, teacher, {}, recipe.evaluation, networks or Networks(), prompts, ceiling=False)
    steps = multi_step(teacher, recipe.evaluation)
    ways = {"teacher": Way(steps, False), TEACHER: Way(steps, True)}
    made = partial(served, bundle, manifest, device)
    ways["final"] = Way(made(), False)
    warmed, missing = _warmed(manifest.lineage, name, open_artifacts(settings))
    if warmed is not None:
        ways["warmup+control"] = Way(made(warmed / "controlnet"), True)
    ways[STUDENT] = Way(made(bundle / "controlnet" / name), True)
    return ControlComparison(comparison, ways, recipe.conditions, missing)


def _warmed(lineage: dict[str, str], name: str, artifacts: Artifacts) -> tuple[Path | None, list[str]]:
    """The ControlNet after its warm-up, where the store has it and more came after it; and what is to be said if it is gone."""
    stages = {stage: lineage.get(f"controlnet/{name}/{stage}") for stage in ("control_warmup", "control_diff_instruct")}
    digest = stages["control_warmup"]
    if not digest or not stages["control_diff_instruct"]:
        return None, []
    if artifacts.facts("control_warmup", digest) is None:
        return None, [f"warmup+control was not measured: the store no longer has control_warmup {digest}"]
    return artifacts.fetch("control_warmup", digest), []


def shares(rows: list[Row]) -> list[str]:
    """What the one step keeps of the controlled teacher's scores, one sentence for each split and condition that has both."""
    by_name = {(row.split, row.condition, row.row): row for row in rows}
    found = []
    for split, condition in dict.fromkeys((row.split, row.condition) for row in rows):
        teacher, student = (by_name.get((split, condition, name)) for name in (TEACHER, STUDENT))
        if teacher is None or student is None:
            continue
        words = []
        for heading, theirs, ours in (
            ("edge F1", teacher.scores.get("edge_f1"), student.scores.get("edge_f1")),
            ("top-5", teacher.top5, student.top5),
            ("top-1", None if teacher.top5 is not None else teacher.top1, student.top1),
        ):
            if theirs and ours is not None:
                words.append(f"{ours / theirs:.1%} of its {heading}")
        if "times_faster" in student.scores:
            words.append(f"{student.scores['times_faster']:.1f} times as fast")
        if words:
            found.append(f"{split}, {condition}: beside the teacher with its ControlNet, one step has {', '.join(words)}")
    return found


def pictures(ways: dict[str, Way], captions: list[str], map_NHWC: Images, seeds: Sequence[int]) -> dict[str, Images]:
    """Columns of a sheet: the controlled teacher and student from each seed, and the student without control images from the first."""
    chosen = [*product((TEACHER, STUDENT), seeds), ("final", seeds[0])]
    titles = {TEACHER: "teacher, control", STUDENT: "one step, control", "final": "one step, none"}
    found = {}
    for name, seed in chosen:
        generate = ways[name].bound(map_NHWC)
        found[f"{titles[name]},\nseed {seed}"] = generate(captions, [seed] * len(captions))
    return found
