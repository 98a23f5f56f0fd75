"""A run one can read without a server: its folder, filled while the run goes on, and the same numbers for TensorBoard and MLflow.

    recipe.json      the resolved recipe
    versions.json    libraries and machine
    curves/<stage>.jsonl, curves/<stage>.png
    samples/<stage>-<step>.png      fixed prompts and noises; above the teacher's images, below the stage's
    tensorboard/     event files
    index.html       all of it on a page

A run that goes on continues its curves: what a stage reports again, after a worker came back from a checkpoint, takes the place of
what it had reported. A stage whose inputs have changed begins anew.

Tracking never stops a run: a store that is away is waited for, a sink is told later, and what fails all the same is logged.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.artifacts import Artifacts, patiently
from trainer.recipe import AnyRecipe
from trainer.tracking.page import draw_curve, write_page
from trainer.tracking.sinks import Sink
from trainer.tracking.telling import Telling
from trainer.tracking.versions import versions

LOG = logging.getLogger(__name__)
SAMPLED = "sampled"  # the metric by which a worker says that it has left a grid for this step
IGNORED = ("worker_pid", "workers", SAMPLED)
Row = dict[str, float]


class Tracker:
    """A watcher for `Distillation`: call it with (stage, done, steps, metrics), from any thread.

    Args:
        folder: the run folder; beside the bundle, never in it.
        sinks: who else is told.
    """

    def __init__(self, folder: Path, artifacts: Artifacts, sinks: Iterable[Sink] = ()) -> None:
        self.folder, self.artifacts, self.sinks = folder, artifacts, [Telling(sink) for sink in sinks]
        self.digests: dict[str, str] = {}
        self._curves: dict[str, list[Row]] = {}
        self._lock = threading.Lock()

    def begin(self, recipe: AnyRecipe, digests: dict[str, str]) -> None:
        """Write what is known before the first step; forget stages of an earlier run whose digests have changed."""
        for name in ("curves", "samples"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.digests = digests
        before = _read(self.folder / "stages.json")
        for stage in {*before, *digests}:
            if before.get(stage) != digests.get(stage):
                self._forget(stage)
        _write(self.folder / "stages.json", digests)
        _write(self.folder / "recipe.json", recipe.model_dump(mode="json"))
        _write(self.folder / "versions.json", versions())
        self._curves = {stage: read_curve(self._curve(stage)) for stage in digests}
        for telling in self.sinks:
            telling.sink.begin(recipe)

    def __call__(self, stage: str, done: int, steps: int, metrics: dict[str, float]) -> None:
        """One report of a stage; of drawn stages only that they went on. Raises nothing."""
        with self._lock, self._logged(f"a report of stage {stage} at step {done}"):
            if SAMPLED in metrics:
                self._fetch_grid(stage, done)
            elif "loss" in metrics:
                self._note(stage, {"step": done, **{k: v for k, v in metrics.items() if k not in IGNORED}})

    @contextmanager
    def run(self, recipe: AnyRecipe, digests: dict[str, str]) -> Iterator[None]:
        """`begin`, and at the end, however it comes, `finish`."""
        self.begin(recipe, digests)
        try:
            yield
        finally:
            self.finish()

    def finish(self) -> None:
        """Take over what the stages left in the store, and write pictures and page. Raises nothing."""
        with self._lock:
            with self._logged("what the stages left in the store"):
                for stage, digest in self.digests.items():
                    self._settle(stage, digest)
            with self._logged("the page of the run"):
                for stage in self.digests:
                    if self._curves.get(stage):
                        draw_curve(stage, self._curves[stage], self.folder / "curves" / f"{stage}.png")
                write_page(self.folder, self._curves)
            for telling in self.sinks:
                telling.finish(lambda sink: sink.finish(self.folder))

    @contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        """What is raised inside is logged: it is not worth a run."""
        try:
            yield
        except Exception:
            LOG.exception("run folder %s is without %s", self.folder, what)

    def _curve(self, stage: str) -> Path:
        return self.folder / "curves" / f"{stage}.jsonl"

    def _note(self, stage: str, row: Row) -> None:
        """Append a row. One at or before the last takes the place of all from there on."""
        curve = self._curves.setdefault(stage, [])
        kept = [known for known in curve if known["step"] < row["step"]]
        if row in curve and curve[-1] == row:
            return
        if len(kept) < len(curve):
            self._curves[stage] = [*kept, row]
            write_curve(self._curve(stage), self._curves[stage])
        else:
            curve.append(row)
            with self._curve(stage).open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
        self._tell_row(stage, row)

    def _tell_row(self, stage: str, row: Row) -> None:
        for telling in self.sinks:
            telling(lambda sink: sink.row(stage, row))

    def _settle(self, stage: str, digest: str) -> None:
        """The curve in the store is the whole one, also of stages that this run reused; so are the grids."""
        facts = self.artifacts.facts(stage, digest)
        if facts is None:
            return
        if "log.jsonl" in facts["files"]:
            known = {row["step"] for row in self._curves.get(stage, [])}
            key = f"{self.artifacts.prefix(stage, digest)}/log.jsonl"
            log = patiently(lambda: self.artifacts.store.get_bytes(key)).decode()
            whole = [json.loads(line) for line in log.splitlines()]
            self._curves[stage] = whole
            write_curve(self._curve(stage), whole)
            for row in whole:
                if row["step"] not in known:
                    self._tell_row(stage, row)
        samples = f"{self.artifacts.prefix(stage, digest)}/samples/"
        for key in patiently(lambda: list(self.artifacts.store.list(samples))):
            self._fetch_grid(stage, int(Path(key).stem))

    def _fetch_grid(self, stage: str, step: int) -> None:
        target = self.folder / "samples" / f"{stage}-{step:06}.png"
        if target.exists():
            return
        key = f"{self.artifacts.prefix(stage, self.digests[stage])}/samples/{step:06}.png"
        patiently(lambda: self.artifacts.store.get_file(key, target))
        for telling in self.sinks:
            telling(lambda sink: sink.picture(stage, step, target))

    def _forget(self, stage: str) -> None:
        for path in [*self.folder.glob(f"curves/{stage}.*"), *self.folder.glob(f"samples/{stage}-*.png")]:
            path.unlink()
        shutil.rmtree(self.folder / "tensorboard" / stage, ignore_errors=True)


def told(tracker: Tracker, bars: Callable[[str, int, int, dict[str, float]], None]) -> Callable[..., None]:
    """A watcher that tells both; bars show no grids."""

    def watch(stage: str, done: int, steps: int, metrics: dict[str, float]) -> None:
        tracker(stage, done, steps, metrics)
        if SAMPLED not in metrics:
            bars(stage, done, steps, metrics)

    return watch


def read_curve(path: Path) -> list[Row]:
    """The rows of a curve that are whole; a process that dies may leave half of one."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_curve(path: Path, rows: list[Row]) -> None:
    """A curve as a whole, at once."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    part.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf8"))) if path.exists() else {}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf8")
