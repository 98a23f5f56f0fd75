"""How many replicas a room needs, from the calls in flight on its own servers and the jobs in the queue, which Serve's counters
do not see."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


def follow_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas so that each has `target_ongoing_requests` calls or jobs, within the bounds. Serve adds its delays."""
    metrics = context.aggregated_metrics or {}
    in_flight = sum(metrics.get("in_flight", {}).values())
    queued = max(metrics.get("queued", {}).values(), default=0.0)  # there is one queue: each worker tells its whole length
    target = context.config.target_ongoing_requests if context.config else 1.0
    wanted = math.ceil((in_flight + queued) / target)
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}
