"""The training loop that every stage shares: steps, learning rate, finite check, EMA, metrics, checkpoints, resume.

Knows nothing of Ray, S3 or any objective; `trainer.launch` runs it inside Ray Train workers, `run_local` in this process.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Metrics = dict[str, float]


class DivergedError(RuntimeError):
    """A loss or gradient became NaN or infinite; the run stops before the weights are touched."""


@dataclass(frozen=True)
class Schedule:
    """How long and at what rate: linear warm-up, then constant or cosine to `floor` x `lr`.

    A cosine begins again at each step of `restarts`, at full rate (SGDR, arXiv:1608.03983).
    """

    steps: int
    lr: float
    warmup: int = 0
    cosine: bool = False
    floor: float = 0.02
    restarts: tuple[int, ...] = ()

    def rate(self, step: int) -> float:
        """Learning rate of update `step` (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if not self.cosine:
            return self.lr
        start = max((r for r in self.restarts if r <= step), default=self.warmup)
        end = min((r for r in self.restarts if r > step), default=self.steps)
        progress = (step - start) / max(1, end - start)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Noise source of one step on one worker: a function of (seed, step, rank) alone, so a resumed run draws what an unbroken one would."""
    mixed = (seed * 1_000_003 + step) * 4_099 + rank
    return torch.Generator().manual_seed(mixed % (2**63))


def average_gradients(network: nn.Module) -> None:
    """Mean of the gradients over all data-parallel workers, in one all-reduce; nothing to do on a single worker.

    Explicit rather than through DistributedDataParallel, because stages call several networks several times a step.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Ema:
    """Exponential moving average of a module's parameters; `decay` ramps up from 0 as (1+n)/(10+n)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.shadow = int(state["updates"]), dict(state["shadow"])


Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """The network with its weights laid out channels last, which convolutions on CPU and GPU prefer."""
    moved: Network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


@dataclass
class Trainable:
    """A network with its optimiser and, if wanted, its moving average."""

    network: nn.Module
    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: Ema | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.schedule.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )
        if self.ema_decay is not None:
            self.ema = Ema(self.network, self.ema_decay)

    def update(self, loss: Tensor, step: int) -> Tensor:
        """Backward, finite check, clip, step, EMA. Returns the gradient norm (before clipping).

        Raises:
            DivergedError: the loss or a gradient is not finite; nothing was updated.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.network)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise DivergedError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network)
        return norm

    def averaged(self) -> dict[str, Tensor]:
        """The weights to publish: the moving average where there is one."""
        return self.ema.shadow if self.ema is not None else self.network.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


class Stage(ABC):
    """One training stage: networks, data and objective. The loop calls `step`, saves `trainables`, and at the end `export`s."""

    steps: int
    trainables: dict[str, Trainable]

    @abstractmethod
    def step(self, index: int) -> dict[str, Tensor | float]:
        """One update. Returns named scalars, kept as the loss curve."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the stage's result, in diffusers format, under `folder`."""

    def close(self) -> None:  # noqa: B027  (optional hook)
        """Release what the stage holds (requests in flight, files)."""

    def state_dict(self) -> dict[str, Any]:
        return {name: trainable.state_dict() for name, trainable in self.trainables.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state[name])


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
            means = {name: float(total) / count for name, total in sums.items()}
            report(done, {**means, "seconds_per_step": (now - since) / count})
            sums, count, since = {}, 0, now
        if done % checkpoint_every == 0 or done == stage.steps:
            checkpoint(done)


def save_state(stage: Stage, step: int, path: Path) -> None:
    """Write a resumable state atomically: a reader sees the old file or the new one, never half."""
    part = path.with_suffix(".part")
    torch.save({"step": step, "stage": stage.state_dict()}, part)
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
