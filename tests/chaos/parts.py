"""A server whose parts can be killed and paused: `sdxs serve` on Ray, with Redis and S3 as processes of their own that keep their data."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from sdxs.embedded import S3Endpoint, Server, free_port, redis_answers, redis_command, takes_objects
from tests.e2e.conftest import Served, serving

STAGES = ("text_encoder", "unet", "controlnet", "decoder")
PARTS = (*STAGES, "gateway", "worker", "models", "redis", "s3")
KINDS = ("kill", "pause")
PAUSE_S = 10.0
RESTART_S = 2.0
"""So long after its death a Redis or S3 is started again, as a supervisor would; replicas are Serve's to replace."""


class External:
    """A server beside ours, which can be started again where it was."""

    def __init__(self, start: Callable[[], Server], ready: Callable[[], bool], name: str) -> None:
        self._start, self._ready, self._name = start, ready, name
        self._server: Server | None = None

    def start(self) -> None:
        """Returns when it answers."""
        self._server = self._start()
        self._server.wait_until(self._ready, self._name)

    def pids(self) -> set[int]:
        """Its processes, without the shell that guards them."""
        assert self._server is not None
        children = psutil.Process(self._server.process.pid).children(recursive=True)
        return {child.pid for child in children if child.name() not in ("sh", "cat")}

    def stop(self) -> None:
        """For good."""
        if self._server is not None:
            self._server.stop()


@dataclass(frozen=True)
class World:
    """All parts, running."""

    served: Served
    externals: dict[str, External]
    variables: dict[str, str]

    def pids(self, part: str) -> set[int]:
        """Processes of a part."""
        if part in self.externals:
            return self.externals[part].pids()
        return self.served.replicas(part, "sdxs-" if part in STAGES else "sdxs:")

    def strike(self, part: str, kind: str) -> set[int]:
        """Kill all of its processes, or pause them; blocks as long as the pause, or until it has been started again. Gives who it was."""
        struck = self.pids(part)
        if not struck:
            raise LookupError(f"no process of {part}")
        for pid in struck:
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        if kind == "pause":
            time.sleep(PAUSE_S)
            for pid in struck:
                with contextlib.suppress(ProcessLookupError):  # replaced meanwhile, which is right too
                    os.kill(pid, signal.SIGCONT)
        elif part in self.externals:
            time.sleep(RESTART_S)
            self.externals[part].start()
        return struck


@contextlib.contextmanager
def world(folder: Path, settings: dict[str, str], *options: str) -> Iterator[World]:
    """One, SERVING, in that folder; ended with the block."""
    for name in ("redis", "s3"):
        (folder / name).mkdir(parents=True)
    port, s3 = free_port(), S3Endpoint.of(folder / "s3")
    redis = redis_command(folder / "redis", port)
    externals = {
        "redis": External(lambda: Server.start(redis, folder / "redis", "redis"), lambda: redis_answers(port), "redis"),
        "s3": External(lambda: Server.start(s3.command, folder / "s3", "s3", s3.environment), lambda: takes_objects(s3), "S3"),
    }
    variables = {"SDXS_REDIS_URL": f"redis://127.0.0.1:{port}/0", "SDXS_STORE_URL": "s3://chaos", **s3.variables, **settings}
    try:
        for external in externals.values():
            external.start()
        with serving(None, folder / "serve.log", variables, *options) as served:
            yield World(served, externals, variables)
    finally:
        for external in externals.values():
            external.stop()
