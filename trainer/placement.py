"""Where a worker computes, in which precision, and how the workers of a run share networks and batches.

Knows torch.distributed and nothing of Ray: Ray Train starts the process group, tests start their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxs.errors import InvalidRequest
from trainer.sections import ComputeSection, Optimisation


def worker_rank() -> int:
    """This worker's number in the run; 0 where there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Workers in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Placement:
    """Device and precision of a worker, and what becomes of a network that several workers train."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["float32", "bf16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False

    @classmethod
    def of(cls, compute: ComputeSection, device: torch.device | str = "cpu") -> Placement:
        """What a recipe asks for, on this worker's device."""
        return cls(torch.device(device), compute.precision, compute.parallel, compute.activation_checkpointing)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 where autocast uses it; weights, gradients and moments stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, network: nn.Module) -> nn.Module:
        """On the device, convolution weights channels last, with a float32 output layer and, if wanted, activation checkpointing."""
        placed: Any = network
        placed.to(self.device, memory_format=torch.channels_last)
        if self.precision == "bf16" and hasattr(placed, "conv_out"):
            float32_output(placed)
        if self.activation_checkpointing and hasattr(placed, "enable_gradient_checkpointing"):
            placed.enable_gradient_checkpointing()
        return network

    def share(self, network: nn.Module) -> nn.Module:
        """The module to call in training: alone the network itself, else one that averages gradients over the workers."""
        if world_size() == 1 or not any(p.requires_grad for p in network.parameters()):
            return network
        if self.parallel == "fsdp":
            return shard(network)
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


def float32_output(network: nn.Module) -> None:
    """Let the last convolution run in float32 outside autocast: one step at t = 999 multiplies an error of eps by 14.6, and
    the rounding of the output to bfloat16 is one that costs nothing to avoid."""
    last: Any = network.conv_out
    inner = last.forward

    def forward(hidden_BCHW: Tensor) -> Tensor:
        with torch.autocast(hidden_BCHW.device.type, enabled=False):
            output: Tensor = inner(hidden_BCHW.float())
        return output

    last.forward = forward


def shard(network: nn.Module) -> nn.Module:
    """FSDP2: every block of a U-Net gathers its weights for its own turn, the rest is gathered at the root. Weights of its shards cannot
    be laid out channels last."""
    from torch.distributed.fsdp import fully_shard

    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for name, module in network.named_modules():
        parent, _, last = name.rpartition(".")
        if parent.rpartition(".")[2] in ("down_blocks", "up_blocks") or last == "mid_block":
            fully_shard(module)
    fully_shard(network)
    return network


@contextmanager
def syncing(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are averaged over the workers only in the last micro-batch of a step."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with nullcontext() if last else module.no_sync():
            yield
        return
    switch = getattr(module, "set_requires_gradient_sync", None)
    if switch is not None:
        switch(last)
    yield


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients pass through the network, and leave none in its weights."""
    _release(network)
    learning = [p for p in network.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        _release(network)
        for parameter in learning:
            parameter.requires_grad_(True)


def _release(network: nn.Module) -> None:
    """Let FSDP2 gather anew: weights that stay gathered keep what they were told of gradients when they were."""
    for module in network.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


@dataclass(frozen=True)
class Turn:
    """One micro-batch of a step on this worker. `micro` is its number in the whole batch, `sequence` counts this worker's micro-batches
    from the run's beginning, `weight` makes the workers' average of all weighted losses the mean over the batch."""

    index: int
    micro: int
    sequence: int
    weight: float


@dataclass(frozen=True)
class Deal:
    """A batch of `count` micro-batches of `size`, dealt to the workers in turn.

    What a micro-batch draws follows from its number alone, so the same batch is drawn however many workers there are. Where they do
    not divide it, the last round is filled up with micro-batches of weight 0: every worker takes part in every exchange.
    """

    size: int
    count: int
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, optimisation: Optimisation, rank: int | None = None, world: int | None = None) -> Deal:
        """Of a stage's batch, for this worker.

        Raises:
            InvalidRequest: the batch has no micro_batch and does not divide by the workers.
        """
        world = world_size() if world is None else world
        if optimisation.micro_batch is None and optimisation.batch % world:
            raise InvalidRequest("workers", world, f"a divisor of batch {optimisation.batch}, or a recipe with micro_batch")
        size = optimisation.micro_batch or optimisation.batch // world
        return cls(size, optimisation.batch // size, worker_rank() if rank is None else rank, world)

    @property
    def rounds(self) -> int:
        """Micro-batches each worker takes in a step."""
        return -(-self.count // self.world)

    def turn(self, sequence: int) -> Turn:
        """This worker's micro-batch number `sequence` of the run."""
        index, position = divmod(sequence, self.rounds)
        micro = position * self.world + self.rank
        weight = self.world / self.count if micro < self.count else 0.0
        return Turn(index, micro % self.count, sequence, weight)

    def turns(self, index: int) -> list[Turn]:
        """This worker's micro-batches of step `index`."""
        return [self.turn(index * self.rounds + position) for position in range(self.rounds)]
