"""What one-step training is worth for a ControlNet, time-matched: warm-up alone against warm-up and SDI, over seeds, on both worlds.

    python -m benchmarks.control scenes       needs the bundle that `sdxs train scenes-control` starts from; trains what is missing
    python -m benchmarks.control emoji
    python -m benchmarks.control --table      writes the table in docs/control.md from the results

Every row gets CPU seconds of one thread, teacher included: "warm-up" the first number of BUDGET, "longer warm-up" and "warm-up + SDI"
both. Samples, their images and the ControlNet distilled at every timestep are the recipe's, shared by all. Each finished row is a line of
benchmarks/results/control.jsonl; rows that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation import cpu_seconds, machine
from sdxs import registry
from sdxs.settings import Settings
from trainer import recipe as recipes
from trainer.artifacts import open_artifacts
from trainer.cluster import Cluster
from trainer.distill import Distillation
from trainer.evaluation.control import ControlComparison, Way
from trainer.evaluation.generators import served
from trainer.evaluation.scoring import Comparison, embedded_judge
from trainer.loop import Stage
from trainer.plan import Step, offline_spec
from trainer.recipe import ControlRecipe
from trainer.session import ray_session
from trainer.sources import hush
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher
from trainer.triplets import learnt_from

RESULTS = Path(__file__).parent / "results" / "control.jsonl"
TABLE = Path(__file__).parent.parent / "docs" / "control.md"
BUDGET = {"scenes": (150.0, 75.0), "emoji": (200.0, 70.0)}
TRIAL = 8  # steps that tell how long one takes, after one that is not counted
ROWS = ["every timestep only", "warm-up", "longer warm-up", "warm-up + SDI"]
SPLITS = {"heldout": "held-out captions", "heldout-bent": "the same with control images bent"}
START, END = "<!-- table -->", "<!-- end of table -->"


@dataclass
class Control:
    """One world's shared inputs, and the rows of a seed."""

    world: str
    folder: Path
    recipe: ControlRecipe = field(init=False)

    def __post_init__(self) -> None:
        hush()
        torch.set_num_threads(1)
        loaded = recipes.load(f"{self.world}-control")
        assert isinstance(loaded, ControlRecipe)
        self.recipe, settings = loaded, Settings()
        shared, artifacts = _shared(loaded, settings), open_artifacts(settings)
        fetched = {name: artifacts.fetch(name, step.digest) for name, step in shared.items()}
        self.shrunk = fetched["control_shrink"]
        pairs, self.images = learnt_from({name: fetched[name] for name in shared["control_shrink"].reads})
        assert pairs is not None
        self.pairs = pairs
        self.base, self.manifest = registry.open_model(loaded.base, settings)
        self.teacher, self.judge = Teacher.load(offline_spec(loaded)), embedded_judge(self.world)
        self.paces: dict[str, float] = {}

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Train what the row needs, and score it."""
        first, second = BUDGET[self.world]
        if name == "every timestep only":
            return self.scores(self.shrunk)
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch)
            if name == "warm-up":
                return self._warmed(seed) | self.scores(self._start(seed))
            if name == "longer warm-up":
                return self._train("control_warmup", seed, first + second, self.shrunk, target) | self.scores(target)
            before = self._warmed(seed)
            after = self._train("control_diff_instruct", seed, second, self._start(seed), target)
            steps, seconds = [before["steps"], after["steps"]], round(before["seconds"] + after["seconds"], 1)
            return {"steps": steps, "seconds": seconds} | self.scores(target)

    def _start(self, seed: int) -> Path:
        return self.folder / self.world / f"warm-up-{seed}"

    def _warmed(self, seed: int) -> dict[str, Any]:
        """The seed's warm-up, trained once."""
        done = self._start(seed) / "done.json"
        if not done.exists():
            seconds = BUDGET[self.world][0]
            done.write_text(json.dumps(self._train("control_warmup", seed, seconds, self.shrunk, done.parent)))
        found = json.loads(done.read_text())
        assert isinstance(found, dict)
        return found

    def _train(self, stage: str, seed: int, seconds: float, start: Path, target: Path) -> dict[str, Any]:
        """As many steps of a stage as fit into the seconds."""
        if stage not in self.paces:
            trial = self._stage(stage, 1, 1 + TRIAL, self.shrunk)
            trial.step(0)
            self.paces[stage] = cpu_seconds(trial, range(1, 1 + TRIAL)) / TRIAL
        running = self._stage(stage, seed, round(seconds / self.paces[stage]), start)
        spent = cpu_seconds(running, range(running.steps))
        target.mkdir(parents=True, exist_ok=True)
        running.export(target)
        return {"steps": running.steps, "seconds": round(spent, 1)}

    def _stage(self, name: str, seed: int, steps: int, start: Path) -> Stage:
        key, upstream = name.removeprefix("control_"), {"control_warmup": "control_shrink"}.get(name, "control_warmup")
        section = getattr(self.recipe, key)
        update = {"steps": steps, "warmup": min(section.warmup, max(1, steps // 10) - 1)}
        recipe = self.recipe.model_copy(update={"seed": seed, key: section.model_copy(update=update)})
        inputs = {"base": self.base, "decoder": self.base, upstream: start}
        asked = InProcessTeacher(self.teacher)
        return STAGES[name](StageContext(recipe, self.teacher.folder, asked, self.pairs, inputs, sample_images=self.images))

    def scores(self, folder: Path) -> dict[str, Any]:
        """What the one-step bundle with the ControlNet in `folder` scores on held-out captions, under each condition."""
        way = Way(served(self.base, self.manifest, "cpu", folder / "controlnet"), True)
        heldout = self.recipe.evaluation.model_copy(update={"train_images": 0})
        comparison = Comparison(self.judge, self.teacher, {}, heldout, ceiling=False)
        found: dict[str, Any] = {}
        for row in ControlComparison(comparison, {"one": way}, self.recipe.conditions).scores(lambda _: None):
            scores = {"top1": row.top1, "top5": row.top5, "frechet": row.frechet, **row.scores}
            found |= {f"{row.split}_{row.condition}_{name}": value for name, value in scores.items() if value is not None}
        return found


def _shared(recipe: ControlRecipe, settings: Settings) -> dict[str, Step]:
    """The steps that all rows share, made now where the store does not have their results."""
    alone = recipe.model_copy(update={"warmup": None, "diff_instruct": None})
    distillation = Distillation(alone, settings, Cluster(teachers=1), lambda *_: None)
    plan = distillation.plan()
    if any(distillation.artifacts.facts(step.name, step.digest) is None for step in plan):
        with ray_session(), tempfile.TemporaryDirectory() as scratch:
            distillation.run(Path(scratch) / "bundle")
    return {step.name: step for step in plan}


def run(control: Control, seeds: int) -> None:
    """All rows of all seeds that are not there yet."""
    done = {(line["world"], line["row"], line["seed"]) for line in read()}
    for seed in range(1, seeds + 1):
        for name in ROWS:
            if (control.world, name, seed) in done or (name == ROWS[0] and seed > 1):
                continue
            line = {"world": control.world, "row": name, "seed": seed, **control.row(name, seed), "machine": machine()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def read() -> list[dict[str, Any]]:
    """All results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Held-out captions: mean and spread (largest less smallest, halved) over seeds, a table for each world and split."""
    parts = []
    for (world, (first, second)), (split, words) in product(BUDGET.items(), SPLITS.items()):
        groups = defaultdict(list)
        for line in lines:
            if line["world"] == world:
                groups[line["row"]].append(line)
        some = next(iter(groups.values()), [{}])[0]
        conditions = [kind for kind in ("edge", "sketch", "colour") if f"{split}_{kind}_frechet" in some]
        if not conditions:
            continue
        head = ["row", "seeds", "steps", *(f"{kind}: {word}" for kind in conditions for word in _words(kind))]
        rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        rows += [_table_row(name, groups[name], split, conditions) for name in ROWS if name in groups]
        parts.append(f"**{world}**, {words}, {first:.0f} + {second:.0f} CPU seconds:\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _words(kind: str) -> tuple[str, str, str]:
    return ("colour error" if kind == "colour" else "edge F1", "retrieval", "Frechet")


def _table_row(name: str, group: list[dict[str, Any]], split: str, conditions: list[str]) -> str:
    cells = []
    for kind in conditions:
        faithful = ("colour_error", 1, 1) if kind == "colour" else ("edge_f1", 1, 3)
        retrieval = "top5" if f"{split}_{kind}_top5" in group[0] else "top1"
        for measure, scale, digits in (faithful, (retrieval, 100, 1), ("frechet", 1, 2)):
            values = [line[f"{split}_{kind}_{measure}"] for line in group]
            spread = (max(values) - min(values)) / 2 * scale
            cells.append(f"{statistics.mean(values) * scale:.{digits}f} ± {spread:.{digits}f}")
    return f"| {name} | {len(group)} | {_steps(group)} | " + " | ".join(cells) + " |"


def _steps(group: list[dict[str, Any]]) -> str:
    """Of each seed, where they differ: the seconds are what is the same."""
    return ", ".join(dict.fromkeys(str(line.get("steps", "")).strip("[]").replace(", ", " + ") for line in group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?", choices=list(BUDGET))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("out/control"), help="keeps each seed's warm-up")
    parser.add_argument("--table", action="store_true", help="write the table in docs/control.md and end")
    chosen = parser.parse_args()
    if chosen.table:
        before, _, rest = TABLE.read_text().partition(START)
        TABLE.write_text(f"{before}{START}\n\n{table(read())}\n\n{END}{rest.partition(END)[2]}")
    else:
        run(Control(chosen.world, chosen.folder), chosen.seeds)


if __name__ == "__main__":
    main()
