"""What a worker notes beside its losses: the wait for the teacher, speed, and grids that change nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxs.settings import Settings
from tests.models import tiny_recipe, tiny_teacher
from trainer.artifacts import open_artifacts
from trainer.cluster import Cluster, StageJob
from trainer.pairs import PairsOrder, draw_pairs
from trainer.recipe import DistillRecipe
from trainer.specs import TeacherSpec
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import Array, InProcessTeacher, Teacher
from trainer.tracking.grids import GAP
from trainer.tracking.observer import GRIDS, Observer, Timed
from trainer.tracking.samples import IMAGES, sample_grid
from trainer.tracking.tracker import SAMPLED

SHAPE, CAPTIONS = (8, 4, 4), ["a red circle", "blue star", "green square", "a cross", "white ring"]


@dataclass
class Slow:
    """A client that takes its time for both halves."""

    def submit(self, _: Any) -> Slow:
        time.sleep(0.03)
        return self

    def result(self) -> list[Array]:
        time.sleep(0.05)
        return []


def job(stage: str, teacher: TeacherSpec | None, every: int = 10) -> StageJob:
    return StageJob(
        stage=stage, digest="d", recipe={}, prompts="", settings={}, inputs={}, teacher=teacher, client=None, board=None,
        cluster=Cluster(checkpoint_every=every),
    )  # fmt: skip


def test_the_wait_is_what_the_caller_was_held_up() -> None:
    client: Any = Timed(Slow())
    assert client.submit(None).result() == []
    assert 0.08 <= client.seconds < 0.5


def test_speed_and_the_share_of_waiting(tmp_path: Path) -> None:
    @dataclass
    class Section:
        batch: int = 32

    class Stage:
        section, steps = Section(), 100

        class context:  # noqa: N801
            teacher = Timed(Slow())

    artifacts = open_artifacts(Settings(store_url=f"file://{tmp_path}", cache_dir=tmp_path))
    observer = Observer(job("unet", TeacherSpec("x")), Stage(), artifacts, lambda *_: None)
    Stage.context.teacher.seconds = 2.0
    found = observer.measured(10, {"loss": 1.0, "seconds_per_step": 0.5})
    assert found == {"loss": 1.0, "seconds_per_step": 0.5, "images_per_second": 64.0, "teacher_wait": 0.4}
    assert observer.measured(10, {"seconds_per_step": 0.5})["teacher_wait"] == 0.0  # since the last report
    nobody = Observer(job("warmup", None), Stage(), artifacts, lambda *_: None)
    assert "teacher_wait" not in nobody.measured(10, {"seconds_per_step": 0.5})


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageContext]:
    """A stage's context by its name, inputs made."""
    folder = tmp_path_factory.mktemp("observer")
    teacher = Teacher(tiny_teacher(folder / "teacher"))
    recipe = DistillRecipe.model_validate(tiny_recipe(teacher.folder, 2))
    client = InProcessTeacher(teacher)
    pairs = draw_pairs(client, PairsOrder.of(CAPTIONS, recipe.pairs, SHAPE, 1), lambda _: None)
    inputs: dict[str, Path] = {}
    found = {}
    for name in ("decoder", "unet", "warmup", "diff_instruct"):
        wanted = {"warmup": ("unet",), "diff_instruct": ("unet",)}.get(name, ())
        found[name] = StageContext(recipe, teacher.folder, client, pairs, {n: inputs[n] for n in wanted})
        if name in ("decoder", "unet"):
            STAGES[name](found[name]).export(folder / name)
            inputs[name] = folder / name
    return found


@pytest.mark.parametrize("name", ["decoder", "unet", "warmup", "diff_instruct"])
def test_a_grid_is_the_same_again_and_leaves_the_stage_as_it_was(contexts: dict[str, StageContext], name: str) -> None:
    stage = STAGES[name](contexts[name])
    torch.manual_seed(5)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in _weights(stage).items()}
    first, second = (sample_grid(name, stage, contexts[name]) for _ in range(2))
    assert first is not None
    assert first.size == (IMAGES * 32 + (IMAGES - 1) * GAP, 2 * 32 + GAP)
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in _weights(stage).items())
    stage.step(0)
    moved = sample_grid(name, stage, contexts[name])
    assert not np.array_equal(np.asarray(moved)[-32:], np.asarray(first)[-32:])  # the stage's row
    assert np.array_equal(np.asarray(moved)[:32], np.asarray(first)[:32])  # the teacher's


def _weights(stage: Any) -> dict[str, torch.Tensor]:
    return dict(stage.trainables["vae" if "vae" in stage.trainables else "unet"].network.state_dict())


def test_grids_lie_beside_the_result_and_are_few(
    contexts: dict[str, StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = open_artifacts(Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache"))
    stage, pinned = STAGES["warmup"](contexts["warmup"]), []
    stage.steps = 100_000
    observer = Observer(job("warmup", None, every=100), stage, artifacts, lambda step, note: pinned.append((step, note)))
    monkeypatch.setattr("trainer.tracking.observer.sample_grid", lambda *_: Image.new("RGB", (4, 4)))
    for step in range(100, 100_001, 100):
        observer.picture(step)
    stored = sorted(artifacts.store.list("stages/warmup/d/samples/"))
    assert len(stored) == len(pinned) == GRIDS
    assert pinned[-1] == (100_000, {SAMPLED: 1.0})
    assert stored[0].endswith("005000.png")


def test_a_picture_is_not_worth_a_run(
    contexts: dict[str, StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    stage: Any = STAGES["unet"](contexts["unet"])
    notes: list[int] = []
    artifacts = open_artifacts(Settings(store_url=f"file://{tmp_path}", cache_dir=tmp_path))
    monkeypatch.setattr(type(artifacts), "put_part", full)
    Observer(job("unet", None), stage, artifacts, lambda step, _: notes.append(step)).picture(stage.steps)
    assert notes == []
    assert "no sample grid of stage unet at step 2" in caplog.text
