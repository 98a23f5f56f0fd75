"""One network and how it learns: learning rate, gradient accumulation, finite check, moving average, and a state to resume from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from sdxs.errors import Aborted, InvalidRequest
from trainer.placement import Placement, Turn, syncing
from trainer.schedule import Schedule

Losses = dict[str, Tensor | float]


class DivergedError(Aborted):
    """A loss or gradient became NaN or infinite; the run stops before the weights are touched."""


def gathered(value: Tensor) -> Tensor:
    """A tensor's whole value, of a shard or not. All workers must ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class Ema:
    """Exponential moving average of the weights that learn; `decay` ramps up from 0 as (1+n)/(10+n)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items() if name not in frozen}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        state = module.state_dict()
        for name, mine in self.shadow.items():
            if mine.dtype.is_floating_point:
                mine.lerp_(state[name], 1 - decay)
            else:
                mine.copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": {name: gathered(value).cpu() for name, value in self.shadow.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, mine in self.shadow.items():
            value = state["shadow"][name]
            mine.copy_(distribute_tensor(value, mine.device_mesh, mine.placements) if isinstance(mine, DTensor) else value)


@dataclass
class Trainable:
    """A network with its optimiser and, if wanted, its moving average. `module` is what to call in training, `network` what it is."""

    network: nn.Module
    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float | None = None
    placement: Placement = field(default_factory=Placement)
    moments: Literal["adamw", "adamw8bit"] = "adamw"
    module: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: Ema | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.module = self.placement.share(self.network)
        self.optimizer = self._adamw([p for p in self.network.parameters() if p.requires_grad])
        if self.ema_decay is not None:
            self.ema = Ema(self.network, self.ema_decay)

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.moments == "adamw8bit":
            try:
                from torchao.optim import AdamW8bit
            except ImportError as error:
                raise InvalidRequest("online_optimizer", self.moments, "adamw; or install torchao") from error
            eight: torch.optim.Optimizer = AdamW8bit(
                parameters, lr=torch.tensor(self.schedule.lr), betas=self.betas, weight_decay=self.weight_decay
            )
            return eight
        return torch.optim.AdamW(parameters, lr=self.schedule.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)

    def learn(self, turns: list[Turn], losses: Callable[[Turn], Losses]) -> Losses:
        """One update on the mean of the micro-batches' losses: backward each, then clip, finite check, step, moving average.

        Args:
            losses: named scalars of a micro-batch; the one called "loss" is minimised.

        Returns:
            This worker's share of each scalar's mean over the batch, and the gradient norm before clipping.

        Raises:
            DivergedError: a gradient is not finite; nothing was updated.
        """
        self._begin(turns[0].index)
        shares: Losses = {}
        for turn in turns:
            with syncing(self.module, turn is turns[-1]):
                found = losses(turn)
                loss = found["loss"]
                assert isinstance(loss, Tensor)
                (loss * turn.weight).backward()
            for name, value in found.items():
                part = value.detach() if isinstance(value, Tensor) else value
                shares[name] = shares.get(name, 0.0) + part * turn.weight
        norm = self._finish(turns[0].index, shares["loss"])
        return {**shares, "gradient_norm": norm}

    def update(self, loss: Tensor, step: int) -> Tensor:
        """The same for a loss that is there already, on one worker. Returns the gradient norm before clipping."""
        self._begin(step)
        loss.backward()
        return self._finish(step, loss.detach())

    def _begin(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            rate = self.schedule.rate(step)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)

    def _finish(self, step: int, loss: Tensor | float) -> Tensor:
        norm = gathered(nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)).detach()
        if not bool(torch.isfinite(norm + torch.as_tensor(loss, device=norm.device))):
            raise DivergedError(
                f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; no weight was changed. Try a lower lr"
            )
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network)
        return norm

    def averaged(self) -> dict[str, Tensor]:
        """The weights to publish: the moving average where there is one. Whole and on the CPU; all workers must ask together."""
        values = self.network.state_dict() | (self.ema.shadow if self.ema is not None else {})
        return {name: gathered(value).cpu() for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Whole, on the CPU, by parameter name: the same whatever the number of workers and however they share the network."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return {
            "network": get_model_state_dict(self.network, options=whole),
            "optimizer": get_optimizer_state_dict(self.network, self.optimizer, options=whole),
            "ema": self.ema.state_dict() if self.ema else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        whole = StateDictOptions(full_state_dict=True, strict=False)  # frozen weights are not in it
        set_model_state_dict(self.network, state["network"], options=whole)
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"], options=whole)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def stage_trainable(network: nn.Module, section: Any, placement: Placement, **options: Any) -> Trainable:
    """A stage's main network: placed, with the section's schedule and moving average."""
    return Trainable(placement.place(network), section.schedule(), ema_decay=section.ema, placement=placement, **options)
