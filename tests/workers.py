"""What the processes of a several-worker test run: a small network in blocks, trained on noise; no model library, to start quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.loop import average_over_workers, step_generator
from trainer.optimisation import Losses, Trainable
from trainer.placement import Deal, Placement, Turn
from trainer.schedule import Schedule
from trainer.sections import Optimisation

PARALLEL = ("ddp", "fsdp")
SECTION = Optimisation(steps=4, batch=6, micro_batch=2, lr=1e-2)


class Blocks(nn.Module):
    """Shaped like a U-Net: blocks with weights of their own, convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)])
        self.conv_out = nn.Conv2d(8, 3, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.conv_out(hidden)
        return output


def train(folder: Path, placement: Placement, steps: range) -> list[dict[str, float]]:
    """Some steps from the state in `folder` if there is one; state, average and curve are left there."""
    torch.manual_seed(0)
    trainable = Trainable(placement.place(Blocks()), Schedule(4, 1e-2), ema_decay=0.9, placement=placement)
    folder.mkdir(exist_ok=True)
    if (folder / "state.pt").exists():
        trainable.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    deal = Deal.of(SECTION)

    def losses(turn: Turn) -> Losses:
        generator = step_generator(0, turn.index, turn.micro)
        x_BCHW = torch.randn(deal.size, 3, 4, 4, generator=generator)
        return {"loss": (trainable.module(x_BCHW) - x_BCHW.roll(1, dims=3)).square().mean()}

    curve = []
    for index in steps:
        shares = trainable.learn(deal.turns(index), losses)
        norm = float(shares.pop("gradient_norm"))
        curve.append(average_over_workers({name: float(value) for name, value in shares.items()}) | {"norm": norm})
    _leave(folder, trainable, curve)
    return curve


def _leave(folder: Path, trainable: Trainable, curve: list[Any]) -> None:
    state, averaged = trainable.state_dict(), trainable.averaged()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(state, folder / "state.pt")
        torch.save(averaged, folder / "averaged.pt")
        (folder / "curve.json").write_text(json.dumps(curve))


def both(rank: int, world: int, folder: str, first: int) -> None:
    """A worker's process: from step `first` on, sharing the network in one way and then in the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for parallel in PARALLEL:
        train(Path(folder) / parallel, Placement(parallel=parallel), range(first, 4))  # type: ignore[arg-type]
    dist.destroy_process_group()
