"""Arithmetic of a call, counted as it runs: 2 FLOPs per multiply-add of every matrix product, convolution and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """PyTorch's counter knows the attention kernels of GPUs, not the CPU's."""
    count: int = sdpa_flop_count(query, key, value)
    return count


_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def gflop(call: Callable[[], object]) -> float:
    """10^9 FLOPs of everything that `call` computes with torch; on the meta device too, where nothing is computed."""
    with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        call()
    return float(counter.get_total_flops()) / 1e9
