"""The paper's ablation, time-matched: what each part of one-step training is worth, over seeds, on the two embedded worlds.

    python -m benchmarks.ablation scenes          trains what is missing; hours
    python -m benchmarks.ablation emoji
    python -m benchmarks.ablation --table         writes docs/ablation.md from the results

All rows of a seed get the same CPU seconds of one thread, teacher included: `first` for the warm-up and `second` for what follows it.
Pairs, decoder and the distilled U-Net are the recipe's, shared by all. Each finished row is a line of
benchmarks/results/ablation.jsonl; rows that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from sdxs.settings import Settings
from trainer import recipe as recipes
from trainer.artifacts import open_artifacts
from trainer.distill import Distillation
from trainer.evaluate import Generate, Generators, choose_captions, in_batches
from trainer.launch import Cluster
from trainer.loop import Stage
from trainer.pairs import Pairs
from trainer.recipe import DistillRecipe
from trainer.scoring import embedded_judge
from trainer.sections import FinishSection, WarmupSection
from trainer.session import ray_session
from trainer.sources import hush, teacher_folder
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
TABLE = Path(__file__).parent.parent / "docs" / "ablation.md"
IMAGES = {"train": 512, "heldout": 288}
TRIAL = 6  # steps that tell how long one takes
BUDGET = {"scenes": (200.0, 100.0), "emoji": (300.0, 150.0)}
FINISH = {"batch": 32, "lr": 2e-4, "warmup": 2, "feature_weights": (1.0, 0.5, 0.5, 0.5), "latent_l2": 1.0, "ema": 0.9}
OPTIONS: dict[str, dict[str, Any]] = {
    "Decoupled DMD": {"decoupled": {}, "guidance": 2.5},
    "DMD2's latent GAN": {"latent_gan": {}},
    "SiD": {"sid": {}},
}
ROWS = ["naive", "warm-up", "longer warm-up", "DI only", "SDI", "SDI + finish", *(f"SDI, {name}" for name in OPTIONS)]


@dataclass
class Ablation:
    """One world's shared inputs, and the rows of a seed."""

    world: str
    folder: Path
    recipe: DistillRecipe = field(init=False)

    def __post_init__(self) -> None:
        hush()
        torch.set_num_threads(1)
        loaded = recipes.load(self.world)
        assert isinstance(loaded, DistillRecipe)
        self.recipe, settings = loaded, Settings()
        self.teacher, self.judge = Teacher(teacher_folder(loaded.teacher)), embedded_judge(self.world)
        digests = _shared(loaded, settings)
        artifacts = open_artifacts(settings)
        self.generators = Generators(self.teacher, artifacts.fetch("decoder", digests["decoder"]), loaded.evaluation)
        self.distilled = artifacts.fetch("unet", digests["unet"])
        drawn = [artifacts.fetch(name, digests[name]) for name in ("pairs", "compositions") if name in digests]
        self.pairs = reduce(add, (Pairs.load(folder) for folder in drawn))

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Train what the row needs, and score it."""
        first, second = BUDGET[self.world]
        if name == "naive":
            return self.scores(self.distilled)
        if name == "warm-up":
            return self.warm(seed) | self.scores(self._kept("warm-up", seed))
        if name == "longer warm-up":
            return self._scored("warmup", seed, first + second, self.distilled, warmup=self.recipe.warmup)
        if name == "DI only":
            section = self._diff_instruct(alpha=(1.0, 1.0), lambda_fm=(0.0, 0.0))
            return self._scored("diff_instruct", seed, first + second, self.distilled, diff_instruct=section)
        self.warm(seed)
        start = self._kept("warm-up", seed)
        if name == "SDI + finish":
            return self._finished(seed, start, second)
        section = self._diff_instruct(**(OPTIONS[name.removeprefix("SDI, ")] if name != "SDI" else {}))
        return self._scored("diff_instruct", seed, second, start, diff_instruct=section)

    def _diff_instruct(self, **levers: Any) -> Any:
        assert self.recipe.diff_instruct is not None
        data = self.recipe.diff_instruct.model_dump() | levers
        return type(self.recipe.diff_instruct).model_validate(data)

    def _kept(self, name: str, seed: int) -> Path:
        return self.folder / self.world / f"{name}-{seed}"

    def warm(self, seed: int) -> dict[str, Any]:
        """The seed's warm-up, trained once."""
        done = self._kept("warm-up", seed) / "done.json"
        if not done.exists():
            found = self._train("warmup", seed, BUDGET[self.world][0], self.distilled, done.parent, warmup=self.recipe.warmup)
            done.write_text(json.dumps(found))
        found = json.loads(done.read_text())
        assert isinstance(found, dict)
        return found

    def _finished(self, seed: int, start: Path, seconds: float) -> dict[str, Any]:
        """Two thirds of the time for SDI, one for the finish."""
        with tempfile.TemporaryDirectory() as scratch:
            middle = Path(scratch)
            before = self._train("diff_instruct", seed, seconds * 2 / 3, start, middle, diff_instruct=self._diff_instruct())
            finish = FinishSection(steps=1000, **FINISH)
            after = self._scored("finish", seed, seconds / 3, middle, finish=finish)
        return after | {"steps": [before["steps"], after["steps"]], "seconds": before["seconds"] + after["seconds"]}

    def _scored(self, stage: str, seed: int, seconds: float, start: Path, **sections: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            found = self._train(stage, seed, seconds, start, Path(scratch), **sections)
            return found | self.scores(Path(scratch))

    def _train(self, stage: str, seed: int, seconds: float, start: Path, target: Path, **sections: Any) -> dict[str, Any]:
        """As many steps of a stage as fit into the seconds, by what a few of them take."""
        build = lambda steps: self._stage(stage, seed, steps, start, sections)  # noqa: E731
        running = build(TRIAL)
        running.step(0)  # not counted: first calls are slower
        pace = _timed(lambda: [running.step(index) for index in range(1, TRIAL)]) / (TRIAL - 1)
        running = build(max(TRIAL, round(seconds / pace)))
        spent = _timed(lambda: [running.step(index) for index in range(running.steps)])
        running.export(target)
        return {"steps": running.steps, "seconds": round(spent, 1)}

    def _stage(self, stage: str, seed: int, steps: int, start: Path, sections: dict[str, Any]) -> Stage:
        name, section = next(iter(sections.items()))
        warmup = min(section.warmup, max(1, steps // 10) - 1)
        update: dict[str, Any] = {"steps": steps, "warmup": warmup}
        if isinstance(section, WarmupSection):
            update["restarts"] = None
        section = section.model_copy(update=update)
        recipe = self.recipe.model_copy(update={"seed": seed, name: section})
        upstream = {"warmup": "unet", "diff_instruct": "warmup", "finish": "diff_instruct"}[stage]
        return STAGES[stage](
            StageContext(recipe, self.teacher.folder, InProcessTeacher(self.teacher), self.pairs, {upstream: start})
        )

    def scores(self, folder: Path) -> dict[str, Any]:
        """Accuracy and Frechet distance of one-step images on both splits."""
        generate: Generate = self.generators.one_step(folder)
        found: dict[str, Any] = {}
        for split, count in IMAGES.items():
            captions = choose_captions(self.judge, split, count)
            scores = self.judge.score(in_batches(generate, captions), captions)
            found |= {f"{split}_top1": round(scores.top1, 4), f"{split}_frechet": round(scores.frechet, 4)}
        return found


def _timed(call: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _shared(recipe: DistillRecipe, settings: Settings) -> dict[str, str]:
    """Digests of what all rows share, trained now where the store does not have it."""
    alone = recipe.model_copy(update={"warmup": None, "diff_instruct": None, "finish": None})
    distillation = Distillation(alone, settings, Cluster(teachers=2), lambda *_: None)
    plan = distillation.plan()
    if any(distillation.artifacts.facts(step.name, step.digest) is None for step in plan):
        with ray_session(), tempfile.TemporaryDirectory() as scratch:
            distillation.run(Path(scratch) / "bundle")
    return {step.name: step.digest for step in plan}


def machine() -> str:
    """What the numbers were measured on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return f"{model.partition(': ')[2] or platform.machine()}, one thread, torch {torch.__version__}"


def run(world: str, seeds: int, rows: list[str], folder: Path) -> None:
    """All rows of all seeds that are not there yet."""
    lines = read()
    done = {(line["world"], line["row"], line["seed"]) for line in lines}
    ablation = Ablation(world, folder)
    for seed in range(1, seeds + 1):
        for name in rows:
            if (world, name, seed) in done:
                continue
            line = {"world": world, "row": name, "seed": seed, **ablation.row(name, seed), "machine": machine()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def read() -> list[dict[str, Any]]:
    """All results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


MEASURES = ("train_top1", "train_frechet", "heldout_top1", "heldout_frechet")


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and spread (largest less smallest, halved) over seeds, a section for each world."""
    parts = []
    for world, (first, second) in BUDGET.items():
        groups = defaultdict(list)
        for line in lines:
            if line["world"] == world:
                groups[line["row"]].append(line)
        head = "| row | seeds | steps | top-1 | Frechet | top-1, held out | Frechet, held out |\n|---|---|---|---|---|---|---|"
        body = [_table_row(name, groups[name]) for name in ROWS if name in groups]
        parts.append(f"## {world}: {first:.0f} + {second:.0f} CPU seconds\n\n{head}\n" + "\n".join(body))
    return "\n\n".join(parts)


def _table_row(name: str, group: list[dict[str, Any]]) -> str:
    cells = []
    for measure in MEASURES:
        values = [line[measure] for line in group]
        scale, digits = (100, 1) if measure.endswith("top1") else (1, 2)
        spread = (max(values) - min(values)) / 2 * scale
        cells.append(f"{statistics.mean(values) * scale:.{digits}f} ± {spread:.{digits}f}")
    return f"| {name} | {len(group)} | {group[0].get('steps', '')} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?", choices=list(BUDGET))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--folder", type=Path, default=Path("out/ablation"), help="keeps each seed's warm-up")
    parser.add_argument("--table", action="store_true", help="write docs/ablation.md and end")
    chosen = parser.parse_args()
    if chosen.table:
        text = TABLE.read_text() if TABLE.exists() else "# Ablation\n\n<!-- table -->\n"
        TABLE.write_text(text.partition("<!-- table -->")[0] + "<!-- table -->\n\n" + table(read()) + "\n")
    else:
        run(chosen.world, chosen.seeds, chosen.rows, chosen.folder)


if __name__ == "__main__":
    main()
