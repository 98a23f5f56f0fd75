"""Rows of the report for a distillation or a finished bundle: who is compared, and where their weights come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sdxs.bundle import Manifest
from trainer.artifacts import Artifacts
from trainer.distill import ASSETS, teacher_folder
from trainer.evaluate import Generate, Generators, Row, score_rows
from trainer.judge import Judge, JudgeNet
from trainer.recipe import EvaluationSection
from trainer.teacher import Teacher, hush
from trainer.worlds.base import get_world


def embedded_judge(world: str) -> Judge:
    """The judge that ships with a world."""
    return Judge(JudgeNet.load(ASSETS / world / "judge"), get_world(world))


def students(bundle: Path, lineage: dict[str, str], artifacts: Artifacts) -> dict[str, Path]:
    """Folders of the student's U-Net after each stage, where the store still has them; the bundle itself is "final"."""
    folders = {}
    for row, stage in (("kd", "unet"), ("warmup", "warmup")):
        digest = lineage.get(stage)
        if digest and artifacts.facts(stage, digest) is not None:
            folders[row] = artifacts.fetch(stage, digest)
    return {**folders, "final": bundle}


def generators(teacher: Teacher, bundle: Path, folders: dict[str, Path], evaluation: EvaluationSection) -> dict[str, Generate]:
    """The compared ways to make an image, in the order of the report."""
    made = Generators(teacher, bundle, evaluation)
    rows: dict[str, Generate] = {"teacher": made.multi_step_teacher()}
    if "kd" in folders:
        rows["kd"] = made.multi_step_student(folders["kd"])
        rows["naive"] = made.one_step(folders["kd"])
    if "warmup" in folders:
        rows["warmup"] = made.one_step(folders["warmup"])
    rows["final"] = made.one_step(folders["final"])
    return rows


def evaluate_bundle(
    bundle: Path,
    manifest: Manifest,
    world: str,
    evaluation: EvaluationSection,
    artifacts: Artifacts,
    progress: Callable[[str], None],
) -> tuple[list[Row], dict[str, Generate]]:
    """Score a bundle beside its teacher; also returns the generators, for pictures. Sets this process to one thread, as served."""
    torch.set_num_threads(1)
    hush()
    teacher = Teacher(teacher_folder(manifest.lineage["teacher"]))
    folders = students(bundle, manifest.lineage, artifacts)
    rows = generators(teacher, bundle, folders, evaluation)
    return score_rows(embedded_judge(world), teacher, rows, evaluation, progress), rows
