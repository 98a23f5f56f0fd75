"""One `sdxs serve` for the whole session: the real command in a process of its own, on Ray Serve."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdxs.client import Client
from sdxs.embedded import free_port

START_S = 240  # seven processes that import torch or Ray; a machine at work elsewhere may need minutes


@dataclass(frozen=True)
class Served:
    """A running `sdxs serve`."""

    address: str
    process: "subprocess.Popen[bytes]"
    log: Path
    seconds: float
    bundle: Path

    def replicas(self, deployment: str, application: str = "sdxs") -> set[int]:
        """Process ids of a deployment's replicas on this server's Ray, by the titles Ray gives its workers.

        Those of applications whose names begin so: each bundle has one of its own, `sdxs-<name>-<digest>...`.
        """
        begins, ends = f"ray::ServeReplica:{application}", f":{deployment}"
        titles = {pid: _title(pid).split(" ")[0] for pid in descendants(self.process.pid)}
        return {pid for pid, title in titles.items() if title.startswith(begins) and title.endswith(ends)}


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    below: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in _parents().items() if parent in level} - below
        below |= level
    return below


def mapped(pid: int) -> set[str]:
    """The lenders whose residuals a process has mapped, its own included, by inode."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in maps if "sdxs-residuals" in line}


def _parents() -> dict[int, int]:
    """Parent of each process."""
    found: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    return found


def _title(pid: int) -> str:
    """Command line of a process, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.fixture(scope="session")
def served(
    control_bundle: Path,
    redis_variables: dict[str, str],
    s3_variables: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """With ControlNets in a replica of their own."""
    with serving(control_bundle, tmp_path_factory.mktemp("serve") / "log", {**redis_variables, **s3_variables}) as server:
        yield server


@contextlib.contextmanager
def serving(bundle: Path | None, log: Path, variables: dict[str, str], *options: str) -> Iterator[Served]:
    """The command in a process of its own, SERVING that bundle, or what the options say; at the end of the block it is stopped."""
    address = f"127.0.0.1:{free_port()}"
    sdxs = str(Path(sys.executable).with_name("sdxs"))
    command = [sdxs, "serve", *(["--model", str(bundle)] if bundle else []), "--port", address.rpartition(":")[2], *options]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=output, stderr=output)
    try:
        _wait_serving(process, address, log)
        yield Served(address, process, log, time.monotonic() - began, bundle or Path())
        _stop(process, log)
    finally:
        process.kill()
        process.wait()


def _wait_serving(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    end = time.monotonic() + START_S
    with Client(address) as client:
        while not client.ready():
            assert process.poll() is None, f"sdxs serve ended:\n{log.read_text()}"
            assert time.monotonic() < end, f"not SERVING after {START_S} s:\n{log.read_text()}"
            time.sleep(0.2)


def _stop(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """SIGTERM ends it well, with all it started."""
    started = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()
    end = time.monotonic() + 10
    while left := {pid: _title(pid) for pid in started if _title(pid)}:
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.1)
