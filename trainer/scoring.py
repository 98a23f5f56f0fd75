"""Rows of the report for a distillation or a finished bundle: who is compared, and where their weights come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdxs.bundle import Manifest
from trainer.artifacts import Artifacts
from trainer.distill import ASSETS, teacher_folder
from trainer.evaluate import Generate, Generators, Row, latencies_ms, score_rows
from trainer.judge import Judge, JudgeNet
from trainer.recipe import EvaluationSection
from trainer.teacher import Teacher, hush
from trainer.worlds.base import get_world


def embedded_judge(world: str) -> Judge:
    """The judge that ships with a world."""
    folder = ASSETS / world / "judge"
    accuracy = json.loads((folder / "judge.json").read_text())["accuracy_on_real_renders"]
    return Judge(JudgeNet.load(folder), get_world(world), accuracy)


def students(bundle: Path, lineage: dict[str, str], artifacts: Artifacts) -> dict[str, Path]:
    """Folders of the student's U-Net after each stage, where the store still has them; the bundle itself is "final"."""
    folders = {}
    for row, stage in (("kd", "unet"), ("warmup", "warmup")):
        digest = lineage.get(stage)
        if digest and artifacts.facts(stage, digest) is not None:
            folders[row] = artifacts.fetch(stage, digest)
    return {**folders, "final": bundle}


@dataclass(frozen=True)
class Comparison:
    """A bundle beside its teacher: the ways to make an image that are compared, in the order of the report."""

    judge: Judge
    teacher: Teacher
    generators: dict[str, Generate]
    evaluation: EvaluationSection

    def scores(self, progress: Callable[[str], None]) -> list[Row]:
        """How good the images are; without latencies."""
        return score_rows(self.judge, self.teacher, self.generators, self.evaluation, progress)

    def timed(self, rows: list[Row]) -> list[Row]:
        """The same rows with latencies; measured apart from the scores, when the machine is quiet."""
        latencies = latencies_ms(self.generators, self.judge.world.captions("train")[0])
        return [replace(row, latency_ms=latencies.get(row.row)) for row in rows]


def with_recorded(rows: list[Row], recorded: list[Row]) -> list[Row]:
    """Rows in the order of the record, those that could not be measured now filled in from it and marked so."""
    measured = {(row.split, row.row): row for row in rows}
    known = {(row.split, row.row) for row in recorded}
    filled = [measured.get((row.split, row.row), replace(row, recorded=True)) for row in recorded]
    return filled + [row for row in rows if (row.split, row.row) not in known]


def compare(bundle: Path, manifest: Manifest, world: str, evaluation: EvaluationSection, artifacts: Artifacts) -> Comparison:
    """The teacher, the student after each stage that the store still has, and the bundle. Sets this process to one thread, as served."""
    torch.set_num_threads(1)
    hush()
    teacher = Teacher(teacher_folder(manifest.lineage["teacher"]))
    made, folders = Generators(teacher, bundle, evaluation), students(bundle, manifest.lineage, artifacts)
    rows: dict[str, Generate] = {"teacher": made.multi_step_teacher()}
    if "kd" in folders:
        rows["kd"] = made.multi_step_student(folders["kd"])
        rows["naive"] = made.one_step(folders["kd"])
    if "warmup" in folders:
        rows["warmup"] = made.one_step(folders["warmup"])
    rows["final"] = made.one_step(folders["final"])
    return Comparison(embedded_judge(world), teacher, rows, evaluation)
