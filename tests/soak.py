"""Mixed load on a running server for as long as you like, and whether anything grows.

    python -m tests.soak                  30 minutes
    python -m tests.soak --minutes 5

Starts `sdxs serve` on Ray with the emoji model, and a Redis and an S3 server of its own, with jobs and images that are forgotten after
a minute. Unary callers, streams, jobs and batches, as in tests.chaos, and with them callers who leave in the middle, who cancel
jobs, who send nonsense, who open a connection for each call. Every ten seconds: memory (PSS), open files and threads of each
process, Redis' memory and keys, objects in S3.

Flat is what a line through the samples after the warm-up says: over the whole run no process gains more than a twentieth of its memory
or 15 MB, nor five files or threads; Redis' keys and the objects no more than a twentieth or 50. Exit code 1 otherwise, or when a
caller saw what it must not. Samples go to benchmarks/results/soak.jsonl, a picture to benchmarks/results/soak.png.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from redis import Redis

from benchmarks.machine import RESULTS, machine, write
from sdxs.client import AsyncClient
from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed, SdxsError
from sdxs.store import open_store
from services.settings import ServingSettings
from tests.chaos.load import PROMPTS, PROPER, Judge, Load, Seen
from tests.chaos.parts import World, world
from tests.e2e.conftest import descendants

EVERY_S = 10.0
WARM = 0.2
"""This share of the run is warm-up: caches fill, allocators find their size."""
SETTINGS = {"SDXS_JOB_TTL_S": "60", "SDXS_RESULTS_TTL_S": "60", "SDXS_INPUTS_TTL_S": "60", "SDXS_SWEEP_EVERY_S": "20"}
ALLOWED = {"mb": (0.05, 15.0), "files": (0.05, 5.0), "threads": (0.05, 5.0), "keys": (0.05, 50.0), "objects": (0.05, 50.0)}
"""Growth over the run that is none: the larger of a share of the mean and so much."""


class Unruly:
    """Callers that do not behave."""

    def __init__(self, address: str, seen: Callable[[], Seen]) -> None:
        self._address = address
        self._seen = seen
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        parts = [self._leave, self._cancel_jobs, self._talk_nonsense, self._come_anew]
        self._tasks = [asyncio.create_task(self._forever(part)) for part in parts]

    async def stop(self) -> None:
        """End."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def _forever(self, part: Callable[[AsyncClient], Awaitable[None]]) -> None:
        async with AsyncClient(self._address) as client:
            while not self._stopping.is_set():
                try:
                    await part(client)
                except SdxsError as error:
                    if error.code not in PROPER:
                        self._seen().wrong.append(f"{part.__name__}: {error.code}: {error}")
                await asyncio.sleep(0.3)

    async def _leave(self, client: AsyncClient) -> None:
        """In the middle of a call, and of a stream."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await client.generate(PROMPTS[0], n=4)
        async with client.stream(format="raw", prompt=PROMPTS[1]) as stream:
            await stream.send(seed=1)
            await anext(aiter(stream))

    async def _cancel_jobs(self, client: AsyncClient) -> None:
        job_id = await client.submit_batch(PROMPTS, format="png")
        await asyncio.sleep(0.05)
        with contextlib.suppress(PreconditionFailed, NotFound):  # it has ended
            await client.cancel_job(job_id)

    async def _talk_nonsense(self, client: AsyncClient) -> None:
        for prompt, options in (("", {}), ("x", {"n": 1000}), ("x", {"init_image": b"no image", "strength": 0.5})):
            with contextlib.suppress(InvalidRequest):
                await client.generate(prompt, **options)
                self._seen().wrong.append(f"{prompt!r} with {options} was taken")
        with contextlib.suppress(NotFound):
            await client.generate("x", model="nobody's")

    async def _come_anew(self, _: AsyncClient) -> None:
        async with AsyncClient(self._address) as client:
            await client.generate(PROMPTS[2], seed=2)


def sample(here: World, redis: Redis, settings: ServingSettings, began: float) -> list[dict[str, Any]]:
    """Of each process, of Redis and of the store."""
    at = round(time.monotonic() - began, 1)
    rows = list[dict[str, Any]]()
    pids = {here.served.process.pid, *descendants(here.served.process.pid)}
    for external in here.externals.values():
        pids |= external.pids()
    for pid in sorted(pids):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            with process.oneshot():
                facts = {
                    "mb": process.memory_full_info().pss / 1e6,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }
                rows.append({"at": at, "what": f"{_name(process)} ({pid})", **facts, "cpu_s": sum(process.cpu_times()[:2])})
    info: Any = redis.info("memory")
    rows.append({"at": at, "what": "Redis' data", "mb": info["used_memory"] / 1e6, "keys": redis.dbsize()})
    store = open_store(settings, "artifacts")
    rows.append({"at": at, "what": "store", "objects": sum(1 for _ in store.entries("results/"))})
    return rows


def _name(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    if title.startswith("ray::ServeReplica"):
        return title.split(" ")[0].rpartition(":")[2]
    return title.split(" ")[0].rpartition("/")[2] or process.name()


def growth(rows: Sequence[dict[str, Any]], measure: str) -> tuple[float, float]:
    """What the least-squares line through the samples after the warm-up gains from first to last, and their mean."""
    last = rows[-1]["at"]
    late = [(row["at"], row[measure]) for row in rows if row["at"] >= WARM * last]
    at, values = (np.array(column, float) for column in zip(*late, strict=True))
    return float(np.polyfit(at, values, 1)[0] * (at[-1] - at[0])), float(values.mean())


def verdict(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each thing that lasted and each measure of it."""
    found = []
    last = max(row["at"] for row in rows)
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        if mine[-1]["at"] - mine[0]["at"] < (1 - WARM) * last:
            continue
        for measure, (share, least) in ALLOWED.items():
            if measure in mine[0]:
                gain, mean = growth(mine, measure)
                flat = gain <= max(share * mean, least)
                facts = {"mean": round(mean, 1), "gain": round(gain, 2), "first": round(mine[0][measure], 1), "flat": flat}
                found.append({"what": what, "measure": measure, **facts, "last": round(mine[-1][measure], 1)})
    return found


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory of each over time, and what is counted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(14, 9))
    for measure, axis in zip(("mb", "files", "threads", "objects"), axes.flat, strict=True):
        for what in dict.fromkeys(row["what"] for row in rows if measure in row):
            mine = [row for row in rows if row["what"] == what]
            axis.plot([row["at"] / 60 for row in mine], [row[measure] for row in mine], label=what.partition(" (")[0])
        axis.set(xlabel="minutes", title={"mb": "memory, MB (PSS)", "objects": "images in the store"}.get(measure, measure))
    axes[0][0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


async def run(minutes: float, callers: int) -> tuple[list[dict[str, Any]], Seen]:
    """The samples, and what the callers saw."""
    judge = Judge()
    judge.knows()
    with (
        tempfile.TemporaryDirectory(prefix="sdxs-soak-") as folder,
        world(Path(folder) / "world", SETTINGS, "--model", "emoji") as here,
    ):
        variables = {name.removeprefix("SDXS_").lower(): value for name, value in here.variables.items()}
        settings = ServingSettings.model_validate(variables)
        load = Load(here.served.address, judge, seed=0)
        unruly = Unruly(here.served.address, lambda: load.seen)
        load.start(callers=callers, streams=2)
        unruly.start()
        began, rows = time.monotonic(), list[dict[str, Any]]()
        with Redis.from_url(settings.redis_url, protocol=2) as redis:
            while time.monotonic() - began < 60 * minutes:
                rows += await asyncio.to_thread(sample, here, redis, settings, began)
                load.seen.calls.clear()  # this process is not to grow either
                await asyncio.sleep(EVERY_S)
                seen = load.seen
                print(f"{(time.monotonic() - began) / 60:5.1f} min: {seen.images} images, {seen.frames} frames, {len(seen.jobs)} jobs, "
                      f"{dict(seen.errors)} {seen.wrong[-1:]}", flush=True)  # fmt: skip
        await unruly.stop()
        await load.stop()
        return rows, load.seen


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=6, help="of unary calls")
    options = parser.parse_args(arguments)
    rows, seen = asyncio.run(run(options.minutes, options.callers))
    found = verdict(rows)
    for line in found:
        print(
            f"{line['what']:40} {line['measure']:8} mean {line['mean']:9} gains {line['gain']:8} {'' if line['flat'] else 'GROWS'}"
        )
    for what in seen.wrong:
        print(what)
    grows = [line for line in found if not line["flat"]]
    jobs = len(seen.jobs)
    print(f"{options.minutes:g} minutes: {seen.images} calls, {seen.frames} frames, {jobs} jobs, {dict(seen.errors)}")
    print(f"{len(seen.wrong)} wrong, {len(grows)} grow")
    facts = {
        "minutes": options.minutes,
        "images": seen.images,
        "frames": seen.frames,
        "jobs": jobs,
        "errors": dict(seen.errors),
    }
    write("soak", [{**facts, "wrong": len(seen.wrong), "machine": machine()}, *found, *rows])
    picture(rows, RESULTS / "soak.png")
    return 1 if grows or seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
