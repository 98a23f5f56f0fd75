"""The paper's ablation, time-matched: what each part of one-step training is worth, over seeds, on the two embedded worlds.

    python -m benchmarks.ablation                 trains what is missing of both worlds, hours, and writes docs/ablation.md

    python -m benchmarks.ablation scenes          parts of it
    python -m benchmarks.ablation emoji
    python -m benchmarks.ablation emoji --trained     from the recipe's own warm-up, which is trained first where it is not there
    python -m benchmarks.ablation --table         writes docs/ablation.md from the results

All rows get the same CPU seconds of one thread, teacher included: `first` for the warm-up and `second` for what follows it. What a step
of each part costs is measured once a world, the parts in turns, and kept beside the results: all seeds take the same number of steps.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from sdxs.settings import Settings
from trainer import recipe as recipes
from trainer.artifacts import open_artifacts
from trainer.cluster import Cluster
from trainer.distill import Distillation
from trainer.evaluation.generators import Generate, Generators, choose_captions, in_batches
from trainer.evaluation.scoring import embedded_judge
from trainer.loop import Stage
from trainer.pairs import Pairs
from trainer.recipe import DistillRecipe
from trainer.sections import FinishSection, WarmupSection
from trainer.session import ray_session
from trainer.sources import hush, teacher_folder
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
TABLE = Path(__file__).parent.parent / "docs" / "ablation.md"
IMAGES = {"train": 512, "heldout": 288}
PACES = RESULTS.with_name("ablation_paces.json")
ROUNDS, TRIAL = 5, 6  # rounds, and steps of each part a round, that tell how long one takes
BUDGET = {"scenes": (200.0, 100.0), "emoji": (300.0, 150.0)}
FINISH = {
    "batch": 32, "lr": 2e-5, "warmup": 2, "gan_weight": 0.1, "anchor": 0.0, "discriminator_lr": 2e-3,
    "feature_weights": (1.0, 0.5, 0.5, 0.5), "latent_l2": 1.0, "ema": 0.9,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "Decoupled DMD": {"decoupled": {}, "guidance": 2.5},
    "DMD2's latent GAN": {"latent_gan": {}},
    "SiD": {"sid": {}},
}
TRAINED_ROWS = ["warm-up", "longer warm-up", "SDI", "SDI + finish"]
SECTIONS = [("scenes", False), ("emoji", False), ("emoji", True)]
"""Of the table: a world, and whether it begins with the recipe's own warm-up."""
ROWS = ["naive", "warm-up", "longer warm-up", "DI only", "SDI", "SDI + finish", *(f"SDI, {name}" for name in OPTIONS)]


