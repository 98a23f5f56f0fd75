"""What a forward pass of a network costs, measured on its shapes: floating point operations, and bytes kept for the backward pass.

Networks here have no memory (`trainer.preflight.shapes.weightless`): the largest is measured in seconds on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from trainer.models.students import FeatureTap

CHECKPOINTED = (ResnetBlock2D, BasicTransformerBlock)
"""What diffusers computes again in the backward pass under activation checkpointing."""


@dataclass(frozen=True)
class Trace:
    """Of one network: parameters, FLOPs of the forward pass of one image (2 per multiply-add), of these in fused attention and in the
    blocks that checkpointing computes again; bytes that autograd keeps for n images, fixed + n each, the same with activation
    checkpointing; elements of each tapped output of one image; and FLOPs of its backward pass where they were counted."""

    parameters: int
    flops: float
    attention: float
    repeated: float
    fixed: int
    each: int
    each_checkpointed: int
    outputs: tuple[int, ...] = ()
    counted: float | None = None

    def backward(self, weights: bool) -> float:
        """FLOPs of the backward pass of one image: gradients of the inputs and, if the weights learn, theirs. Fused attention does five
        products there, where it did two."""
        if self.counted is not None:
            return self.counted
        return (2 if weights else 1) * (self.flops - self.attention) + 2.5 * self.attention

    def saved(self, images: int, checkpointing: bool) -> int:
        """Bytes kept for the backward pass of so many images."""
        return self.fixed + images * (self.each_checkpointed if checkpointing else self.each)


@dataclass
class _Kept:
    """Storages that autograd asked to keep; parameters do not count, they are there anyway."""

    ignored: set[int]
    storages: dict[int, Any] = field(default_factory=dict)
    total: int = 0

    def keep(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self.ignored and storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage  # alive, so that its address is not used again
            self.total += storage.nbytes()
        return value


@dataclass
class _Blocks:
    """What the checkpointed blocks kept inside, and the inputs they would be computed from again."""

    kept: _Kept
    counter: FlopCounterMode
    inside: list[int] = field(default_factory=list)
    flops: float = 0.0
    inputs: int = 0
    _before: list[tuple[int, int]] = field(default_factory=list)

    def enter(self, _module: nn.Module, _inputs: Any) -> None:
        self._before.append((self.kept.total, self.counter.get_total_flops()))

    def leave(self, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        kept, flops = self._before.pop()
        if self.kept.total == kept:
            return  # no gradient passes through
        self.inside.append(self.kept.total - kept)
        self.flops += self.counter.get_total_flops() - flops
        self.inputs += inputs[0].nbytes

    @property
    def checkpointed(self) -> int:
        """All bytes under checkpointing: outside of the blocks, their inputs, and the inside of the largest while it is computed."""
        return self.kept.total - sum(self.inside) + self.inputs + max(self.inside, default=0)


def trace(
    network: nn.Module, call: Callable[[Any, int], Any], *, bf16: bool = False, taps: Sequence[str] = (), backward: bool = False
) -> Trace:
    """Measure a network made inside `weightless()`, in there.

    Args:
        call: runs the network on so many images.
        bf16: under autocast.
        taps: modules whose outputs are to be counted.
        backward: run the backward pass too and count it: for networks of which gradients reach only a part.
    """
    tap = FeatureTap(network, list(taps))
    one, two = (_forward(network, call, images, bf16) for images in (1, 2))
    outputs = tuple(value.numel() // 2 for value in tap.take()) if taps else ()
    each = two.kept.total - one.kept.total
    flops = one.counter.get_flop_counts()["Global"]
    return Trace(
        parameters=sum(p.numel() for p in network.parameters()), flops=float(one.counter.get_total_flops()),
        attention=float(sum(flops.get(kernel, 0) for kernel in CPU_ATTENTION)), repeated=one.flops, fixed=one.kept.total - each,
        each=each, each_checkpointed=two.checkpointed - one.checkpointed, outputs=outputs,
        counted=_backward(network, call) if backward else None,
    )  # fmt: skip


def _backward(network: nn.Module, call: Callable[[Any, int], Any]) -> float:
    """FLOPs of the backward pass of one image."""
    output = call(network, 1)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        output.sum().backward()
    return float(counter.get_total_flops())


def _forward(network: nn.Module, call: Callable[[Any, int], Any], images: int, bf16: bool) -> _Blocks:
    """One forward pass, watched."""
    kept = _Kept({value.untyped_storage()._cdata for value in (*network.parameters(), *network.buffers())})
    blocks = _Blocks(kept, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION))
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, CHECKPOINTED):
                stack.enter_context(_removed(module.register_forward_pre_hook(blocks.enter)))
                stack.enter_context(_removed(module.register_forward_hook(blocks.leave)))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bf16))
        stack.enter_context(saved_tensors_hooks(kept.keep, lambda value: value))
        with blocks.counter:
            call(network, images)
    return blocks


def _removed(handle: Any) -> ExitStack:
    stack = ExitStack()
    stack.callback(handle.remove)
    return stack


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes."""
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(output: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes; the scores are computed again."""
    return int(sdpa_backward_flop_count(output, query, key, value))


# torch counts the attention kernels of GPUs only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
