"""A whole distillation on Ray Train with a real S3 server, a worker and a teacher both killed on the way. The teacher is named by a
relative path, which workers and pool must read from the command's folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sdxs.bundle import read
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.store import open_store
from tests.models import tiny_recipe, tiny_teacher
from trainer.artifacts import Artifacts
from trainer.cluster import Cluster
from trainer.distill import Distillation, Result
from trainer.recipe import DistillRecipe
from trainer.session import ray_session

STEPS = 300
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Saboteur:
    """A watcher that kills the training worker once, in the warm-up, and the teacher once, in the next stage."""

    distillation: Distillation | None = None
    killed: dict[str, int] = field(default_factory=dict)

    def __call__(self, stage: str, done: int, steps: int, metrics: dict[str, float]) -> None:
        if not 0 < done < steps:
            return
        if stage == "warmup" and "worker" not in self.killed:
            self._kill("worker", int(metrics["worker_pid"]))
        if stage == "diff_instruct" and "teacher" not in self.killed:
            assert self.distillation is not None
            [member] = [member for pool in self.distillation.pools.values() for member in pool.statistics()]
            self._kill("teacher", int(member["pid"]))

    def _kill(self, name: str, pid: int) -> None:
        self.killed[name] = pid
        os.kill(pid, signal.SIGKILL)


@dataclass
class Run:
    """A finished distillation and what is needed to look at it."""

    first: Result
    second: Result
    killed: dict[str, int]
    recipe: DistillRecipe
    settings: Settings
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, s3_variables: dict[str, str]) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("training")
    data = tiny_recipe(tiny_teacher(folder / "teacher").relative_to(folder))
    data["warmup"]["steps"] = data["diff_instruct"]["steps"] = STEPS
    recipe = DistillRecipe.model_validate(data)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_variables, "SDXS_CACHE_DIR": str(folder / "cache")}.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        settings, saboteur = Settings(), Saboteur()
        cluster = Cluster(checkpoint_every=50)
        with ray_session():
            saboteur.distillation = Distillation(recipe, settings, cluster, saboteur)
            first = saboteur.distillation.run(folder / "bundle")
            second = Distillation(recipe, settings, cluster, saboteur).run(folder / "again")
        yield Run(first, second, saboteur.killed, recipe, settings, folder)


def test_survives_the_death_of_a_worker_and_of_a_teacher(finished: Run) -> None:
    assert set(finished.killed) == {"worker", "teacher"}
    assert set(finished.first.seconds) == {"pairs", "compositions", "decoder", "unet", "warmup", "diff_instruct"}
    assert finished.first.reused == []


def test_the_curve_after_a_kill_has_every_step_once(finished: Run) -> None:
    artifacts = Artifacts(open_store(finished.settings, "checkpoints"), finished.settings.cache_dir / "artifacts")
    for stage in ("warmup", "diff_instruct"):
        log = artifacts.fetch(stage, finished.first.digests[stage]) / "log.jsonl"
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == list(range(10, STEPS + 1, 10))


def test_a_second_run_reuses_every_stage_and_seals_the_same_bundle(finished: Run) -> None:
    assert finished.second.reused == ["pairs", "compositions", "decoder", "unet", "warmup", "diff_instruct"]
    assert read(finished.folder / "again").digest == read(finished.folder / "bundle").digest


def test_the_bundle_generates_and_knows_where_it_comes_from(finished: Run) -> None:
    manifest = read(finished.folder / "bundle")
    assert manifest.lineage["unet"] == finished.first.digests["unet"]
    assert manifest.dtype == "F16"
    [image] = OneStepPipeline.from_bundle(finished.folder / "bundle", finished.settings)("red circle", seed=3)
    assert image.size == (32, 32)
