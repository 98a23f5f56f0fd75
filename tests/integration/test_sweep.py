"""Retention: what is old goes, what a job needs stays; with a real Redis, on a folder whose files are made old, and a real S3."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdxs.errors import InvalidRequest
from sdxs.store import Entry, FileStore, ObjectStore, open_store
from sdxs.v1 import control_pb2, gateway_pb2
from services.artifacts_cli import app
from services.fabric.dead_jobs import find_dead, replay
from services.fabric.deadline import Deadline
from services.fabric.jobs import JobQueue
from services.fabric.keys import INPUTS, RESULTS
from services.worker.sweep import Swept, rules, sweep
from tests.integration.test_store import s3_settings
from tests.jobs import Working, asking, ended, generated, settings, take

DAY_S = 24 * 3600
TTLS: dict[str, Any] = {"results_ttl_s": 30 * DAY_S, "inputs_ttl_s": 7 * DAY_S}
LONG_AGO_S = 100 * DAY_S


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Aged:
    """A folder whose files are as old as is said."""

    def __init__(self, folder: Path) -> None:
        self.store = FileStore(folder)

    def put(self, key: str, age_s: float = LONG_AGO_S) -> str:
        self.store.put_bytes(key, key.encode())
        self.age(key, age_s)
        return key

    def age(self, key: str, age_s: float) -> None:
        then = time.time() - age_s
        os.utime(self.store.root / key, (then, then))

    @property
    def keys(self) -> list[str]:
        return list(self.store.list(""))


@pytest.fixture
def aged(tmp_path: Path) -> Aged:
    return Aged(tmp_path / "artifacts")


def keys(entries: list[Entry]) -> list[str]:
    return sorted(entry.key for entry in entries)


async def swept(queue: JobQueue | None, store: ObjectStore, **changes: object) -> Swept:
    return await sweep(queue, store, settings(**{**TTLS, **changes}))


async def test_what_is_old_goes(queue: JobQueue, aged: Aged) -> None:
    young = [aged.put("results/forgotten/0.png", 29 * DAY_S), aged.put(f"{INPUTS}{digest('a')}", 6 * DAY_S)]
    old = [aged.put("results/gone/0/1.png", 31 * DAY_S), aged.put(f"{INPUTS}{digest('b')}", 8 * DAY_S)]
    others = aged.put("others/thing")
    assert keys((await sweep(queue, aged.store, settings(**TTLS), dry=True)).deleted) == sorted(old)
    assert aged.keys == sorted([*young, *old, others])
    assert keys((await swept(queue, aged.store)).deleted) == sorted(old)
    assert aged.keys == sorted([*young, others])


async def test_zero_is_for_ever(queue: JobQueue, aged: Aged) -> None:
    result, image = aged.put("results/gone/0.png"), aged.put(f"{INPUTS}{digest('a')}")
    await swept(queue, aged.store, results_ttl_s=0)
    assert aged.keys == [result]
    aged.put(image)
    await swept(queue, aged.store, inputs_ttl_s=0)
    assert aged.keys == [image]


def waiting(name: str) -> gateway_pb2.SubmitJobRequest:
    """A batch that needs two images."""
    order = asking("red apple", "pear")
    order.requests[0].init_image_uri = f"sdxs-input:{digest(name)}"
    order.requests[1].controls.append(control_pb2.Control(image_uri=f"sdxs-input:{digest(name + ' control')}"))
    return order


async def test_images_of_jobs_that_have_not_ended_stay_and_are_young_again(queue: JobQueue, aged: Aged) -> None:
    for name in ("queued", "running", "dead", "cancelled"):
        await queue.submit(name, name.encode(), waiting(name))
    await queue.cancel("cancelled")
    await take(queue)
    dead = await take(queue)
    dead = dead if dead.job_id == "dead" else await take(queue)
    await queue.bury(dead, "broken")
    images = {
        name: [aged.put(INPUTS + digest(each)) for each in (name, f"{name} control")] for name in ("queued", "running", "dead")
    }
    gone = [aged.put(INPUTS + digest("cancelled")), aged.put(INPUTS + digest("nobody"))]
    found = await swept(queue, aged.store)
    needed = sorted(key for pair in images.values() for key in pair)
    assert (keys(found.deleted), keys(found.kept)) == (sorted(gone), needed)
    assert aged.keys == needed
    assert all(time.time() - aged.store.stat(key).modified.timestamp() < 60 for key in needed)
    await replay(queue, await find_dead(queue, "dead"))
    for key in needed:
        aged.age(key, LONG_AGO_S)
    assert (await swept(queue, aged.store)).deleted == []


async def test_results_stay_while_their_job_can_be_asked_about(queue: JobQueue, aged: Aged) -> None:
    await queue.submit("known", b"", asking("red apple"))
    known, unknown = aged.put("results/known/0.png"), aged.put("results/unknown/0.png")
    assert keys((await swept(queue, aged.store)).deleted) == [unknown]
    delivery = await take(queue)
    await queue.succeed(delivery, gateway_pb2.GetJobResponse())
    aged.age(known, LONG_AGO_S)
    assert keys((await swept(queue, aged.store)).kept) == [known]
    await queue.redis.delete(queue.key("known"))  # as Redis does after job_ttl_s
    aged.age(known, LONG_AGO_S)
    assert keys((await swept(queue, aged.store)).deleted) == [known]


async def test_what_is_used_while_it_is_swept_stays(queue: JobQueue, aged: Aged) -> None:
    class Touched(FileStore):
        """Somebody uses each file between the listing and its end."""

        def entries(self, prefix: str) -> Iterator[Entry]:
            found = list(super().entries(prefix))
            for entry in found:
                self.touch(entry.key)
            return iter(found)

    key = aged.put(INPUTS + digest("a"))
    assert (await swept(queue, Touched(aged.store.root))).deleted == []
    assert aged.keys == [key]


async def test_many_jobs_are_looked_through(queue: JobQueue, aged: Aged) -> None:
    for i in range(450):  # several pages
        order = asking("red apple")
        order.request.init_image_uri = f"sdxs-input:{digest(str(i))}"
        await queue.submit(f"job-{i}", b"", order)
        aged.put(INPUTS + digest(str(i)))
        aged.put(f"{RESULTS}job-{i}/0.png")
    gone = [aged.put(INPUTS + digest("gone")), aged.put(f"{RESULTS}gone/0.png")]
    found = await swept(queue, aged.store)
    assert keys(found.deleted) == sorted(gone)
    assert len(found.kept) == 900


async def test_on_s3_with_short_lives(queue: JobQueue, s3_variables: dict[str, str]) -> None:
    store = open_store(s3_settings(s3_variables, store_url="s3://sdxs/swept"), "artifacts")
    needed = INPUTS + digest("queued")
    await queue.submit("queued", b"", waiting("queued"))
    for key in (needed, INPUTS + digest("gone"), "results/gone/0.png", "results/queued/0/0.png"):
        store.put_bytes(key, b"x")
    await asyncio.sleep(2.1)
    found = await swept(queue, store, results_ttl_s=1, inputs_ttl_s=1)
    assert keys(found.deleted) == sorted([INPUTS + digest("gone"), "results/gone/0.png"])
    assert list(store.list("")) == sorted([needed, "results/queued/0/0.png"])


async def test_one_of_the_workers_sweeps_and_no_more_often_than_it_should(queue: JobQueue, tmp_path: Path) -> None:
    store, aged, sweeps = FileStore(tmp_path), Aged(tmp_path), list[float]()

    class Counting(FileStore):
        def expire_after(self, days: Mapping[str, int]) -> None:
            sweeps.append(time.monotonic())

    def working() -> Working:
        made = Working(queue, tmp_path, sweep_every_s=60, **TTLS)
        made.worker._sweeper._store = lambda: Counting(tmp_path)
        return made

    aged.put("results/gone/0.png")
    async with working(), working(), working():
        await asyncio.sleep(0.5)
        assert len(sweeps) == 1
        assert list(store.list("")) == []


async def test_a_worker_sweeps_again_when_it_is_time(queue: JobQueue, tmp_path: Path) -> None:
    aged = Aged(tmp_path)
    async with Working(queue, tmp_path, sweep_every_s=0.4, **TTLS):
        for _ in range(2):
            aged.put("results/gone/0.png")
            async with asyncio.timeout(10):
                while aged.keys:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


async def test_a_store_that_fails_stops_no_job(queue: JobQueue, tmp_path: Path) -> None:
    class Broken(FileStore):
        def entries(self, prefix: str) -> Iterator[Entry]:
            raise ValueError(prefix)

    made = Working(queue, tmp_path, sweep_every_s=0.1, **TTLS)
    made.worker._sweeper._store = lambda: Broken(tmp_path)
    async with made:
        await asyncio.sleep(0.3)
        await queue.submit("one", b"", asking("red apple"))
        assert (await ended(queue, "one")).state == gateway_pb2.JOB_STATE_SUCCEEDED


async def test_a_job_whose_image_is_gone_fails_and_says_so(queue: JobQueue, tmp_path: Path) -> None:
    async def refusing(payload: bytes, deadline: Deadline) -> bytes:
        from services.gateway.inputs import Inputs

        request = gateway_pb2.GenerateRequest.FromString(payload)
        await Inputs(lambda: FileStore(tmp_path), queue.settings).filled(request, deadline)
        return await generated(payload, deadline)

    order = asking("red apple")
    order.request.init_image_uri = f"sdxs-input:{digest('gone')}"
    async with Working(queue, tmp_path, refusing):
        await queue.submit("one", b"", order)
        job = await ended(queue, "one")
    assert (job.error.code, job.error.field, job.deliveries) == ("NOT_FOUND", "init_image_uri", 1)


def test_the_servers_own_rules_come_later_than_any_job() -> None:
    made = rules(settings(results_ttl_s=30 * DAY_S, inputs_ttl_s=0, dead_job_ttl_s=7 * DAY_S, job_ttl_s=DAY_S))
    assert made == {"results/": 38, "inputs/": 0}
    assert rules(settings(results_ttl_s=1, inputs_ttl_s=1, dead_job_ttl_s=1, job_ttl_s=1)) == {"results/": 2, "inputs/": 2}


@pytest.fixture
def environment(aged: Aged, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_ARTIFACTS_URL", aged.store.root.as_uri())
    monkeypatch.setenv("SDXS_REDIS_URL", redis_url)


async def run(*arguments: str) -> str:
    """What `sdxs artifacts ARGUMENTS` prints."""
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


async def test_the_command_line(queue: JobQueue, aged: Aged, environment: None) -> None:
    result = "results/gone-with-an-id-as-long-as-ids-may-be-0123456789abcdef/0.png"
    aged.store.put_bytes(result, b"pixels", "image/png", {"prompt": "red%20apple", "seed": "7"})
    aged.age(result, LONG_AGO_S)
    image = aged.put(INPUTS + digest("queued"))
    await queue.submit("queued", b"", waiting("queued"))
    assert result in await run("list")
    assert [entry["key"] for entry in json.loads(await run("list", "--kind", "inputs", "--json"))] == [image]
    shown = json.loads(await run("show", result))
    assert {"size": 6, "type": "image/png", "prompt": "red apple", "seed": "7"}.items() <= shown.items()
    assert "1 would be deleted, 1 old ones kept for jobs" in await run("sweep", "--dry-run")
    assert aged.keys == [image, result]
    assert [entry["key"] for entry in json.loads(await run("sweep", "--json"))] == [result]
    assert aged.keys == [image]


async def test_an_unknown_key_is_an_error(aged: Aged, environment: None) -> None:
    with pytest.raises(InvalidRequest):
        await run("show", "../secret")
