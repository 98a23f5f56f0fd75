"""The real-time stream: what it adds to a frame, what it does under three times the load, what sessions that do nothing cost.

    python -m benchmarks.stream                  the emoji model, on this CPU
    python -m benchmarks.stream --seconds 3      shorter

The server is `services.local` in this process for the added time without a network, and one in a process of its own for all else, so
that the client's memory and time are not the server's. Writes benchmarks/results/stream.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, write
from sdxs import images, registry
from sdxs.client import AsyncClient
from sdxs.embedded import free_port
from sdxs.pipeline import OneStepPipeline
from sdxs.streaming import AsyncStream, Drawn, Dropped
from services.settings import ServingSettings

PROMPT = "red apple"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def _settings() -> ServingSettings:
    return ServingSettings(redis_url="", gateway_address=f"127.0.0.1:{free_port()}", drain_s=2)


def _serve(model: str, settings: ServingSettings, stop: Connection) -> None:
    """A server's process, until the other end of `stop` is closed."""
    from services.local import serve_local

    async def main() -> None:
        async with serve_local(model, settings):
            await asyncio.to_thread(stop.poll, None)

    asyncio.run(main())


@contextlib.contextmanager
def server(model: str, settings: ServingSettings) -> Iterator[int]:
    """The id of a process that serves."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(model, settings, theirs), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        ours.close()
        process.join(20)
        process.kill()


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 2**20


def cpu_seconds(pid: int) -> float:
    """Time a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class InProcess:
    """The pipeline without a server, its image encoded as the server's is."""

    def __init__(self, model: str, settings: ServingSettings) -> None:
        folder, manifest = registry.open_model(model, settings)
        self._pipeline = OneStepPipeline.from_bundle(folder)
        self._receipt = images.receipt(PROMPT, 7, manifest.name, manifest.digest)

    def draw(self) -> None:
        """One image."""
        images.encode(np.asarray(self._pipeline(PROMPT, seed=7)[0]), images.JPEG, self._receipt)

    async def run(self) -> float:
        """Seconds of one image."""
        began = time.perf_counter()
        self.draw()
        return time.perf_counter() - began


class OneByOne:
    """A stream whose next frame is sent when the last has come."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream
        self._events = aiter(stream)

    async def run(self) -> float:
        """Seconds of one frame, seen by the client."""
        began = time.perf_counter()
        await self._stream.send()
        async for event in self._events:
            if isinstance(event, Drawn):
                break
        return time.perf_counter() - began


async def added(model: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a frame in process, to a server in this process and to one in another, in turns; medians, and the best of each."""
    from services.local import serve_local

    near, far = _settings(), _settings()
    pipeline = InProcess(model, near)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(serve_local(model, near))
        stack.enter_context(server(model, far))
        ways: dict[str, Any] = {"in process": pipeline}
        for name, settings in (("stream, same process", near), ("stream, another process", far)):
            client = await stack.enter_async_context(AsyncClient(settings.gateway_address))
            await client.wait_ready(120)
            ways[name] = OneByOne(await stack.enter_async_context(client.stream(prompt=PROMPT, seed=7)))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(rounds + 5):
            for name, way in ways.items():
                taken = await way.run()
                if i >= 5:
                    seconds[name].append(taken)
    base = seconds["in process"]
    return [
        {
            "what": "added",
            "way": name,
            "ms": round(1e3 * statistics.median(taken), 2),
            "added_ms": round(1e3 * (statistics.median(taken) - statistics.median(base)), 2),
            "best_added_ms": round(1e3 * (min(taken) - min(base)), 2),
            "frames": rounds,
        }
        for name, taken in seconds.items()
    ]


async def overload(model: str, seconds: float, times: float) -> list[dict[str, Any]]:
    """Frames at `times` what the server draws: latency of those drawn, what was dropped, the server's memory, by tenth of the time."""
    settings = _settings()
    with server(model, settings) as pid:
        async with AsyncClient(settings.gateway_address) as client:
            await client.wait_ready(120)
            async with client.stream(prompt=PROMPT, seed=7) as stream:
                one = OneByOne(stream)
                capacity = 1 / statistics.median([await one.run() for _ in range(20)])
            async with client.stream(prompt=PROMPT, seed=7) as stream:
                parts = await _flood(stream, times * capacity, seconds, pid)
    return [{"what": "overload", "times": times, "capacity_fps": round(capacity, 1), **part} for part in parts]


async def _flood(stream: AsyncStream, fps: float, seconds: float, pid: int) -> list[dict[str, Any]]:
    """Send at that rate, whatever comes back."""
    began = time.perf_counter()
    sent: dict[int, float] = {}
    rows: list[tuple[float, float | None]] = []
    memory: list[tuple[float, float]] = []

    async def listen() -> None:
        async for event in stream:
            now = time.perf_counter()
            if isinstance(event, Drawn | Dropped):
                rows.append((now - began, now - sent.pop(event.frame_id) if isinstance(event, Drawn) else None))

    listening = asyncio.create_task(listen())
    frames = 0
    while (now := time.perf_counter() - began) < seconds:
        frames += 1
        sent[frames] = time.perf_counter()
        await stream.send()
        memory.append((now, resident_mb(pid)))
        await asyncio.sleep(max(0.0, frames / fps - (time.perf_counter() - began)))
    await stream.finish()
    await listening
    return [_part(i, seconds / 10, rows, memory) for i in range(10)]


def _part(i: int, length: float, rows: list[tuple[float, float | None]], memory: list[tuple[float, float]]) -> dict[str, Any]:
    """One tenth of the time."""
    here = [latency for at, latency in rows if i * length <= at < (i + 1) * length]
    drawn = [1e3 * latency for latency in here if latency is not None]
    resident = [mb for at, mb in memory if i * length <= at < (i + 1) * length]
    return {
        "from_s": round(i * length, 2),
        "drawn": len(drawn),
        "dropped": len(here) - len(drawn),
        "p50_ms": round(statistics.median(drawn), 1) if drawn else None,
        "max_ms": round(max(drawn), 1) if drawn else None,
        "server_mb": round(max(resident), 1) if resident else None,
    }


async def idle(model: str, sessions: int, seconds: float) -> list[dict[str, Any]]:
    """The server's computing time and memory, without sessions and with some that say nothing."""
    settings, lines = _settings(), []
    with server(model, settings) as pid:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(AsyncClient(settings.gateway_address))
            await client.wait_ready(120)
            await asyncio.sleep(1)
            for count in (0, sessions):
                for stream in [await stack.enter_async_context(client.stream(prompt=PROMPT)) for _ in range(count)]:
                    await anext(aiter(stream))
                before = cpu_seconds(pid)
                await asyncio.sleep(seconds)
                spent = cpu_seconds(pid) - before
                row = {"sessions": count, "cpu_share": round(spent / seconds, 4), "server_mb": round(resident_mb(pid), 1)}
                lines.append({"what": "idle", **row})
    return lines


async def measure(model: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """All rows."""
    return [*await added(model, rounds), *await overload(model, seconds, 3.0), *await idle(model, 50, seconds)]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the overload, and of doing nothing")
    parser.add_argument("--rounds", type=int, default=200, help="frames whose time is compared")
    options = parser.parse_args(arguments)
    lines = asyncio.run(measure(options.model, options.seconds, options.rounds))
    for line in lines:
        print(line)
    print(write("stream", [{**line, "machine": machine()} for line in lines]))


if __name__ == "__main__":
    main()
