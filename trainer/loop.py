"""The training loop that every stage shares: steps, metrics, checkpoints, resume.

Knows nothing of Ray, S3 or any objective; `trainer.launch` runs it inside Ray Train workers, `run_local` in this process.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.disk import full_disk
from trainer.optimisation import Losses, Trainable
from trainer.placement import world_size

Metrics = dict[str, float]


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Noise source of one step on one worker: a function of (seed, step, rank) alone, so a resumed run draws what an unbroken one would."""
    mixed = (seed * 1_000_003 + step) * 4_099 + rank
    return torch.Generator().manual_seed(mixed % (2**63))


class Stage(ABC):
    """One training stage: networks, data and objective. The loop calls `step`, saves `trainables`, and at the end `export`s."""

    steps: int
    trainables: dict[str, Trainable]

    @abstractmethod
    def step(self, index: int) -> Losses:
        """One update. Returns named scalars, this worker's share of each; the workers' mean is the loss curve."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the stage's result, in diffusers format, under `folder`. All workers are asked, the first one's is kept."""

    def state_dict(self) -> dict[str, Any]:
        return {name: trainable.state_dict() for name, trainable in self.trainables.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state[name])


def average_over_workers(metrics: Metrics) -> Metrics:
    """The mean of each metric; all workers call it with the same names."""
    if world_size() == 1:
        return metrics
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(metrics.values()), device=device)
    dist.all_reduce(total)
    return dict(zip(metrics, (total / world_size()).tolist(), strict=True))


def run(
    stage: Stage,
    *,
    start: int = 0,
    report_every: int = 10,
    checkpoint_every: int = 200,
    report: Callable[[int, Metrics], None],
    checkpoint: Callable[[int], None],
) -> None:
    """Run updates `start`..`stage.steps`; `report` gets the mean of each metric since its last call, `checkpoint` the steps done."""
    sums: dict[str, Tensor | float] = {}
    count, since = 0, time.perf_counter()
    for index in range(start, stage.steps):
        for name, value in stage.step(index).items():
            sums[name] = sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)
        count, done = count + 1, index + 1
        if done % report_every == 0 or done == stage.steps:
            now = time.perf_counter()
            means = average_over_workers({name: float(total) / count for name, total in sums.items()})
            report(done, {**means, "seconds_per_step": (now - since) / count})
            sums, count, since = {}, 0, now
        if done % checkpoint_every == 0 or done == stage.steps:
            checkpoint(done)


def save_state(stage: Stage, step: int, path: Path, *, write: bool = True) -> None:
    """Write a resumable state atomically: a reader sees the old file or the new one, never half.

    The workers of a run gather the state together; all but one pass `write` = False.

    Raises:
        OSError: there is no room for it. What was written of it is removed.
    """
    state = {"step": step, "stage": stage.state_dict()}
    if not write:
        return
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:  # given a path, torch would write in C++, which does not say why it failed
            torch.save(state, file)
    except (RuntimeError, OSError) as error:
        part.unlink(missing_ok=True)
        full = full_disk(error)
        if full is None or full is error:
            raise
        raise full from None
    part.replace(path)


def load_state(stage: Stage, path: Path) -> int:
    """Restore a state written by `save_state`; returns the steps done. Only tensors and plain containers are unpickled."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    stage.load_state_dict(state["stage"])
    return int(state["step"])


def _rewind(log: Path, step: int) -> None:
    """Drop the lines of steps after `step`: they were lost with the process and will be taken again."""
    if log.exists():
        lines = log.read_text(encoding="utf8").splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf8")


def run_local(stage: Stage, folder: Path, *, report_every: int = 20, checkpoint_every: int = 200) -> None:
    """Run a stage in this process, resuming from `folder`/state.pt; the curve goes to log.jsonl, the result to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state, log = folder / "state.pt", folder / "log.jsonl"
    start = load_state(stage, state) if state.exists() else 0
    _rewind(log, start)

    def report(step: int, metrics: Metrics) -> None:
        line = json.dumps({"step": step, **{name: round(value, 6) for name, value in metrics.items()}})
        with log.open("a", encoding="utf8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    run(
        stage,
        start=start,
        report_every=report_every,
        checkpoint_every=checkpoint_every,
        report=report,
        checkpoint=lambda step: save_state(stage, step, state),
    )
    stage.export(folder)
