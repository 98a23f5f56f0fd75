"""One stage on Ray Train by clusters of other shapes: the same draws, and the curve of one worker with one teacher."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayCluster

from sdxs.settings import Settings
from sdxs.store import open_store
from tests.models import tiny_recipe, tiny_teacher
from trainer.cluster import Cluster
from trainer.distill import Distillation
from trainer.recipe import DistillRecipe
from trainer.session import LOCAL_RAY, ray_session

STEPS, EVERY, FAULT = 60, 20, 30
LAST = "diff_instruct"
LOSSES = ("loss", "score_gradient", "feature_matching", "online")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Watcher:
    """Notes the processes that report and how many work; in the middle it once does what it is given a process for."""

    act: Callable[[int], object] | None = None
    processes: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)

    def __call__(self, stage: str, done: int, steps: int, metrics: dict[str, float]) -> None:
        if stage != LAST or "worker_pid" not in metrics:
            return
        self.workers.append(int(metrics["workers"]))
        process = int(metrics["worker_pid"])
        if process not in self.processes:
            self.processes.append(process)
        if self.act is not None and FAULT <= done < steps:
            act, self.act = self.act, None
            act(process)


@dataclass
class Bench:
    """Two nodes with room for a teacher and two workers, and a recipe whose stages before the last are done."""

    folder: Path
    data: dict[str, Any]
    nodes: RayCluster
    curve: dict[str, list[float]] = field(default_factory=dict)

    def run(self, cluster: Cluster, watch: Watcher | None = None, parallel: str = "ddp") -> dict[str, list[float]]:
        """The last stage's losses, from its beginning."""
        recipe = DistillRecipe.model_validate({**self.data, "compute": {"parallel": parallel}})
        distillation = Distillation(recipe, Settings(), cluster, watch or Watcher())
        distillation.run(self.folder / "bundle")
        log = distillation.artifacts.fetch(LAST, distillation.result.digests[LAST]) / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(10, STEPS + 1, 10))
        return {name: [line[name] for line in lines] for name in LOSSES}

    def forget(self) -> None:
        store = open_store(Settings(), "checkpoints")
        for key in [*store.list(f"stages/{LAST}/"), *store.list(f"runs/{LAST}-")]:
            store.delete(key)
        shutil.rmtree(self.folder / "cache" / "artifacts" / "stages" / LAST, ignore_errors=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("cluster")
    data = tiny_recipe(tiny_teacher(folder / "teacher"), steps=4)
    del data["compositions"]
    for stage in ("decoder", "unet", "warmup", LAST):
        data[stage]["micro_batch"] = 2
    data[LAST]["steps"] = STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXS_STORE_URL", f"file://{folder}/store")
        patch.setenv("SDXS_CACHE_DIR", str(folder / "cache"))
        for name, value in LOCAL_RAY.items():
            patch.setenv(name, value)
        nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            nodes.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", nodes.address)
            made = Bench(folder, data, nodes)
            with ray_session():
                made.curve = made.run(Cluster(checkpoint_every=EVERY))
                yield made
        finally:
            nodes.shutdown()


@pytest.fixture(autouse=True)
def fresh(bench: Bench) -> None:
    bench.forget()


def assert_close(found: dict[str, list[float]], expected: dict[str, list[float]], rel: float = 2e-3) -> None:
    for name in LOSSES:
        assert found[name] == pytest.approx(expected[name], rel=rel), name


def test_a_teacher_inside_the_worker(bench: Bench) -> None:
    assert bench.run(Cluster(teachers=0, checkpoint_every=EVERY)) == bench.curve


def test_two_workers(bench: Bench) -> None:
    assert_close(bench.run(Cluster(workers=2, checkpoint_every=EVERY)), bench.curve)


def test_two_workers_that_shard_their_networks(bench: Bench) -> None:
    """The stages before were sharded too, and rounded otherwise: a run this small and fast then drifts apart by a few per cent."""
    assert_close(bench.run(Cluster(workers=2, checkpoint_every=EVERY), parallel="fsdp"), bench.curve, rel=0.05)


def test_two_workers_of_which_one_dies(bench: Bench) -> None:
    watch = Watcher(lambda process: os.kill(process, signal.SIGKILL))
    assert_close(bench.run(Cluster(workers=2, checkpoint_every=EVERY), watch), bench.curve)
    assert len(watch.processes) == 2


def test_an_elastic_run_goes_on_when_a_node_is_lost(bench: Bench) -> None:
    """What stays has room for a teacher and one worker. Ray's policy does not count actors: untold, it waits for a second worker."""
    [second] = bench.nodes.worker_nodes
    watch = Watcher(lambda _: bench.nodes.remove_node(second, allow_graceful=False))
    found = bench.run(Cluster(workers=(1, 2), checkpoint_every=EVERY), watch)
    bench.nodes.add_node(num_cpus=1)
    assert_close(found, bench.curve)
    assert (watch.workers[0], watch.workers[-1]) == (2, 1)
