"""Retention: images of jobs and images that steer are deleted when their time is up, but none that a job still needs.

The sweep is what deletes. The S3 server is given rules too, for what no worker comes to sweep; as it knows nothing of jobs they are
later by all the time that a job can be asked about, and what a job still needs is made young again before.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from redis.exceptions import RedisError

from sdxs.errors import NotFound, SdxsError
from sdxs.store import Entry, ObjectStore
from services.fabric.job_uses import awaited_images, known_jobs
from services.fabric.jobs import JobQueue
from services.fabric.keys import INPUTS, RESULTS, SCHEME
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_LOOK_S = 30.0  # between two looks whether it is time
_DAY_S = 24 * 3600


@dataclass
class Swept:
    """What a sweep found to be old."""

    deleted: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    """Needed by jobs."""


async def sweep(queue: JobQueue | None, store: ObjectStore, settings: ServingSettings, dry: bool = False) -> Swept:
    """Delete what is old and needed by no job; `dry`: only say what that is. Without a queue there are no jobs.

    A file is looked at once more before it goes: one that is used again between this look and its end, one round trip later, is lost,
    and a job that names it fails with NOT_FOUND. Raises redis.RedisError, and what the store does.
    """
    swept = Swept()
    for prefix, ttl_s in ((RESULTS, settings.results_ttl_s), (INPUTS, settings.inputs_ttl_s)):
        if not ttl_s:
            continue
        old = await asyncio.to_thread(lambda: [e for e in store.entries(prefix) if _age_s(e.modified) > ttl_s])  # noqa: B023
        needed = await _needed(queue, prefix, old)
        for entry in old:
            if entry.key in needed:
                swept.kept.append(entry)
                if not dry:
                    await asyncio.to_thread(_touch, store, entry.key)
            elif dry or await asyncio.to_thread(_delete, store, entry.key, ttl_s):
                swept.deleted.append(entry)
    return swept


async def _needed(queue: JobQueue | None, prefix: str, old: list[Entry]) -> set[str]:
    """Keys of old files that jobs need."""
    if queue is None or not old:
        return set()
    if prefix == INPUTS:
        return {INPUTS + name.removeprefix(SCHEME) for name in await awaited_images(queue)}
    jobs = {entry.key: entry.key.removeprefix(RESULTS).partition("/")[0] for entry in old}
    known = await known_jobs(queue, sorted(set(jobs.values())))
    return {key for key, job in jobs.items() if job in known}


def rules(settings: ServingSettings) -> dict[str, int]:
    """Days after which the server itself may delete, by prefix; 0: never."""
    asked_about_s = max(settings.job_ttl_s, settings.dead_job_ttl_s)
    ttls = {RESULTS: settings.results_ttl_s, INPUTS: settings.inputs_ttl_s}
    return {prefix: math.ceil((ttl_s + asked_about_s) / _DAY_S) + 1 if ttl_s else 0 for prefix, ttl_s in ttls.items()}


class Sweeper:
    """Sweeps every `sweep_every_s`, whichever worker comes first."""

    def __init__(self, queue: JobQueue, store: Callable[[], ObjectStore], settings: ServingSettings) -> None:
        self._queue = queue
        self._store = store
        self._settings = settings
        self._look_s = min(_LOOK_S, settings.sweep_every_s / 4)
        self._ruled = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`."""
        if not (self._settings.results_ttl_s or self._settings.inputs_ttl_s):
            return
        while not self._stopping.is_set():
            try:
                if await self._mine():
                    await self._sweep()
            except (RedisError, SdxsError) as error:
                logger.warning("nothing is swept: %s", error)
            except Exception:  # whatever it is, jobs go on
                logger.exception("nothing is swept")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._stopping.wait()

    def stop(self) -> None:
        """End after the sweep in hand."""
        self._stopping.set()

    async def _mine(self) -> bool:
        """Whether it is time, and no other worker has begun."""
        lease_ms = max(1, int(self._settings.sweep_every_s * 1000))
        return bool(await self._queue.redis.set(f"{self._queue.prefix}:swept", time.time(), nx=True, px=lease_ms))

    async def _sweep(self) -> None:
        """Once. The rules are set by the first sweep of a worker; a server that has none, or allows none, is swept all the same."""
        store = await asyncio.to_thread(self._store)
        if not self._ruled:
            self._ruled = True
            try:
                await asyncio.to_thread(store.expire_after, rules(self._settings))
            except SdxsError as error:
                logger.warning("the store takes no lifecycle rules: %s", error)
        swept = await sweep(self._queue, store, self._settings)
        if swept.deleted or swept.kept:
            size = sum(entry.size for entry in swept.deleted)
            logger.info("swept %d files of %d bytes; jobs need %d old ones", len(swept.deleted), size, len(swept.kept))


def _touch(store: ObjectStore, key: str) -> None:
    with contextlib.suppress(NotFound):
        store.touch(key)


def _delete(store: ObjectStore, key: str, ttl_s: float) -> bool:
    """Whether it is still old, and now gone."""
    try:
        still_old = _age_s(store.stat(key).modified) > ttl_s
    except NotFound:
        return False
    if still_old:
        store.delete(key)
    return still_old


def _age_s(modified: datetime) -> float:
    return (datetime.now(UTC) - modified).total_seconds()
