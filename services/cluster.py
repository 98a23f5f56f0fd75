"""A Ray cluster on this machine for as long as `sdxs serve` runs, and the applications on it."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sdxs.errors import Unavailable
from services.fabric.environment import REPLICA_ENVIRONMENT

if TYPE_CHECKING:
    from services.fabric.pointers import Found
    from services.placement import AppArgs

_OBJECT_STORE_BYTES = 80 << 20  # images go by gRPC; Ray itself needs little

# Read by Ray's processes, which inherit them.
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # whoever can reach the ports still needs the token
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # replicas serve; Ray's default lets everything else go first
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextlib.contextmanager
def local_cluster() -> Iterator[None]:
    """Ray on this machine, its ports guarded by a token of its own; leaving the block ends its processes and removes its files."""
    for name, value in {**_RAY_ENVIRONMENT, **REPLICA_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    folder = tempfile.mkdtemp(prefix="sdxs-ray-")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 2),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def application(args: "AppArgs", found: "Sequence[Found]") -> Iterator[None]:
    """The Serve applications on the cluster, starting; leaving the block drains and stops their replicas."""
    from ray import serve

    from services.app import targets

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # Serve sets it to INFO when imported
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
    try:
        serve.run_many(targets(args, found), wait_for_applications_running=False)
        yield
    finally:
        serve.shutdown()


def check_application() -> None:
    """Raises Unavailable with Serve's reason when an application cannot start."""
    from ray import serve

    for name, application in serve.status().applications.items():
        if application.status == "DEPLOY_FAILED":
            raise Unavailable(f"Ray Serve could not start {name}: {application.message}")
