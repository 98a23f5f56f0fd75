"""The costs of a recipe as tables, with what they assume."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from trainer.cluster import Cluster
from trainer.preflight.cost import StageCost
from trainer.sections import ComputeSection

DEVICE, PEAK = "A100", {"bf16": 312e12, "float32": 19.5e12}  # FLOP/s by its data sheet, dense
UTILISATION = 0.35
"""Part of the peak that U-Nets of this size reach in training; chosen, between the 0.3 and 0.4 that are common."""
PARTS = ("weights", "gradients", "moments", "average", "frozen", "teacher", "activations", "checkpointed")


def seconds(flops: float, precision: str) -> float:
    """Of one device, as assumed."""
    return flops / (PEAK[precision] * UTILISATION)


def device_hours(costs: Sequence[StageCost], compute: ComputeSection) -> float:
    """Of all workers and teachers together, each in its precision."""
    teacher = "float32" if compute.teacher_precision == "float32" else "bf16"
    worker = sum(seconds(cost.steps * cost.batch * cost.worker_flops, compute.precision) for cost in costs)
    return (worker + sum(seconds(cost.steps * cost.batch * cost.teacher_flops, teacher) for cost in costs)) / 3600


def tables(costs: Sequence[StageCost], compute: ComputeSection, cluster: Cluster) -> Group:
    """Work and traffic of each stage, its memory, and what it comes to."""
    hours = device_hours(costs, compute)
    stored = sum(cost.stored for cost in costs)
    total = sum(cost.flops for cost in costs)
    samples = f"samples of {size(stored)} on each machine, mapped into memory by its workers together, " if stored else ""
    return Group(
        _work(costs, compute, cluster),
        _memory(costs, compute.activation_checkpointing),
        f"all stages: {count(total)}FLOP, {samples}{hours:,.1f} {DEVICE} hours at {UTILISATION:.0%} of its peak "
        f"({PEAK[compute.precision] / 1e12:g} TFLOP/s in {compute.precision})",
    )


def _work(costs: Sequence[StageCost], compute: ComputeSection, cluster: Cluster) -> Table:
    workers = cluster.most_workers
    title = f"work: FLOPs and bytes of a step; bytes a second of all workers ({workers}) while none waits"
    table = _table(
        title, "steps", "batch", "at once", "worker", "teacher", "forwards", "to pool", "from pool", "B/s", "all steps"
    )
    for cost in costs:
        rate = pool_rate(cost, compute, workers)
        table.add_row(
            cost.name, f"{cost.steps:,}", f"{cost.batch:,}", str(cost.micro), count(cost.batch * cost.worker_flops),
            count(cost.batch * cost.teacher_flops), f"{cost.batch * cost.teacher_forwards:,}", size(cost.batch * cost.sent),
            size(cost.batch * cost.received), count(rate), count(cost.flops),
        )  # fmt: skip
    return table


def pool_rate(cost: StageCost, compute: ComputeSection, workers: int) -> float:
    """Bytes a second between pool and workers, if these reach the assumed part of their peak and never wait; 0 for drawn stages."""
    if not cost.worker_flops:
        return 0.0
    return workers * (cost.sent + cost.received) / seconds(cost.worker_flops, compute.precision)


def _memory(costs: Sequence[StageCost], checkpointing: bool) -> Table:
    other = "without checkpointing" if checkpointing else "with checkpointing"
    title = "memory of a device; activations as kept, and as kept with checkpointing: one of the two counts"
    table = _table(title, *PARTS, "total", other)
    for cost in costs:
        row = [size(getattr(cost.memory, part)) for part in PARTS]
        totals = [size(cost.memory.total(way)) for way in (checkpointing, not checkpointing)]
        table.add_row(cost.name, *row, *totals)
    return table


def _table(title: str, *columns: str) -> Table:
    """A row a stage, numbers to the right."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def count(number: float) -> str:
    """A large number with its prefix.

    >>> count(0), count(12e12), count(3.25e15)
    ('', '12.0 T', '3.2 P')
    """
    if not number:
        return ""
    power = min(6, int(math.log10(number) // 3)) if number >= 1 else 0
    return f"{number / 1000**power:,.1f} {' kMGTPE'[power]}".rstrip()


def size(amount: float) -> str:
    """Bytes for people.

    >>> size(0), size(1536), size(3 * 2**30)
    ('', '1.5 KiB', '3.0 GiB')
    """
    if not amount:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{amount:.0f} B"
        amount /= 1024
    return f"{amount:.1f} TiB"
