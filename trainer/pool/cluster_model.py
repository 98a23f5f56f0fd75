"""A small model of a training cluster: images a second with a teacher in each worker, or with some of the GPUs as a separate pool.

Pure functions of costs; knows no Ray and measures nothing. What it leaves out: stragglers, the input, the time of Python, and
all-reduce during backward. Every worker asks at the same moment, which is the worst case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdxs.errors import InvalidRequest


@dataclass(frozen=True)
class Device:
    """A GPU. A batch of b images of F FLOPs takes F (b + half_batch) / (flops utilisation) seconds: at `half_batch` images half the
    speed is lost to kernels too small for the device. `reserved` bytes are the framework's."""

    flops: float
    memory: float
    utilisation: float = 0.45
    half_batch: float = 2.0
    reserved: float = 3e9

    def seconds(self, flops: float, images: float) -> float:
        """Of one batch."""
        return flops * (images + self.half_batch) / (self.flops * self.utilisation)


@dataclass(frozen=True)
class Load:
    """One stage, per image and worker.

    Args:
        worker_flops: all that a worker computes itself, forward and backward.
        teacher_flops: the teacher's answer, guidance included.
        overlap: part of `worker_flops` between asking and needing the answer.
        bytes: of request and answer.
        state_bytes: weights, gradients, moments and averages of a worker, without the teacher.
        activation_bytes: kept for backward, at the peak.
        teacher_bytes: the teacher's weights.
        teacher_activation_bytes: of its forward, alive beside the worker's own.
        gradient_bytes: reduced over the workers once an update.
        images: of one update, over all workers.
        depth: batches asked for ahead of need; 0 where a request depends on the step's own sample.
    """

    worker_flops: float
    teacher_flops: float
    overlap: float
    bytes: float
    state_bytes: float
    activation_bytes: float
    teacher_bytes: float
    teacher_activation_bytes: float
    gradient_bytes: float
    images: int = 2048
    depth: int = 0


@dataclass(frozen=True)
class Network:
    """Between machines, bytes a second of one GPU's share: what Ray moves objects with, and what gradients are reduced with;
    and the seconds of a request's round trip without its bytes."""

    objects: float = 0.4e9
    gradients: float = 50e9
    round_trip: float = 0.005


@dataclass(frozen=True)
class Prediction:
    """`waiting` is the share of a worker's time in which it only waits for the teacher; `batch` its micro-batch;
    `teacher_batch` the images of one forward of the teacher. A plan that does not fit in memory has no images."""

    pool: int
    images_per_s: float
    waiting: float = 0.0
    batch: float = 0.0
    teacher_batch: float = 0.0


NOTHING = Prediction(0, 0.0)


@dataclass(frozen=True)
class Cluster:
    """`devices` GPUs for one load. Members of a pool may be of another kind, `teacher_device`, and join up to `max_batch` images."""

    device: Device
    devices: int
    network: Network = Network()
    teacher_device: Device | None = None
    max_batch: int = 64


def predict(cluster: Cluster, load: Load, pool: int) -> Prediction:
    """With `pool` of the devices as teachers; 0 puts a teacher into every worker.

    Raises:
        InvalidRequest: no device would be left to train.
    """
    if not 0 <= pool < cluster.devices:
        raise InvalidRequest("pool", pool, f"0 to {cluster.devices - 1}: of {cluster.devices} devices some must train")
    workers = cluster.devices - pool
    largest = micro_batch(cluster.device, load, with_teacher=pool == 0)
    if largest < 1:
        return Prediction(pool, 0.0)
    share = load.images / workers
    accumulations = math.ceil(share / largest)
    batch = share / accumulations
    own = cluster.device.seconds(load.worker_flops, batch)
    cycle, joined = _in_worker(cluster, load, batch, own) if pool == 0 else _pooled(cluster, load, batch, own, pool)
    update = accumulations * cycle + all_reduce(load.gradient_bytes, workers, cluster.network.gradients)
    waiting = 0.0 if pool == 0 else (cycle - own) * accumulations / update
    return Prediction(pool, load.images / update, waiting, batch, joined)


def best(cluster: Cluster, load: Load) -> Prediction:
    """The fastest separate pool."""
    return max(
        (predict(cluster, load, pool) for pool in range(1, cluster.devices)), key=lambda p: p.images_per_s, default=NOTHING
    )


def micro_batch(device: Device, load: Load, *, with_teacher: bool) -> int:
    """Images that fit in a worker's memory at once."""
    state = load.state_bytes + (load.teacher_bytes if with_teacher else 0)
    each = load.activation_bytes + (load.teacher_activation_bytes if with_teacher else 0)
    return max(0, math.floor((device.memory - device.reserved - state) / each))


def all_reduce(size: float, workers: int, bandwidth: float) -> float:
    """Seconds of a ring: 2 (w - 1) / w of the bytes pass each device."""
    return 2 * (workers - 1) / workers * size / bandwidth


def _in_worker(cluster: Cluster, load: Load, batch: float, own: float) -> tuple[float, float]:
    """Seconds of a micro-batch, and the teacher's batch: one after the other on the same device."""
    return own + cluster.device.seconds(load.teacher_flops, batch), batch


def _pooled(cluster: Cluster, load: Load, batch: float, own: float, pool: int) -> tuple[float, float]:
    """Seconds of a micro-batch, and the teacher's joined batch.

    Whatever is slowest sets the pace: the worker, a member that serves several of them, the wires of either, or the way there and
    back, as far as it is longer than what the worker does meanwhile.
    """
    average = (cluster.devices - pool) / pool
    together = math.ceil(average)  # a request goes to one member whole
    joined = min(together, max(1, int(cluster.max_batch // batch)))
    forward = (cluster.teacher_device or cluster.device).seconds(load.teacher_flops, joined * batch) / joined
    wire = load.bytes * batch / cluster.network.objects
    there_and_back = cluster.network.round_trip + together * (forward + wire)
    chain = (own * (1 - load.overlap) + there_and_back) / (1 + load.depth)
    return max(own, average * forward, wire, average * wire, chain), joined * batch
