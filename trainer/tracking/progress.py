"""Live progress of a run: one bar a stage, with its latest loss; plain lines where nobody watches."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 4  # lines a stage leaves in a log


class Bars:
    """A watcher for `Distillation`: call it with (stage, done, steps, metrics)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}

    def __call__(self, stage: str, done: int, steps: int, metrics: dict[str, float]) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=steps, note="")
        note = "reused" if "reused" in metrics else f"loss {metrics['loss']:.3f}" if "loss" in metrics else ""
        self._progress.update(self._tasks[stage], completed=done, total=steps, note=note)
        if not self._console.is_terminal and done * LINES // steps > self._told.get(stage, 0):
            self._told[stage] = done * LINES // steps
            self._console.print(f"{stage:14} {done}/{steps} {note}")

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
