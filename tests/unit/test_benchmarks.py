"""The benchmarks that measure at the real sizes, run small: do they run, and are their numbers what they are called."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ablation, cluster_model, full_size, pool
from trainer.models.families import write_teacher
from trainer.pool.cluster_model import Cluster, Network, predict
from trainer.sources import latent_shape
from trainer.teacher import Denoise, Teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a small `sd21`."""
    made = tmp_path_factory.mktemp("benchmarks")
    write_teacher("sd21", made / "sd21", dtype=torch.bfloat16)
    return made


def operations(folder: Path, batch: int, guidance: float) -> int:
    """Of one answer of the teacher that knows its captions."""
    teacher = Teacher(folder)
    noisy = np.zeros((batch, *latent_shape(folder)), np.float16)
    request = Denoise(noisy, np.full(batch, 500), full_size.CAPTIONS[:1] * batch, guidance)
    teacher.answer(request)
    with FlopCounterMode(display=False) as counter:
        teacher.answer(request)
    return int(counter.get_total_flops())


def test_full_size_run_small_counts_the_teacher_too(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(full_size, "RESULTS", tmp_path / "full_size.jsonl")
    full_size.main(["sd21", "--small", "--batch", "2", "--device", "cpu", "--folder", str(folder)])
    lines = {line["stage"]: line for line in map(json.loads, (tmp_path / "full_size.jsonl").read_text().splitlines())}
    assert list(lines) == ["unet", "warmup", "diff_instruct"]
    assert all(math.isfinite(loss) for line in lines.values() for loss in line["losses"])
    for line in lines.values():
        assert line["tflop_per_step"] > 0 and len(line["losses"]) == 2
        assert line["images_per_second"] == pytest.approx(2 / line["seconds_per_step"], rel=0.2)
    teacher = {stage: line["teacher_tflop_per_step"] for stage, line in lines.items()}
    one, guided = (operations(folder / "sd21", 2, guidance) / 1e12 for guidance in (1.0, 2.0))
    assert teacher["diff_instruct"] == pytest.approx(guided, rel=0.02) and guided == pytest.approx(2 * one)
    assert teacher["unet"] == pytest.approx(one, rel=0.02)
    assert teacher["warmup"] == 0


def test_the_share_of_the_peak_is_operations_over_what_the_device_could_do() -> None:
    assert full_size.share_of_peak(989e12, 2.0, "NVIDIA H100 80GB HBM3") == {"share_of_peak": 0.5}
    assert full_size.share_of_peak(31.2e12, 1.0, "NVIDIA A100-SXM4-80GB") == {"share_of_peak": 0.1}
    assert full_size.share_of_peak(1e12, 1.0, "another") == {}


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_the_pool_benchmark_takes_a_family(tmp_path: Path, family: str) -> None:
    """Its worker without Ray: every load with a teacher of its own, and with one that answers at once."""
    write_teacher(family, tmp_path / family, dtype=torch.bfloat16)
    setting = pool.Setting(str(tmp_path / family), family, batch=2)
    worker = pool.Worker(setting, {})
    for load in ("kd", "sdi"):
        own, free = (worker.run(pool.Arm(name or "own", load, 1, name), 0.2) for name in (None, pool.FREE))
        latent = 2 * 2 * math.prod(latent_shape(tmp_path / family))  # two images, float16
        assert own["received"] == free["received"]
        assert own["received"] > 2 * latent if load == "kd" else own["received"] == latent
        assert 0 <= free["waited"] < free["seconds"] and own["steps"] and free["steps"]
    lines = pool.batch_efficiency(setting, 1, (1, 4))
    assert [line["teacher_batch"] for line in lines] == [1, 4]
    assert all(line["forward_s"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pool_benchmark_writes_what_the_cluster_model_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.machine.RESULTS", tmp_path)
    options = ["--family", "sd21", "--small", "--device", "cpu", "--batch", "2", "--rounds", "1", "--seconds", "0.5"]
    pool.main(options)
    lines = [json.loads(line) for line in (tmp_path / "pool_sd21_small_cpu.jsonl").read_text().splitlines()]
    assert {line["pool"] for line in lines if "pool" in line} == {None, "one", "joining"}
    cases = cluster_model.measured(lines)
    assert [name.split(",")[0] for name, *_ in cases] == ["KD", "SDI"]
    assert all(predict(Cluster(device, 8, network), load, 0).images_per_s > 0 for _, device, load, network in cases)


def lines_of(seconds: float, half: float, away: float) -> list[dict[str, Any]]:
    """A result file of a teacher whose forward of b images takes seconds (b + half), at batches of 16."""
    facts = {"machine": {"cpu": "c", "gpu": "G", "memory": 80e9}, "family": "sd21", "batch": 16}
    alone: list[dict[str, Any]] = [{"teacher_batch": b, "forward_s": seconds * (b + half)} for b in (1, 2, 4, 8, 16)]
    steps: list[dict[str, Any]] = [
        {"load": load, "worker_step_s": 3 * seconds * (16 + half), "bytes": 1000.0} for load in ("kd", "sdi")
    ]
    return [{**facts, **line} for line in [*alone, *steps, {"there_and_back_s": away + seconds * (1 + half)}]]


def test_measured_costs_come_back_from_the_cluster_model() -> None:
    """With an in-worker teacher a step of batch b must take what was measured: the worker's part and the teacher's after it."""
    kd, sdi = cluster_model.measured(lines_of(0.01, 2.5, 0.004))
    for (name, device, load, network), forwards in ((kd, 1), (sdi, 2)):
        assert name.endswith("sd21, measured on G") and device.memory == 80e9
        assert device.half_batch == pytest.approx(2.5) and network.round_trip == pytest.approx(0.004)
        assert device.seconds(load.worker_flops, 16) == pytest.approx(3 * 0.01 * 18.5)
        assert device.seconds(load.teacher_flops, 16) == pytest.approx(forwards * 0.01 * 18.5)
        assert load.bytes == 1000.0
        found = predict(Cluster(device, 1, Network()), replace(load, images=16), 0)
        assert found.images_per_s == pytest.approx(16 / ((3 + forwards) * 0.01 * 18.5))
    assert "measured on G" in cluster_model.table([kd, sdi])


def test_measurements_of_a_busy_machine_are_refused() -> None:
    with pytest.raises(ValueError, match="do not grow"):
        cluster_model.measured([{**line, "forward_s": 1 / line["teacher_batch"]} for line in lines_of(0.01, 2.0, 0.0)[:5]])


def test_a_family_without_counted_memory_has_no_measured_case() -> None:
    lines = [{**line, "family": "emoji"} for line in lines_of(0.01, 2.0, 0.0)]
    assert cluster_model.measured(lines) == []


@dataclass
class Trained:
    """In place of an ablation: rows at once, all told in `rows`."""

    world: str
    folder: Path
    trained: bool
    rows: ClassVar[list[tuple[str, bool, str, int]]] = []

    def row(self, name: str, seed: int) -> dict[str, Any]:
        self.rows.append((self.world, self.trained, name, seed))
        return dict.fromkeys(ablation.MEASURES, 0.25 * seed)


def test_the_ablation_is_one_command_that_trains_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All sections from nothing; a second call trains one row that was taken away, a third nothing."""
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    monkeypatch.setattr(ablation, "TABLE", tmp_path / "ablation.md")
    monkeypatch.setattr(ablation, "Ablation", Trained)
    Trained.rows.clear()
    (tmp_path / "ablation.md").write_text("# Kept\n\n<!-- table -->\n\nold\n")
    ablation.main(["--seeds", "2"])
    whole = {(world, False, row, seed) for world in ("scenes", "emoji") for row in ablation.ROWS for seed in (1, 2)}
    assert set(Trained.rows) == whole | {("emoji", True, row, seed) for row in ablation.TRAINED_ROWS for seed in (1, 2)}
    text = (tmp_path / "ablation.md").read_text()
    assert text.startswith("# Kept") and "old" not in text and text.count("\n## ") == 3
    assert "| SDI | 2 |  | 37.5 ± 12.5 | 0.38 ± 0.12 |" in text

    lines = (tmp_path / "ablation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ablation.jsonl").write_text("".join(lines[:3] + lines[4:]))
    taken = json.loads(lines[3])
    for expected in ([("scenes", False, taken["row"], taken["seed"])], []):
        Trained.rows.clear()
        ablation.main(["--seeds", "2"])
        assert Trained.rows == expected
        assert (tmp_path / "ablation.md").read_text() == text


def test_the_ablation_can_be_run_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    monkeypatch.setattr(ablation, "TABLE", tmp_path / "ablation.md")
    monkeypatch.setattr(ablation, "Ablation", Trained)
    Trained.rows.clear()
    ablation.main(["emoji", "--trained", "--seeds", "1"])
    ablation.main(["scenes", "--rows", "SDI", "--seeds", "1"])
    assert Trained.rows == [*(("emoji", True, row, 1) for row in ablation.TRAINED_ROWS), ("scenes", False, "SDI", 1)]
    assert not (tmp_path / "ablation.md").exists()
    ablation.main(["--table"])
    assert "## scenes" in (tmp_path / "ablation.md").read_text()
    with pytest.raises(SystemExit):
        ablation.main(["--trained"])
