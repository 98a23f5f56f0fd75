"""What a pool takes of a cluster, told to whoever counts what is left.

Ray Train's elastic policy divides what nodes have, less what has been requested of Ray's autoscaling coordinator. It does not see
actors: without this it counts the teachers' places as its own, and waits for workers that can never start.
"""

from __future__ import annotations

import threading
from uuid import uuid4

EXPIRES_S, RENEWED_S = 180.0, 60.0  # a driver that dies leaves no reservation behind


class Reservation:
    """Of `count` actors' resources, ahead of any training run's, until it is cancelled."""

    def __init__(self, each: dict[str, float], count: int) -> None:
        # Ray's own, and the one way to tell its elastic policy. Imported here: it loads Ray Data.
        from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

        self._coordinator, self._name, self._ended = (
            get_or_create_autoscaling_coordinator(),
            f"sdxs-{uuid4()}",
            threading.Event(),
        )
        self._request = {
            "resources": [{name: amount for name, amount in each.items() if amount}] * count, "expire_after_s": EXPIRES_S,
            "priority": ResourceRequestPriority.HIGH,
        }  # fmt: skip
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="reservation", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        self._coordinator.request_resources.remote(requester_id=self._name, **self._request)

    def _keep(self) -> None:
        while not self._ended.wait(RENEWED_S):
            self._renew()

    def cancel(self) -> None:
        self._ended.set()
        self._thread.join()
        self._coordinator.cancel_request.remote(self._name)
