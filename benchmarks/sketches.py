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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("-o", "--output", type=Path, help="contact sheet")
    parser.add_argument("--scale", type=float, default=1.0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    hush()
    pipeline, judge = OneStepPipeline.from_bundle(chosen.model), embedded_judge("emoji")
    columns: dict[str, list[np.ndarray]] = {"drawing": [], "control image": []}
    columns |= {f"seed {seed}": [] for seed in SEEDS} | {"without, seed 0": []}
    columns |= {"teacher, seed 0": []}
    teacher = multi_step(Teacher.load(TEACHER), EvaluationSection(train_images=1, heldout_images=1, teacher_guidance=2.5))
    lines, prompts = [], []
    for drawing in drawings():
        prompt, file = drawing["prompt"], (FOLDER / f"{drawing['name']}.png").read_bytes()
        control = Control(file, type="sketch", scale=chosen.scale)
        size = pipeline.manifest.image_size
        map_HWC, made, free = (
            map_of(control, size, "control"),
            images(pipeline, prompt, [control]),
            images(pipeline, prompt, []),
        )
        theirs = teacher([prompt] * len(SEEDS), list(SEEDS), np.stack([map_HWC] * len(SEEDS)))
        ways = {"with": made, "without": free, "teacher": theirs}
        scores = {name: judge.score(found, [prompt] * len(SEEDS)) for name, found in ways.items()}
        line = {"drawing": drawing["name"], "prompt": prompt, "scale": chosen.scale, "model": pipeline.manifest.digest}
        for name, found in ways.items():
            line |= {
                f"edge_f1_{name}": round(mean_edge_f1(found, [map_HWC] * len(SEEDS)), 4),
                f"top5_{name}": scores[name].top5,
            }
        lines.append({**line, "machine": machine()})
        shown = Image.open(FOLDER / f"{drawing['name']}.png").convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        for name, picture in zip(columns, [np.asarray(shown), map_HWC, *made, free[0], theirs[0]], strict=True):
            columns[name].append(picture)
        prompts.append(prompt)
        print(f"{prompt:32} edge F1 {line['edge_f1_with']:.3f} ({line['edge_f1_without']:.3f}), top-5 {line['top5_with']:.2f}")
    print(write("sketches", lines))
    for name in (f"{score}_{way}" for score in ("edge_f1", "top5") for way in ("with", "without", "teacher")):
        print(f"{name}: {np.mean([line[name] for line in lines]):.3f}")
    if chosen.output:
        contact_sheet({name: np.stack(found) for name, found in columns.items()}, prompts).save(chosen.output)


if __name__ == "__main__":
    main()
