"""Faults in the middle of a stage on Ray Train with a real S3 server: the curve afterwards is the one without them, to the last bit.

The stages before are made once; each test runs the last one again from its beginning, with its fault.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdxs.errors import Aborted
from sdxs.settings import Settings
from sdxs.store import open_store
from tests.gate import Gate, gate
from tests.models import tiny_recipe, tiny_teacher
from trainer.artifacts import open_artifacts
from trainer.cluster import Cluster
from trainer.distill import Distillation
from trainer.recipe import DistillRecipe
from trainer.session import ray_session
from trainer.tracking.sinks import TensorBoard
from trainer.tracking.tracker import Tracker, read_curve, told

STEPS, EVERY, FAULT = 150, 30, 70  # the fault comes at the first report from step FAULT on: between two checkpoints
LAST = "diff_instruct"
TIMES = ("seconds_per_step", "images_per_second", "teacher_wait")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Act = Callable[[Distillation, dict[str, float]], None]


@dataclass
class Bench:
    """A recipe whose stages before the last are done, in a store behind a gate."""

    folder: Path
    data: dict[str, Any]
    door: Gate
    scratch: Path
    curve: list[dict[str, float]]

    def run(self, act: Act | None = None, **change: Any) -> list[dict[str, float]]:
        """The last stage from its beginning, with `act` once at its fault; its curve, without times."""
        settings = Settings()
        acted: list[int] = []

        def watch(stage: str, done: int, steps: int, metrics: dict[str, float]) -> None:
            if stage == LAST and act is not None and not acted and done >= FAULT and done < steps:
                acted.append(done)
                act(distillation, metrics)

        recipe = DistillRecipe.model_validate(self.data | ({LAST: self.data[LAST] | change} if change else {}))
        run_folder = self.folder / "bundle.run"
        tracker = Tracker(run_folder, open_artifacts(settings), [TensorBoard(run_folder / "tensorboard")])
        distillation = Distillation(recipe, settings, Cluster(checkpoint_every=EVERY), told(tracker, watch))
        with tracker.run(recipe, {step.name: step.digest for step in distillation.plan()}):
            distillation.run(self.folder / "bundle")
        assert bool(acted) == (act is not None)
        log = distillation.artifacts.fetch(LAST, distillation.result.digests[LAST]) / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert read_curve(run_folder / "curves" / f"{LAST}.jsonl") == lines
        assert (run_folder / "samples" / f"{LAST}-{STEPS:06}.png").stat().st_size
        return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

    def forget(self) -> None:
        """Remove the last stage's result and checkpoints."""
        store = open_store(Settings(), "checkpoints")
        for key in [*store.list(f"stages/{LAST}/"), *store.list(f"runs/{LAST}-")]:
            store.delete(key)
        shutil.rmtree(self.folder / "cache" / "artifacts" / "stages" / LAST, ignore_errors=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where workers write checkpoints before they are uploaded: a small file system of its own where that is allowed."""
    folder = tmp_path_factory.mktemp("scratch")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, s3_variables: dict[str, str], scratch: Path) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    data = tiny_recipe(tiny_teacher(folder / "teacher"), steps=3)
    data[LAST]["steps"] = STEPS
    del data["compositions"]
    with gate(s3_variables["SDXS_S3_ENDPOINT"]) as door, pytest.MonkeyPatch.context() as patch:
        variables = s3_variables | {
            "SDXS_S3_ENDPOINT": f"127.0.0.1:{door.port}", "SDXS_CACHE_DIR": str(folder / "cache"),
            "TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp",
        }  # fmt: skip
        for name, value in variables.items():
            patch.setenv(name, value)
        made = Bench(folder, data, door, scratch, [])
        with ray_session():
            made.curve = made.run()
            assert [line["step"] for line in made.curve] == list(range(10, STEPS + 1, 10))
            yield made


@pytest.fixture(autouse=True)
def fresh(bench: Bench) -> None:
    bench.forget()


def test_two_unbroken_runs_have_one_curve(bench: Bench) -> None:
    assert bench.run() == bench.curve


def test_a_killed_worker_goes_on_from_its_checkpoint(bench: Bench) -> None:
    assert bench.run(lambda _, metrics: os.kill(int(metrics["worker_pid"]), signal.SIGKILL)) == bench.curve


def test_a_killed_teacher_is_started_again(bench: Bench) -> None:
    def kill(distillation: Distillation, _metrics: dict[str, float]) -> None:
        [pool] = distillation.pools.values()
        [member] = pool.statistics()
        os.kill(int(member["pid"]), signal.SIGKILL)

    assert bench.run(kill) == bench.curve


def test_training_waits_for_a_store_that_is_away(bench: Bench) -> None:
    """For 30 seconds, with checkpoints due in them."""
    assert bench.run(lambda *_: bench.door.shut_for(30)) == bench.curve


def test_a_full_disk_is_said_and_nothing_is_lost(bench: Bench) -> None:
    if not os.path.ismount(bench.scratch):
        pytest.skip("a small file system cannot be mounted here")
    ballast = bench.scratch / "ballast"

    def fill(*_: object) -> None:
        """But for room that the curve's lines fit into, and a state does not."""
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                file.truncate(file.tell() - (1 << 17))

    with pytest.raises(Aborted, match=rf"stage {LAST}: no space left on .*Run the same command again"):
        bench.run(fill)
    ballast.unlink()
    assert bench.run() == bench.curve


def test_a_loss_that_is_not_finite_is_said_at_once(bench: Bench) -> None:
    began = time.monotonic()
    with pytest.raises(Aborted, match=rf"stage {LAST}: step \d+: loss .*no weight was changed"):
        bench.run(lr=1e30)
    assert time.monotonic() - began < 120


def test_a_killed_driver_goes_on_where_it_was(bench: Bench) -> None:
    """The command itself, in a process that is killed with everything it started, then run again."""
    recipe = bench.folder / "recipe.json"
    recipe.write_text(json.dumps(bench.data))
    program = "import sys; from tests.e2e.test_faults import drive; drive(sys.argv[1])"
    command = [sys.executable, "-c", program, str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        assert first.stdout is not None
        assert any(int(line) >= FAULT for line in first.stdout)
        os.kill(first.pid, signal.SIGKILL)
    subprocess.run([*command], check=True, stdout=subprocess.DEVNULL)
    assert bench.run() == bench.curve


def drive(recipe: str) -> None:
    """A driver of its own; prints the last stage's steps."""

    def watch(stage: str, done: int, _steps: int, _metrics: dict[str, float]) -> None:
        if stage == LAST:
            print(done, flush=True)

    data = DistillRecipe.model_validate_json(Path(recipe).read_text())
    with ray_session():
        Distillation(data, Settings(), Cluster(checkpoint_every=EVERY), watch).run(Path(recipe).parent / "driven")
