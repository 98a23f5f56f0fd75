"""A pool member's metrics as Prometheus reads them from Ray: prefix `ray_sdxs_teacher_`, times in seconds.

The busy share is the rate of `busy_seconds`, the time of a score that over the rate of `images`: exact, where the sum of a histogram of
Ray's counts each value as the middle of its bucket. A worker's share of time waiting is measured where it waits (`PoolClient.statistics`).
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from trainer.pool.joining import images

BATCH = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


class PoolMetrics:
    """A `trainer.pool.batching.Watcher`. Each metric bears the kind of request (denoise, sample, decode); Ray adds node and process."""

    def __init__(self) -> None:
        kind = ("kind",)
        self.depth = Gauge("sdxs_teacher_queue_depth", "Requests that wait for this teacher")
        self.batch = Histogram("sdxs_teacher_batch_images", "Images of one forward", BATCH, kind)
        self.forward_seconds = Histogram("sdxs_teacher_forward_seconds", "Seconds of one forward", SECONDS, kind)
        self.image_seconds = Histogram("sdxs_teacher_image_seconds", "Seconds for one image of a forward", SECONDS, kind)
        self.requests = Counter("sdxs_teacher_requests", "Requests answered", kind)
        self.images = Counter("sdxs_teacher_images", "Images answered", kind)
        self.busy_seconds = Counter("sdxs_teacher_busy_seconds", "Seconds spent computing", kind)

    def queue(self, depth: int) -> None:
        self.depth.set(depth)

    def forward(self, request: Any, requests: int, seconds: float) -> None:
        count, tags = images(request), {"kind": type(request).__name__.lower()}
        self.batch.observe(count, tags)
        self.forward_seconds.observe(seconds, tags)
        self.image_seconds.observe(seconds / count, tags)
        self.requests.inc(requests, tags)
        self.images.inc(count, tags)
        self.busy_seconds.inc(seconds, tags)
