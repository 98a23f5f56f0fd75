"""The run folder, TensorBoard and MLflow: what is written, what a resumed run does to it, read back by their own readers."""

from __future__ import annotations

import json
import math
import sys
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.exceptions import RayActorError

from sdxs.embedded import free_port
from sdxs.errors import PreconditionFailed, Unavailable
from sdxs.settings import Settings
from tests.models import tiny_recipe
from trainer.artifacts import Artifacts, open_artifacts
from trainer.launch import _Watching
from trainer.recipe import DistillRecipe
from trainer.tracking.board import Board
from trainer.tracking.grids import GAP, grid
from trainer.tracking.page import draw_curve
from trainer.tracking.sinks import HASTY, URI, MLflow, TensorBoard, flat, sinks
from trainer.tracking.telling import TRIES, Telling
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


def test_a_grid_is_the_same_picture_in_tensorboard(tmp_path: Path, artifacts: Artifacts) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = tracker(tmp_path, artifacts)
    for step in (10, 20):
        leave_grid(artifacts, "unet", step, tmp_path)
        made("unet", step, 20, {SAMPLED: 1.0})
    made.finish()
    events = EventAccumulator(str(tmp_path / "mine.run" / "tensorboard" / "unet"))
    events.Reload()
    shown = events.Images("samples")
    assert [image.step for image in shown] == [10, 20]
    for image in shown:
        with Image.open(BytesIO(image.encoded_image_string)) as read:
            assert read.size == (8, 4)
            assert np.asarray(read.convert("RGB")).reshape(-1, 3).tolist() == [[image.step, 0, 0]] * 32


