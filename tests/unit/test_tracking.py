"""The run folder, TensorBoard and MLflow: what is written, what a resumed run does to it, read back by their own readers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxs.errors import PreconditionFailed
from sdxs.settings import Settings
from tests.models import tiny_recipe
from trainer.artifacts import Artifacts, open_artifacts
from trainer.recipe import DistillRecipe
from trainer.tracking.board import Board
from trainer.tracking.grids import GAP, grid
from trainer.tracking.page import draw_curve
from trainer.tracking.sinks import URI, MLflow, TensorBoard, flat, sinks
from trainer.tracking.tracker import SAMPLED, Tracker, read_curve, told

RECIPE = DistillRecipe.model_validate(tiny_recipe(Path("teacher")))
DIGESTS = {"pairs": "p1", "unet": "u1", "decoder": "d1"}


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return open_artifacts(Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache"))


def tracker(tmp_path: Path, artifacts: Artifacts, digests: dict[str, str] | None = None) -> Tracker:
    folder = tmp_path / "mine.run"
    made = Tracker(folder, artifacts, [TensorBoard(folder / "tensorboard")])
    made.begin(RECIPE, digests or DIGESTS)
    return made


def scalars(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def leave_grid(artifacts: Artifacts, stage: str, step: int, tmp_path: Path) -> None:
    """As a worker does."""
    Image.new("RGB", (8, 4), (step % 256, 0, 0)).save(tmp_path / "grid.png")
    artifacts.put_part(stage, DIGESTS[stage], f"samples/{step:06}.png", tmp_path / "grid.png")


def test_a_resumed_stage_goes_on_with_its_curve(tmp_path: Path, artifacts: Artifacts) -> None:
    first = tracker(tmp_path, artifacts)
    for step in (10, 20, 30):
        first("unet", step, 40, {"loss": step / 100, "worker_pid": 7})
    first("unet", 30, 40, {"loss": 0.3, "worker_pid": 7})  # the board is read again
    first("unet", 20, 40, {"loss": 0.21})  # the worker came back from the checkpoint at 10
    again = tracker(tmp_path, artifacts)  # and then the driver, from the same one
    again("unet", 20, 40, {"loss": 0.22})
    again("unet", 30, 40, {"loss": 0.32})
    expected = [(10, 0.1), (20, 0.22), (30, 0.32)]
    rows = read_curve(tmp_path / "mine.run" / "curves" / "unet.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == expected
    assert all("worker_pid" not in row for row in rows)
    again.finish()
    assert scalars(tmp_path / "mine.run" / "tensorboard" / "unet") == expected


def test_a_curve_that_breaks_off_is_read_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text('{"step": 10, "loss": 1}\n{"step": 20, "lo')
    assert read_curve(tmp_path / "curve.jsonl") == [{"step": 10, "loss": 1}]


def test_the_folder_can_be_read_without_a_server(tmp_path: Path, artifacts: Artifacts) -> None:
    made = tracker(tmp_path, artifacts)
    made("pairs", 5, 16, {})
    made("unet", 10, 20, {"loss": 0.5, "images_per_second": 3.0})
    leave_grid(artifacts, "unet", 10, tmp_path)
    made("unet", 10, 20, {SAMPLED: 1.0})
    made("unet", 20, 20, {"loss": 0.4, "images_per_second": 4.0})
    made.finish()
    folder = tmp_path / "mine.run"
    page = (folder / "index.html").read_text()
    for name in ("curves/unet.png", "curves/unet.jsonl", "samples/unet-000010.png", "recipe.json", "versions.json"):
        assert f'"{name}"' in page
        assert (folder / name).stat().st_size
    assert "http" not in page.replace("https://", "http")  # nothing from elsewhere
    assert json.loads((folder / "recipe.json").read_text()) == RECIPE.model_dump(mode="json")
    versions = json.loads((folder / "versions.json").read_text())
    assert {"python", "torch", "diffusers", "ray", "source", "machine"} <= versions.keys()
    assert versions["machine"]["cpus"] >= 1


def test_a_reused_stage_has_its_curve_and_grids_from_the_store(tmp_path: Path, artifacts: Artifacts) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "log.jsonl").write_text('{"step": 10, "loss": 0.7}\n{"step": 20, "loss": 0.6}\n')
    artifacts.save("decoder", "d1", result, {})
    leave_grid(artifacts, "decoder", 20, tmp_path)
    made = tracker(tmp_path, artifacts)
    made("decoder", 1, 1, {"reused": 1.0})
    made.finish()
    folder = tmp_path / "mine.run"
    assert [row["loss"] for row in read_curve(folder / "curves" / "decoder.jsonl")] == [0.7, 0.6]
    assert (folder / "samples" / "decoder-000020.png").exists()
    assert scalars(folder / "tensorboard" / "decoder") == [(10, 0.7), (20, 0.6)]


def test_a_stage_whose_inputs_changed_begins_anew_and_others_stay(tmp_path: Path, artifacts: Artifacts) -> None:
    first = tracker(tmp_path, artifacts)
    for stage in ("unet", "decoder"):
        first(stage, 10, 20, {"loss": 1.0})
    first.finish()
    again = tracker(tmp_path, artifacts, DIGESTS | {"unet": "u2"})
    folder = tmp_path / "mine.run"
    assert not [*folder.glob("curves/unet.*"), *folder.glob("tensorboard/unet")]
    assert read_curve(folder / "curves" / "decoder.jsonl")
    again("unet", 10, 20, {"loss": 2.0})
    assert [row["loss"] for row in read_curve(folder / "curves" / "unet.jsonl")] == [2.0]


def test_bars_hear_of_reports_and_not_of_grids(tmp_path: Path, artifacts: Artifacts) -> None:
    made, heard = tracker(tmp_path, artifacts), []
    watch = told(made, lambda *note: heard.append(note))
    leave_grid(artifacts, "unet", 10, tmp_path)
    watch("unet", 10, 20, {"loss": 1.0})
    watch("unet", 10, 20, {SAMPLED: 1.0})
    assert heard == [("unet", 10, 20, {"loss": 1.0})]


def test_the_board_keeps_every_note() -> None:
    actor: Any = Board
    board = actor.__ray_metadata__.modified_class()  # the class itself, without an actor
    for step in (10, 20, 30):
        board.pin("unet", step, 30, {"loss": 0.1})
    assert [note[0] for note in board.since("unet", 1)] == [20, 30]
    assert board.since("unet", 3) == board.since("decoder", 0) == []
    assert board.read()["unet"][0] == 30


def test_mlflow_is_asked_for_by_name_and_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI, raising=False)
    assert [type(sink) for sink in sinks(tmp_path)] == [TensorBoard]
    monkeypatch.setenv(URI, f"file://{tmp_path}/mlruns")
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    with pytest.raises(PreconditionFailed, match="mlflow-skinny"):
        sinks(tmp_path)


def test_mlflow_has_each_step_once(tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv(URI, f"file://{tmp_path}/mlruns")
    folder = tmp_path / "mine.run"
    for steps in ((10, 20), (20, 30)):  # the second run begins again at the checkpoint
        made = Tracker(folder, artifacts, [MLflow(folder)])
        made.begin(RECIPE, DIGESTS)
        for step in steps:
            made("unet", step, 30, {"loss": step / 100})
        made.finish()
    from mlflow import MlflowClient

    run = MlflowClient().get_run((folder / "mlflow.txt").read_text())
    history = MlflowClient().get_metric_history(run.info.run_id, "unet/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert run.data.params["unet.steps"] == str(RECIPE.unet.steps)
    assert run.info.run_name == RECIPE.name


def test_flat_names() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_a_grid_puts_every_image_where_it_belongs() -> None:
    rows = [np.full((3, 4, 5, 3), 10 * i, np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None] for i in (1, 2)]
    sheet = np.asarray(grid(rows))
    assert sheet.shape == (2 * 4 + GAP, 3 * 5 + 2 * GAP, 3)
    assert [[int(sheet[i * (4 + GAP), j * (5 + GAP), 0]) for j in range(3)] for i in range(2)] == [[10, 11, 12], [20, 21, 22]]
    assert (sheet[4 : 4 + GAP] == 255).all()


def test_a_curve_with_gaps_is_drawn(tmp_path: Path) -> None:
    draw_curve("decoder", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "gan": 0.1}], tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size[0] > 300
