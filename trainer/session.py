"""The Ray cluster a training command runs on."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

START_ATTEMPTS = 3
_TOKEN = secrets.token_hex(32)  # one a process: Ray reads it once
_RAY = {"RAY_TRAIN_V2_ENABLED": "1"}
LOCAL_RAY = {
    "RAY_AUTH_TOKEN": _TOKEN,  # whoever can reach the ports still needs it
    "RAY_worker_niceness": "0",  # the default, 15, starves training beside anything else
    "RAY_worker_maximum_startup_concurrency": "8",  # by default one process a core; a run's small actors mostly wait
    # On one machine nothing is preempted and nobody scrapes metrics; these cost seconds of imports a stage.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # by default a stage's end is noticed up to two seconds late
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray cluster for this process: the one RAY_ADDRESS names, else a local one that ends with it.

    A local one offers at least four slots: workers and teachers are one thread each and take turns, so two cores stay busy with four.
    """
    local = "RAY_ADDRESS" not in os.environ
    with _environment(_RAY | LOCAL_RAY if local else _RAY):
        where: dict[str, Any] = {"address": "local", "num_cpus": max(4, os.cpu_count() or 1)} if local else {}
        _start(**where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        try:
            yield
        finally:
            ray.shutdown()


def _start(**options: Any) -> None:
    """`ray.init`, again when its agent took too long: Ray gives it 15 seconds, whatever the machine is doing (ray#65983)."""
    for left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Variables that Ray's processes inherit, where the user has not set them; a server started later is not to have them."""
    ours = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
