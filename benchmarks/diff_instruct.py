"""Segmented Diff-Instruct against a longer warm-up of the same duration, over seeds, with the known levers.

    sdxs train scenes
    python -m benchmarks.diff_instruct scenes

Every arm starts from the warm-up's result in the store; seconds are CPU time of one thread, teacher included. Writes one line per
run to benchmarks/results/diff_instruct.jsonl, and skips those of the same recipe that are there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from sdxs.settings import Settings
from sdxs.store import open_store
from trainer import recipe as recipes
from trainer.artifacts import Artifacts
from trainer.distill import Distillation, teacher_folder
from trainer.evaluate import Generate, Generators, choose_captions, in_batches
from trainer.launch import Cluster
from trainer.pairs import Pairs
from trainer.recipe import DistillRecipe, WarmupSection
from trainer.scoring import embedded_judge
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher, hush

RESULTS = Path(__file__).parent / "results" / "diff_instruct.jsonl"
TRAIN_IMAGES, HELDOUT_IMAGES = 512, 288
ARMS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "guidance 1.0": {"guidance": 1.0},
    "guidance 2.5": {"guidance": 2.5},
    "guidance 4.0": {"guidance": 4.0},
    "guidance 2.5, lr 1e-4": {"guidance": 2.5, "lr": 1e-4},
    "online ratio 3": {"online_ratio": 3},
    "online lr 3e-4": {"online_lr": 3e-4},
    "lr 1e-5": {"lr": 1e-5},
    "lr 1e-4": {"lr": 1e-4},
    "alpha 1.0-0.8": {"alpha": (1.0, 0.8)},
    "alpha 0.6-0.3": {"alpha": (0.6, 0.3)},
    "betas 0.0, 0.99": {"betas": (0.0, 0.99)},
    "lambda_fm 0.2-0.05": {"lambda_fm": (0.2, 0.05)},
}


class Ablation:
    """One warm-up, continued in different ways."""

    def __init__(self, recipe: str, steps: int) -> None:
        hush()
        torch.set_num_threads(1)
        settings = Settings()
        artifacts = Artifacts(open_store(settings), settings.cache_dir / "artifacts")
        loaded = recipes.load(recipe)
        assert isinstance(loaded, DistillRecipe)
        self.recipe = loaded
        digests = Distillation(loaded, settings, Cluster(), lambda *_: None).plan(
            ["decoder", "unet", "warmup", "diff_instruct"]
        )
        self.digest = digests["diff_instruct"]  # of the teacher, the samples and all stages before
        self.folder, self.steps = teacher_folder(self.recipe.teacher), steps
        self.teacher, self.judge = Teacher(self.folder), embedded_judge(self.recipe.world)
        self.generators = Generators(self.teacher, artifacts.fetch("decoder", digests["decoder"]), loaded.evaluation)
        self.warmup = artifacts.fetch("warmup", digests["warmup"])
        drawn = [artifacts.fetch(name, digests[name]) for name in ("pairs", "compositions") if name in digests]
        self.pairs = reduce(add, (Pairs.load(folder / "pairs.safetensors") for folder in drawn))

    def diff_instruct(self, seed: int, **levers: Any) -> dict[str, float]:
        assert self.recipe.diff_instruct is not None
        section = self.recipe.diff_instruct.model_copy(update={"steps": self.steps, **levers})
        return self._run("diff_instruct", {"warmup": self.warmup}, seed, {"diff_instruct": section})

    def longer_warmup(self, seed: int, seconds: float) -> dict[str, float]:
        """The warm-up's own recipe once more from its own result, with as many steps as fit into `seconds`."""
        trial = self._run("warmup", {"unet": self.warmup}, seed, {"warmup": self._warmup_of(20)})
        steps = round(seconds * trial["steps"] / trial["seconds"])
        return self._run("warmup", {"unet": self.warmup}, seed, {"warmup": self._warmup_of(steps)})

    def _warmup_of(self, steps: int) -> WarmupSection:
        return self.recipe.warmup.model_copy(update={"steps": steps})

    def _run(self, stage: str, inputs: dict[str, Path], seed: int, update: dict[str, Any]) -> dict[str, float]:
        recipe = self.recipe.model_copy(update={"seed": seed, **update})
        running = STAGES[stage](StageContext(recipe, self.folder, InProcessTeacher(self.teacher), self.pairs, inputs))
        start = time.process_time()
        for step in range(running.steps):
            running.step(step)
        seconds = time.process_time() - start
        with tempfile.TemporaryDirectory() as scratch:
            running.export(Path(scratch))
            running.close()
            return {
                "steps": running.steps,
                "seconds": round(seconds, 1),
                **self.scores(self.generators.one_step(Path(scratch))),
            }

    def scores(self, generate: Generate) -> dict[str, float]:
        """Accuracy and Frechet distance on both splits."""
        found: dict[str, float] = {}
        for split, count in (("train", TRAIN_IMAGES), ("heldout", HELDOUT_IMAGES)):
            captions = choose_captions(self.judge, split, count)
            scores = self.judge.score(in_batches(generate, captions), captions)
            found |= {f"{split}_top1": round(scores.top1, 4), f"{split}_frechet": round(scores.frechet, 4)}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="e.g. scenes")
    parser.add_argument("--steps", type=int, default=200, help="of segmented Diff-Instruct")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    chosen = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    ablation = Ablation(chosen.recipe, chosen.steps)
    lines = [line for line in lines if line["recipe"] == ablation.digest]
    done = {(line["arm"], line["seed"]) for line in lines}

    def note(arm: str, seed: int, result: dict[str, float]) -> None:
        lines.append({"recipe": ablation.digest, "world": ablation.recipe.world, "arm": arm, "seed": seed, **result})
        with RESULTS.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), flush=True)

    if ("warm-up", 0) not in done:
        note("warm-up", 0, {"steps": 0, "seconds": 0.0, **ablation.scores(ablation.generators.one_step(ablation.warmup))})
    for arm in chosen.arms:
        for seed in range(1, chosen.seeds + 1):
            if (arm, seed) not in done:
                note(arm, seed, ablation.diff_instruct(seed, **ARMS[arm]))
    seconds = statistics.median(line["seconds"] for line in lines if line["arm"] == "recipe")
    for seed in range(1, chosen.seeds + 1):
        if ("longer warm-up", seed) not in done:
            note("longer warm-up", seed, ablation.longer_warmup(seed, seconds))
    report(lines)


def report(lines: list[dict[str, Any]]) -> None:
    """Means over seeds, as a table."""
    groups = defaultdict(list)
    for line in lines:
        groups[line["arm"]].append(line)
    names = ("steps", "seconds", "train_top1", "train_frechet", "heldout_top1", "heldout_frechet")
    print("| arm | seeds | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for arm, group in groups.items():
        means = [f"{statistics.mean(line[name] for line in group):.3f}" for name in names]
        print(f"| {arm} | {len(group)} | " + " | ".join(means) + " |")


if __name__ == "__main__":
    main()
