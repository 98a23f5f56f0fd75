"""The Ray cluster a training command runs on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

_LOCAL_RAY = {
    "RAY_AUTH_MODE": "disabled",  # it ends with this process, on the loopback interface
    "RAY_worker_niceness": "0",  # the default, 15, starves training beside anything else
    "RAY_worker_maximum_startup_concurrency": "8",  # by default one process a core; a run's small actors mostly wait
    # On one machine nothing is preempted and nobody scrapes metrics; these cost seconds of imports a stage.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray cluster for this process: the one RAY_ADDRESS names, else a local one that ends with it.

    A local one offers at least four slots: workers and teachers are one thread each and take turns, so two cores stay busy with four.
    """
    local = "RAY_ADDRESS" not in os.environ
    for name, value in (_LOCAL_RAY if local else {"RAY_AUTH_MODE": "token"}).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    ray.init(
        num_cpus=max(4, os.cpu_count() or 1) if local else None, include_dashboard=False,
        log_to_driver=False, logging_level=logging.ERROR, configure_logging=False,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
