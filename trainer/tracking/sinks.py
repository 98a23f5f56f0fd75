"""Who else is told of a run: TensorBoard's event files, and MLflow where MLFLOW_TRACKING_URI names one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sdxs.errors import PreconditionFailed, Unavailable
from trainer.recipe import AnyRecipe

PARAMETER_LENGTH = 500  # MLflow refuses longer ones
URI = "MLFLOW_TRACKING_URI"
HASTY = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}  # by default minutes, and a run is told again


class Sink(Protocol):
    """A place for rows of metrics and pictures; called by one thread at a time."""

    def begin(self, recipe: AnyRecipe) -> None:
        """Once, before anything else."""
        ...

    def row(self, stage: str, row: dict[str, float]) -> None:
        """Metrics of a stage's step. A step that was there before replaces what came after it."""
        ...

    def picture(self, stage: str, step: int, path: Path) -> None:
        """A grid of samples."""
        ...

    def finish(self, folder: Path) -> None:
        """Once, after everything else."""
        ...


def sinks(folder: Path) -> list[Sink]:
    """All that are configured, for a run folder.

    Raises:
        PreconditionFailed: MLflow is configured and not installed.
    """
    return [TensorBoard(folder / "tensorboard"), *([MLflow(folder)] if os.environ.get(URI) else [])]


class TensorBoard:
    """Event files, one folder a stage. Loaded at the first row: it takes seconds to import."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, tuple[Any, int]] = {}  # and the last step written

    def begin(self, recipe: AnyRecipe) -> None: ...

    def row(self, stage: str, row: dict[str, float]) -> None:
        step = int(row["step"])
        writer = self._writer(stage, step)
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, step)
        writer.flush()
        self._writers[stage] = (writer, step)

    def picture(self, stage: str, step: int, path: Path) -> None:
        writer = self._writer(stage, step + 1)
        with Image.open(path) as image:
            writer.add_image("samples", np.asarray(image), step, dataformats="HWC")
        writer.flush()

    def finish(self, folder: Path) -> None:
        for writer, _ in self._writers.values():
            writer.close()
        self._writers = {}

    def _writer(self, stage: str, step: int) -> Any:
        """The stage's; a new one where the curve goes back, which tells readers to drop what came after (`purge_step`)."""
        from torch.utils.tensorboard import SummaryWriter

        writer, last = self._writers.get(stage, (None, -1))
        if writer is None or step <= last:
            if writer is not None:
                writer.close()
            writer = SummaryWriter(self.folder / stage, purge_step=step)
            self._writers[stage] = (writer, step - 1)
        return writer


class MLflow:
    """One MLflow run a run folder, which remembers its id: a run that goes on continues it. Steps that are there are not sent again."""

    def __init__(self, folder: Path) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            needed = "pip install mlflow-skinny, or unset it"
            raise PreconditionFailed(f"{URI} is set, but MLflow is not installed: {needed}") from error
        for name, value in HASTY.items():
            os.environ.setdefault(name, value)
        self.client: Any = MlflowClient()
        self.folder, self.run = folder, ""
        self._sent: dict[tuple[str, str], int] = {}

    def begin(self, recipe: AnyRecipe) -> None:
        """The server must be there now, whenever it is away later.

        Raises:
            Unavailable: it is not, or refuses.
        """
        from mlflow.exceptions import MlflowException

        noted = self.folder / "mlflow.txt"
        if noted.exists():
            self.run = noted.read_text().strip()
            return
        try:
            self._create(recipe, noted)
        except MlflowException as error:
            raise Unavailable(f"{URI}={os.environ[URI]}: {str(error).splitlines()[0][:200]}") from error

    def _create(self, recipe: AnyRecipe, noted: Path) -> None:
        experiment = self.client.get_experiment_by_name("sdxs")
        identity = experiment.experiment_id if experiment else self.client.create_experiment("sdxs")
        self.run = self.client.create_run(identity, run_name=recipe.name).info.run_id
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(self.run)
        for name, value in flat(recipe.model_dump(mode="json", exclude_none=True)).items():
            self.client.log_param(self.run, name, str(value)[:PARAMETER_LENGTH])

    def row(self, stage: str, row: dict[str, float]) -> None:
        step = int(row["step"])
        for name, value in row.items():
            if name != "step" and step > self._last(stage, name):
                self.client.log_metric(self.run, f"{stage}/{name}", value, step=step)
                self._sent[stage, name] = step

    def _last(self, stage: str, name: str) -> int:
        """The last step that the server has."""
        if (stage, name) not in self._sent:
            history = self.client.get_metric_history(self.run, f"{stage}/{name}")
            self._sent[stage, name] = max((metric.step for metric in history), default=-1)
        return self._sent[stage, name]

    def picture(self, stage: str, step: int, path: Path) -> None:
        self.client.log_artifact(self.run, str(path), "samples")

    def finish(self, folder: Path) -> None:
        for name in ("recipe.json", "versions.json", "index.html"):
            self.client.log_artifact(self.run, str(folder / name))
        self.client.set_terminated(self.run)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(value, dict):
        return {name: value}
    return {key: part for inner, below in value.items() for key, part in flat(below, f"{name}.{inner}".lstrip(".")).items()}
