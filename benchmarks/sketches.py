"""Drawings by hand as control images: what one step makes of each in examples/sketches, beside the same prompt without it, and beside
the teacher with its ControlNet in 25 steps.

    python -m benchmarks.sketches emoji -o docs/sketches.webp

For every drawing: edge F1 of the images against its lines, and how often the judge finds the prompt among its five nearest. Writes
benchmarks/results/sketches.jsonl and the contact sheet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import machine, write
from sdxs import Control, OneStepPipeline
from sdxs.control import map_of
from trainer.evaluation.generators import multi_step
from trainer.evaluation.metrics.edges import mean_edge_f1
from trainer.evaluation.report import contact_sheet
from trainer.evaluation.scoring import embedded_judge
from trainer.sections import EvaluationSection
from trainer.sources import hush
from trainer.specs import TeacherSpec
from trainer.teacher import Teacher

FOLDER = Path(__file__).parent.parent / "examples" / "sketches"
SEEDS = (0, 1, 2, 3)
TEACHER = TeacherSpec("emoji-teacher", controlnet="emoji-teacher-controlnet")


def drawings() -> list[dict[str, Any]]:
    """Name and prompt of each."""
    found = json.loads((FOLDER / "strokes.json").read_text(encoding="utf8"))
    assert isinstance(found, list)
    return found


def images(pipeline: OneStepPipeline, prompt: str, controls: list[Control]) -> np.ndarray:
    """One of each seed, uint8 (N, H, W, 3)."""
    return np.stack([np.asarray(pipeline(prompt, seed, controls=controls)[0]) for seed in SEEDS])


class Bench:
    """Everybody who draws, and what has been drawn so far."""

    def __init__(self, model: str, scale: float) -> None:
        self.pipeline, self.judge, self.scale = OneStepPipeline.from_bundle(model), embedded_judge("emoji"), scale
        self.size = self.pipeline.manifest.image_size
        self.teacher = multi_step(
            Teacher.load(TEACHER), EvaluationSection(train_images=1, heldout_images=1, teacher_guidance=2.5)
        )
        names = ["drawing", "control image", *(f"seed {seed}" for seed in SEEDS), "without, seed 0", "teacher, seed 0"]
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def line(self, name: str, prompt: str) -> dict[str, Any]:
        """One drawing's scores; its pictures go into the columns."""
        path, count = FOLDER / f"{name}.png", len(SEEDS)
        control = Control(path.read_bytes(), type="sketch", scale=self.scale)
        map_HWC = map_of(control, self.size, "control")
        ways = {
            "with": images(self.pipeline, prompt, [control]),
            "without": images(self.pipeline, prompt, []),
            "teacher": self.teacher([prompt] * count, list(SEEDS), np.stack([map_HWC] * count)),
        }
        found: dict[str, Any] = {"drawing": name, "prompt": prompt, "scale": self.scale, "model": self.pipeline.manifest.digest}
        for way, made in ways.items():
            found[f"edge_f1_{way}"] = round(mean_edge_f1(made, [map_HWC] * count), 4)
            found[f"top5_{way}"] = self.judge.score(made, [prompt] * count).top5
        shown = Image.open(path).convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
        pictures = [np.asarray(shown), map_HWC, *ways["with"], ways["without"][0], ways["teacher"][0]]
        for column, picture in zip(self.columns.values(), pictures, strict=True):
            column.append(picture)
        return {**found, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("-o", "--output", type=Path, help="contact sheet")
    parser.add_argument("--scale", type=float, default=1.0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    hush()
    bench, lines = Bench(chosen.model, chosen.scale), []
    for drawing in drawings():
        lines.append(line := bench.line(drawing["name"], drawing["prompt"]))
        print(f"{line['prompt']:32} edge F1 {line['edge_f1_with']:.3f} ({line['edge_f1_without']:.3f})")
    print(write("sketches", lines))
    for name in (f"{score}_{way}" for score in ("edge_f1", "top5") for way in ("with", "without", "teacher")):
        print(f"{name}: {np.mean([line[name] for line in lines]):.3f}")
    if chosen.output:
        sheet = {name: np.stack(column) for name, column in bench.columns.items()}
        contact_sheet(sheet, [line["prompt"] for line in lines]).save(chosen.output)


if __name__ == "__main__":
    main()