def test_a_grid_is_an_artifact_in_mlflow(tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv(URI, f"file://{tmp_path}/mlruns")
    folder = tmp_path / "mine.run"
    made = Tracker(folder, artifacts, [MLflow(folder)])
    made.begin(RECIPE, DIGESTS)
    leave_grid(artifacts, "unet", 10, tmp_path)
    made("unet", 10, 20, {SAMPLED: 1.0})
    made.finish()
    [run] = (tmp_path / "mlruns").glob("*/" + (folder / "mlflow.txt").read_text())
    with Image.open(run / "artifacts" / "samples" / "unet-000010.png") as image:
        assert np.asarray(image)[0, 0].tolist() == [10, 0, 0]
    assert (run / "artifacts" / "index.html").read_text() == (folder / "index.html").read_text()


def test_mlflow_that_is_not_there_at_the_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv(URI, f"http://127.0.0.1:{free_port()}")
    for name in HASTY:
        monkeypatch.setenv(name, "0" if "RETRIES" in name else "2")
    with pytest.raises(Unavailable, match=rf"{URI}=http://127\.0\.0\.1"):
        MLflow(tmp_path).begin(RECIPE)


class Away:
    """A store that cannot be reached the first `times` calls."""

    def __init__(self, store: Any, times: float) -> None:
        self.store, self.times = store, times

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.times -= 1
            if self.times >= 0:
                raise Unavailable("the store is away")
            return getattr(self.store, name)(*arguments)

        return call


def test_a_store_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.artifacts.time.sleep", lambda _: None)
    made = tracker(tmp_path, artifacts)
    result = tmp_path / "result"
    result.mkdir()
    (result / "log.jsonl").write_text('{"step": 10, "loss": 0.7}\n')
    artifacts.save("unet", "u1", result, {})
    leave_grid(artifacts, "unet", 10, tmp_path)
    made.artifacts = Artifacts(Away(artifacts.store, 3), artifacts.cache)
    made("unet", 10, 20, {SAMPLED: 1.0})
    assert (tmp_path / "mine.run" / "samples" / "unet-000010.png").exists()
    made.artifacts = Artifacts(Away(artifacts.store, 3), artifacts.cache)
    made.finish()
    assert [row["loss"] for row in read_curve(tmp_path / "mine.run" / "curves" / "unet.jsonl")] == [0.7]
    assert not caplog.records


def test_a_store_that_stays_away_costs_no_run(
    tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.artifacts.PATIENCE_S", 0.0)
    made = Tracker(tmp_path / "mine.run", Artifacts(Away(artifacts.store, math.inf), artifacts.cache))
    with made.run(RECIPE, DIGESTS):
        made("unet", 10, 20, {SAMPLED: 1.0})
        made("unet", 10, 20, {"loss": 0.5})
    assert "without a report of stage unet at step 10" in caplog.text
    assert "without what the stages left in the store" in caplog.text
    assert '"curves/unet.png"' in (tmp_path / "mine.run" / "index.html").read_text()


class Moody:
    """A sink that refuses its first calls, and remembers the others."""

    def __init__(self, refusals: float) -> None:
        self.refusals, self.told = refusals, list[Any]()

    def begin(self, recipe: Any) -> None: ...

    def row(self, stage: str, row: dict[str, float]) -> None:
        self._note(row["loss"])

    def picture(self, stage: str, step: int, path: Path) -> None:
        self._note(path.name)

    def finish(self, folder: Path) -> None:
        self._note("the end")

    def _note(self, what: Any) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError("refused")
        self.told.append(what)


@pytest.mark.parametrize("pause", [0.0, 1000.0])
def test_a_sink_that_was_away_is_told_later_in_order(
    tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pause: float
) -> None:
    monkeypatch.setattr("trainer.tracking.telling.PAUSE_S", pause)
    sink = Moody(1 if pause else 3)
    made = Tracker(tmp_path / "mine.run", artifacts, [sink])
    with made.run(RECIPE, DIGESTS):
        for step in range(1, 6):
            made("unet", step, 5, {"loss": step})
        assert sink.told == ([] if pause else [1, 2, 3, 4, 5])
    assert sink.told == [1, 2, 3, 4, 5, "the end"]
    assert caplog.text.count("cannot be told") == 1 and "was not told" not in caplog.text


def test_a_sink_that_stays_away_costs_no_run_and_no_other_sink(
    tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.tracking.telling.PAUSE_S", 0.0)
    sinks_ = [Moody(math.inf), Moody(0)]
    made = Tracker(tmp_path / "mine.run", artifacts, sinks_)

    def run() -> None:
        with made.run(RECIPE, DIGESTS):
            for step in range(1, 6):
                made("unet", step, 5, {"loss": step})
            raise ZeroDivisionError  # the run's own error is the one that is seen

    with pytest.raises(ZeroDivisionError):
        run()
    assert sinks_[0].told == [] and sinks_[1].told == [1, 2, 3, 4, 5, "the end"]
    assert caplog.text.count("cannot be told") == 1
    assert "Moody was not told 6 notes" in caplog.text


def test_one_note_that_is_never_taken_does_not_hold_up_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.tracking.telling.PAUSE_S", 0.0)
    sink = Moody(TRIES)
    telling = Telling(sink)
    for step in range(TRIES + 5):
        telling(lambda sink, step=step: sink.row("unet", {"loss": step}))  # type: ignore[misc]
    assert sink.told == list(range(1, TRIES + 5)) and telling.dropped == 1


class Pinned:
    """A board with three notes, of which it gives one more each time; the first time it cannot be reached."""

    def __init__(self) -> None:
        self.since, self.asked = self, 0

    def remote(self, _: str, told: int) -> list[tuple[int, int, dict[str, float]]]:
        self.asked += 1
        if self.asked == 1:
            raise RayActorError
        return [(step, 3, {"loss": 1.0}) for step in range(1, 4)][told : self.asked]


def test_live_progress_outlives_a_watcher_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("ray.get", lambda value: value)
    heard: list[int] = []

    def watch(stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        heard.append(step)
        if step < 3:
            raise RuntimeError("no")

    job: Any = SimpleNamespace(stage="unet", board=Pinned())
    with _Watching(job, watch):
        while len(heard) < 3:
            time.sleep(0.01)
    assert heard == [1, 2, 3]
    assert caplog.text.count("whoever watches stage unet failed") == 1
    assert caplog.text.count("the board of stage unet cannot be read") == 1


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
