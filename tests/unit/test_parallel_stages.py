"""Every stage, shared by two workers in either way, has the curve of one worker that accumulates the same micro-batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.controls import ControlWorld, control_world
from tests.models import tiny_recipe, tiny_teacher
from tests.unit.test_stage_options import CAPTIONS, OPTIONS, SHAPE
from tests.workers import PARALLEL
from trainer.loop import Stage, average_over_workers
from trainer.pairs import Pairs, PairsOrder, draw_pairs
from trainer.placement import Placement
from trainer.recipe import DistillRecipe
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher

STEPS = 2  # what goes wrong between updates shows in the second
SHARED = {
    "unet": ("unet", {}), "warmup": ("warmup", {}), "diff_instruct": ("diff_instruct", {}),
    **{name: OPTIONS[name] for name in ("decoupled", "sid", "latent gan", "online ratio", "online lora", "finish", "straighten")},
}  # fmt: skip
CONTROLS = {"control_shrink": "shrink", "control_diff_instruct": "diff_instruct"}
LOSSES = ("loss", "online", "score_gradient", "realism", "gan", "classifier")


@dataclass(frozen=True)
class Work:
    """What a process needs: the teacher's folder, its pairs, and the student's; and all that of the stages of a ControlNet."""

    teacher: Path
    pairs: Pairs
    student: Path
    controls: ControlWorld

    def curve(self, name: str, parallel: str) -> list[dict[str, float]]:
        """Losses of a stage's first steps: the workers' mean."""
        stage = self._controlled(name, parallel) if name in CONTROLS else self._plain(name, parallel)
        lines = []
        for index in range(STEPS):
            found = {key: float(torch.as_tensor(value).detach()) for key, value in stage.step(index).items() if key in LOSSES}
            lines.append(average_over_workers(found))
        return lines

    def _controlled(self, name: str, parallel: str) -> Stage:
        changes: dict[str, Any] = {CONTROLS[name]: {"micro_batch": 2}, "compute": {"parallel": parallel}}
        recipe = self.controls.recipe(STEPS, **changes)
        placement = Placement.of(recipe.compute, torch.device("cpu"))
        return STAGES[name](self.controls.context(self.controls.client(), placement, recipe))

    def _plain(self, name: str, parallel: str) -> Stage:
        stage_name, change = SHARED[name]
        data = tiny_recipe(self.teacher, STEPS)
        data[stage_name] = {**data.get(stage_name, {}), **change, "micro_batch": 2}
        data["compute"] = {"parallel": parallel}
        recipe, teacher = DistillRecipe.model_validate(data), Teacher(self.teacher)
        inputs = dict.fromkeys(("unet", "warmup", "diff_instruct"), self.student)
        placement = Placement.of(recipe.compute, torch.device("cpu"))
        return STAGES[stage_name](StageContext(recipe, self.teacher, InProcessTeacher(teacher), self.pairs, inputs, placement))


def share(rank: int, work: Work, folder: str) -> None:
    """A worker's process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    curves = {parallel: {name: work.curve(name, parallel) for name in (*SHARED, *CONTROLS)} for parallel in PARALLEL}
    if rank == 0:
        (Path(folder) / "curves.json").write_text(json.dumps(curves))
    dist.destroy_process_group()


@pytest.mark.timeout(400)
def test_two_workers_have_the_curves_of_one(tmp_path: Path) -> None:
    teacher = Teacher(tiny_teacher(tmp_path / "teacher"))
    recipe: Any = DistillRecipe.model_validate(tiny_recipe(teacher.folder, STEPS))
    client = InProcessTeacher(teacher)
    pairs = draw_pairs(client, PairsOrder.of(CAPTIONS, recipe.pairs, SHAPE, 1), lambda _done: None)
    STAGES["unet"](StageContext(recipe, teacher.folder, client, pairs, {})).export(tmp_path / "student")
    work = Work(teacher.folder, pairs, tmp_path / "student", control_world(tmp_path / "controls"))
    spawn(share, args=(work, str(tmp_path)), nprocs=2)
    found = json.loads((tmp_path / "curves.json").read_text())
    for name in (*SHARED, *CONTROLS):
        wanted = work.curve(name, "ddp")
        for parallel in PARALLEL:
            for line, expected in zip(found[parallel][name], wanted, strict=True):
                assert line == pytest.approx(expected, rel=2e-3, abs=1e-3), (name, parallel)
