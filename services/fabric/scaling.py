"""How many replicas a room needs, from the calls in flight on its own servers and the jobs in the queue, which Serve's counters
do not see."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


def follow_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas so that each has `target_ongoing_requests` calls or jobs, within the bounds. Serve adds its delays.

    One stays while its model is asked for at all (services.gateway.waking); from none to one it is Serve that goes, for a call that waits.
    """
    metrics = context.aggregated_metrics or {}
    in_flight = sum(metrics.get("in_flight", {}).values())
    queued = max(metrics.get("queued", {}).values(), default=0.0)  # there is one queue: each worker tells its whole length
    needed = any(metrics.get("needed", {}).values())
    target = context.config.target_ongoing_requests if context.config else 1.0
    wanted = max(math.ceil((in_flight + queued) / target), int(needed))
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}
