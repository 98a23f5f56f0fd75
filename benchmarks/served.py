"""`sdxs serve` in a process of its own, for what is measured from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from sdxs.client import Client
from sdxs.embedded import free_port

START_S, STOP_S = 180, 60


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """The address of one with those options, SERVING, with Redis and S3 of its own in a folder that goes with it."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", "from sdxs.cli import main; main()", "serve", *options]
    with tempfile.TemporaryDirectory(prefix="sdxs-") as home:
        environment = {**os.environ, "SDXS_GATEWAY_ADDRESS": address, "XDG_DATA_HOME": home}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            with Client(address) as client:
                client.wait_ready(START_S)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)