@dataclass
class Ablation:
    """One world's shared inputs, and the rows of a seed. `trained`: all seeds start from the recipe's own warm-up."""

    world: str
    folder: Path
    trained: bool = False
    recipe: DistillRecipe = field(init=False)

    def __post_init__(self) -> None:
        hush()
        torch.set_num_threads(1)
        loaded = recipes.load(self.world)
        assert isinstance(loaded, DistillRecipe)
        self.recipe, settings = loaded, Settings()
        self.teacher, self.judge = Teacher(teacher_folder(loaded.teacher)), embedded_judge(self.world)
        digests = _shared(loaded, settings, self.trained)
        artifacts = open_artifacts(settings)
        self.generators = Generators(self.teacher, artifacts.fetch("decoder", digests["decoder"]), loaded.evaluation)
        self.distilled = artifacts.fetch("unet", digests["unet"])
        self.recipes_own = artifacts.fetch("warmup", digests["warmup"]) if self.trained else None
        drawn = [artifacts.fetch(name, digests[name]) for name in ("pairs", "compositions") if name in digests]
        self.pairs = reduce(add, (Pairs.load(folder) for folder in drawn))

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Train what the row needs, and score it."""
        first, second = BUDGET[self.world]
        if name == "naive":
            return self.scores(self.distilled)
        if name == "warm-up":
            return self._warmed(seed) | self.scores(self._start(seed))
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch)
            if name == "longer warm-up" and self.trained:
                found = self._train(name, seed, second, self._start(seed), target)
            elif name in ("longer warm-up", "DI only"):
                found = self._train(name, seed, first + second, self.distilled, target)
            else:
                self._warmed(seed)
                start = self._start(seed)
                found = (
                    self._finished(seed, start, second, target)
                    if name == "SDI + finish"
                    else self._train(name, seed, second, start, target)
                )
            return found | self.scores(target)

    def _part(self, name: str) -> tuple[str, dict[str, Any]]:
        """The stage that a row adds, and its section of the recipe."""
        if name in ("warm-up", "longer warm-up"):
            return "warmup", {"warmup": self.recipe.warmup}
        if name == "finish":
            return "finish", {"finish": FinishSection(steps=1000, **FINISH)}
        alone = {"alpha": (1.0, 1.0), "lambda_fm": (0.0, 0.0)}
        levers = {"SDI": {}, "DI only": alone}.get(name) or OPTIONS.get(name.removeprefix("SDI, "), {})
        assert self.recipe.diff_instruct is not None
        data = self.recipe.diff_instruct.model_dump() | levers
        return "diff_instruct", {"diff_instruct": type(self.recipe.diff_instruct).model_validate(data)}

    def _start(self, seed: int) -> Path:
        """What comes after the warm-up begins here."""
        return self.recipes_own or self.folder / self.world / f"warm-up-{seed}"

    def _warmed(self, seed: int) -> dict[str, Any]:
        """The seed's warm-up, trained once."""
        if self.trained:
            return {}
        done = self._start(seed) / "done.json"
        if not done.exists():
            found = self._train("warm-up", seed, BUDGET[self.world][0], self.distilled, done.parent)
            done.write_text(json.dumps(found))
        found = json.loads(done.read_text())
        assert isinstance(found, dict)
        return found

    def _finished(self, seed: int, start: Path, seconds: float, target: Path) -> dict[str, Any]:
        """Two thirds of the time for SDI, one for the finish."""
        with tempfile.TemporaryDirectory() as scratch:
            before = self._train("SDI", seed, seconds * 2 / 3, start, Path(scratch))
            after = self._train("finish", seed, seconds / 3, Path(scratch), target)
        return {"steps": [before["steps"], after["steps"]], "seconds": round(before["seconds"] + after["seconds"], 1)}

    @cached_property
    def paces(self) -> dict[str, float]:
        """CPU seconds of one step of each part: the median of rounds taken in turns, so that a drifting machine slows all alike."""
        kept = json.loads(PACES.read_text()) if PACES.exists() else {}
        if self.world not in kept:
            parts = ["warm-up", "DI only", "SDI", *(f"SDI, {name}" for name in OPTIONS), "finish"]
            stages = {name: self._stage(name, 1, 1 + ROUNDS * TRIAL, self.distilled) for name in parts}
            for stage in stages.values():
                stage.step(0)  # not counted: first calls are slower
            rounds = defaultdict(list)
            for turn in range(ROUNDS):
                for name, stage in stages.items():
                    rounds[name].append(cpu_seconds(stage, range(1 + turn * TRIAL, 1 + (turn + 1) * TRIAL)) / TRIAL)
            kept[self.world] = {name: round(statistics.median(found), 4) for name, found in rounds.items()}
            PACES.write_text(json.dumps(kept, indent=2) + "\n")
        found = kept[self.world]
        assert isinstance(found, dict)
        return found | {"longer warm-up": found["warm-up"]}

    def _train(self, name: str, seed: int, seconds: float, start: Path, target: Path) -> dict[str, Any]:
        """As many steps of a part as fit into the seconds."""
        running = self._stage(name, seed, round(seconds / self.paces[name]), start)
        spent = cpu_seconds(running, range(running.steps))
        running.export(target)
        return {"steps": running.steps, "seconds": round(spent, 1)}

    def _stage(self, name: str, seed: int, steps: int, start: Path) -> Stage:
        stage, sections = self._part(name)
        ((key, section),) = sections.items()
        update: dict[str, Any] = {"steps": steps, "warmup": min(section.warmup, max(1, steps // 10) - 1)}
        if isinstance(section, WarmupSection):
            update["restarts"] = None
        recipe = self.recipe.model_copy(update={"seed": seed, key: section.model_copy(update=update)})
        upstream = {"warmup": "unet", "diff_instruct": "warmup", "finish": "diff_instruct"}[stage]
        return STAGES[stage](
            StageContext(recipe, self.teacher.folder, InProcessTeacher(self.teacher), self.pairs, {upstream: start})
        )

    def scores(self, folder: Path) -> dict[str, Any]:
        """Accuracy and Frechet distance of one-step images on both splits."""
        generate: Generate = self.generators.one_step(folder)
        found: dict[str, Any] = {}
        for split, count in IMAGES.items():
            captions = choose_captions(self.judge.world, split, count)
            scores = self.judge.score(in_batches(generate, captions), captions)
            found |= {f"{split}_top1": round(scores.top1, 4), f"{split}_frechet": round(scores.frechet, 4)}
        return found


def cpu_seconds(stage: Stage, steps: range) -> float:
    """CPU seconds of this process for these steps."""
    start = time.process_time()
    for index in steps:
        stage.step(index)
    return time.process_time() - start


def _shared(recipe: DistillRecipe, settings: Settings, trained: bool) -> dict[str, str]:
    """Digests of what all rows share, trained now where the store does not have it."""
    alone = recipe.model_copy(update=dict.fromkeys(["diff_instruct", "finish", *([] if trained else ["warmup"])]))
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


def section(world: str, trained: bool) -> str:
    """What the results of a world are called."""
    return f"{world}, the recipe's warm-up" if trained else world


def run(ablation: Ablation, seeds: int, rows: list[str]) -> None:
    """All rows of all seeds that are not there yet."""
    world = section(ablation.world, ablation.trained)
    for name, seed in missing(read(), world, seeds, rows):
        line = {"world": world, "row": name, "seed": seed, **ablation.row(name, seed), "machine": machine()}
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def missing(lines: list[dict[str, Any]], world: str, seeds: int, rows: list[str]) -> list[tuple[str, int]]:
    """Rows and seeds of a section that have no result."""
    done = {(line["row"], line["seed"]) for line in lines if line["world"] == world}
    return [(name, seed) for seed in range(1, seeds + 1) for name in rows if (name, seed) not in done]


def read() -> list[dict[str, Any]]:
    """All results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


MEASURES = ("train_top1", "train_frechet", "heldout_top1", "heldout_frechet")


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and spread (largest less smallest, halved) over seeds, a section for each world."""
    parts = []
    for world, trained in SECTIONS:
        (first, second), name = BUDGET[world], section(world, trained)
        groups = defaultdict(list)
        for line in lines:
            if line["world"] == name:
                groups[line["row"]].append(line)
        if not groups:
            continue
        head = "| row | seeds | steps | top-1 | Frechet | top-1, held out | Frechet, held out |\n|---|---|---|---|---|---|---|"
        body = [_table_row(row, groups[row]) for row in ROWS if row in groups]
        time = f"{second:.0f}" if trained else f"{first:.0f} + {second:.0f}"
        parts.append(f"## {name}: {time} CPU seconds\n\n{head}\n" + "\n".join(body))
    return "\n\n".join(parts)


def _table_row(name: str, group: list[dict[str, Any]]) -> str:
    cells = []
    for measure in MEASURES:
        values = [line[measure] for line in group]
        scale, digits = (100, 1) if measure.endswith("top1") else (1, 2)
        spread = (max(values) - min(values)) / 2 * scale
        cells.append(f"{statistics.mean(values) * scale:.{digits}f} ± {spread:.{digits}f}")
    return f"| {name} | {len(group)} | {group[0].get('steps', '')} | " + " | ".join(cells) + " |"


def everything(seeds: int, folder: Path) -> None:
    """All sections' missing rows, then the table. Nothing of a section that is whole is loaded or trained."""
    for world, trained in SECTIONS:
        rows = TRAINED_ROWS if trained else ROWS
        if missing(read(), section(world, trained), seeds, rows):
            run(Ablation(world, folder, trained), seeds, rows)
        write_table()


def write_table() -> None:
    text = TABLE.read_text() if TABLE.exists() else "# Ablation\n\n<!-- table -->\n"
    TABLE.write_text(text.partition("<!-- table -->")[0] + "<!-- table -->\n\n" + table(read()) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?", choices=list(BUDGET), help="of this one only, and no table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", choices=ROWS)
    parser.add_argument("--folder", type=Path, default=Path("out/ablation"), help="keeps each seed's warm-up")
    parser.add_argument("--trained", action="store_true", help="start all seeds from the recipe's own warm-up")
    parser.add_argument("--table", action="store_true", help="write docs/ablation.md and end")
    chosen = parser.parse_args(arguments)
    if chosen.world is None and (chosen.rows or chosen.trained):
        parser.error("--rows and --trained are of a world: name it")
    if chosen.table:
        write_table()
    elif chosen.world is None:
        everything(chosen.seeds, chosen.folder)
    else:
        rows = chosen.rows or (TRAINED_ROWS if chosen.trained else ROWS)
        run(Ablation(chosen.world, chosen.folder, chosen.trained), chosen.seeds, rows)


if __name__ == "__main__":
    main()
