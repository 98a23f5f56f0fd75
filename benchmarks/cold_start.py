"""A model that sleeps while nobody asks for it: how long the first caller waits, until it sleeps again, and what it costs meanwhile.

    python -m benchmarks.cold_start

Two models on Ray Serve: the shipped `emoji`, which is always there, and the same under another name, which may sleep.
In turns: asleep, asked once, asked again while it is awake.
Writes benchmarks/results/cold_start.jsonl.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from benchmarks.machine import machine, write
from benchmarks.served import server
from sdxs import bundle, registry
from sdxs.client import Client
from sdxs.v1 import gateway_pb2
from services.placement import STAGES
from services.settings import ServingSettings

PROMPT, NAME, WAIT_S = "red apple", "sleeper", 180.0


def config(folder: Path, idle_s: float) -> Path:
    """Of a server with the emoji model twice, once under a name of its own."""
    source, _ = registry.open_model("emoji", ServingSettings())
    shutil.copytree(source, folder / NAME)
    (folder / NAME / bundle.MANIFEST).unlink()
    bundle.seal(folder / NAME, NAME)
    asleep = {stage: {"replicas": 0, "idle_s": idle_s} for stage in STAGES}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"models": ["emoji", {"model": str(folder / NAME), **asleep}]}), encoding="utf8")
    return path


def replicas() -> list[psutil.Process]:
    """Processes of the model that sleeps."""
    return [each for each in psutil.process_iter() if f"ServeReplica:sdxs-{NAME}-" in _title(each)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def seconds(call: Callable[[], object]) -> float:
    """It takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def asleep(client: Client) -> bool:
    """Whether it is, with all its processes gone."""
    [model] = [each for each in client.list_models() if each.name == NAME]
    return model.status.state == gateway_pb2.MODEL_STATE_ASLEEP and not replicas()


def until(condition: Callable[[], bool]) -> None:
    """It holds. Raises TimeoutError."""
    ends = time.perf_counter() + WAIT_S
    while not condition():
        if time.perf_counter() > ends:
            raise TimeoutError(f"not after {WAIT_S} s")
        time.sleep(0.1)


def turn(client: Client, idle_s: float) -> dict[str, float]:
    """Asleep, awake, asleep again."""

    def ask(model: str) -> None:
        client.generate(PROMPT, seed=7, model=model, timeout=WAIT_S)

    beside = [seconds(lambda: ask("emoji")) for _ in range(20)]
    cold = seconds(lambda: ask(NAME))
    warm = [seconds(lambda: ask(NAME)) for _ in range(20)]
    memory = sum(each.memory_full_info().pss for each in replicas())
    leaves = seconds(lambda: until(lambda: asleep(client)))
    return {
        "cold_s": round(cold, 2), "warm_ms": round(1e3 * statistics.median(warm), 1),
        "beside_ms": round(1e3 * statistics.median(beside), 1), "asleep_after_s": round(leaves, 1), "idle_s": idle_s,
        "awake_mb": round(memory / 1e6),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--idle", type=float, default=5.0, help="seconds without a caller until it may sleep")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        server("--config", str(config(Path(folder), options.idle))) as address,
        Client(address) as client,
    ):
        until(lambda: asleep(client))
        rows = [turn(client, options.idle) for _ in range(options.turns)]
    rows.append({"median": True, **{name: statistics.median(row[name] for row in rows) for name in rows[0]}})
    for row in rows:
        print(row)
    print(write("cold_start", [{**row, "machine": machine()} for row in rows]))


if __name__ == "__main__":
    main()
