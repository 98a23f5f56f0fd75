"""How many replicas a room needs, from the calls in flight on its own servers, which Serve's counters do not see."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


def follow_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas so that each has `target_ongoing_requests` calls in flight, within the bounds. Serve adds its delays."""
    per_replica = (context.aggregated_metrics or {}).get("in_flight", {})
    target = context.config.target_ongoing_requests if context.config else 1.0
    wanted = math.ceil(sum(per_replica.values()) / target)
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}
