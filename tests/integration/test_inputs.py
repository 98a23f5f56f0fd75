"""Images that steer, in the store: read by name, left there by jobs; on a folder and a real S3, with a real Redis."""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxs.client import AsyncClient
from sdxs.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from sdxs.store import FileStore, ObjectStore, open_store, open_url
from sdxs.v1 import control_pb2, gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.jobs import JobQueue
from services.gateway.inputs import Inputs
from tests.integration.test_store import s3_settings
from tests.jobs import gateway, settings
from tests.pictures import noise

LARGE, OTHER, SMALL = noise(96), noise(96, seed=1), noise(8)


def uri(data: bytes) -> str:
    return f"sdxs-input:{hashlib.sha256(data).hexdigest()}"


def key(data: bytes) -> str:
    return f"inputs/{hashlib.sha256(data).hexdigest()}"


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "file":
        yield FileStore(tmp_path / "artifacts")
    else:
        variables = request.getfixturevalue("s3_variables")
        place = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
        yield open_store(s3_settings(variables, store_url=f"s3://inputs/{place}"), "artifacts")


def inputs(store: ObjectStore, **changes: object) -> Inputs:
    return Inputs(lambda: store, settings(**changes))


def naming(*names: str, init: str = "", **fields: Any) -> gateway_pb2.GenerateRequest:
    controls = [control_pb2.Control(image_uri=name, type="edge") for name in names]
    return gateway_pb2.GenerateRequest(prompt="red apple", controls=controls, init_image_uri=init, **fields)


async def test_names_become_bytes(store: ObjectStore) -> None:
    for data in (LARGE, OTHER):
        store.put_bytes(key(data), data)
    request = naming(uri(LARGE), init=uri(OTHER))
    filled = await inputs(store).filled(request, Deadline())
    assert [(each.image, each.image_uri, each.type) for each in filled.controls] == [(LARGE, "", "edge")]
    assert (filled.init_image, filled.init_image_uri) == (OTHER, "")
    assert request.controls[0].image_uri  # whoever asked keeps what he asked


async def test_what_was_read_is_not_read_again(store: ObjectStore) -> None:
    store.put_bytes(key(LARGE), LARGE)
    reader = inputs(store)
    await reader.filled(naming(uri(LARGE)), Deadline())
    store.delete(key(LARGE))
    assert (await reader.filled(naming(uri(LARGE)), Deadline())).controls[0].image == LARGE
    small = inputs(store, input_cache_bytes=len(LARGE) - 1)
    with pytest.raises(NotFound):
        await small.filled(naming(uri(LARGE)), Deadline())


async def test_a_file_that_is_not_there_is_named(store: ObjectStore) -> None:
    store.put_bytes(key(LARGE), LARGE)
    with pytest.raises(NotFound, match="never uploaded, or expired") as caught:
        await inputs(store).filled(naming(uri(LARGE), uri(OTHER)), Deadline())
    assert caught.value.field == "controls[1].image_uri"


async def test_all_images_of_a_request_share_its_room(store: ObjectStore) -> None:
    for data in (LARGE, OTHER):
        store.put_bytes(key(data), data)
    room = len(LARGE) + len(OTHER)
    filled = await inputs(store, max_image_bytes=room).filled(naming(uri(LARGE), init=uri(OTHER)), Deadline())
    assert filled.init_image == OTHER
    for request, field in (
        (naming(uri(LARGE), init=uri(OTHER)), "init_image_uri"),
        (naming(uri(OTHER), init_image=LARGE), "controls[0].image_uri"),
    ):
        reader = inputs(store, max_image_bytes=room - 1)
        for _ in range(2):  # from the store, then from the cache
            with pytest.raises(InvalidRequest, match="for all images of a request together") as caught:
                await reader.filled(request, Deadline())
            assert caught.value.field == field


async def test_a_file_that_is_not_what_its_name_says_goes(store: ObjectStore) -> None:
    store.put_bytes(key(LARGE), OTHER)  # as by a store that checks no upload
    reader = inputs(store)
    with pytest.raises(InvalidRequest, match="send it again") as caught:
        await reader.filled(naming(init=uri(LARGE)), Deadline())
    assert caught.value.field == "init_image_uri"
    assert not store.exists(key(LARGE))
    store.put_bytes(key(LARGE), LARGE)
    assert (await reader.filled(naming(init=uri(LARGE)), Deadline())).init_image == LARGE


async def test_a_file_that_is_used_stays_young(store: ObjectStore) -> None:
    store.put_bytes(key(LARGE), LARGE)
    young = store.stat(key(LARGE)).modified
    await inputs(store, inputs_ttl_s=1000).filled(naming(uri(LARGE)), Deadline())
    assert store.stat(key(LARGE)).modified == young
    await asyncio.sleep(1.2)
    await inputs(store, inputs_ttl_s=0).filled(naming(uri(LARGE)), Deadline())
    assert store.stat(key(LARGE)).modified == young
    await inputs(store, inputs_ttl_s=2).filled(naming(uri(LARGE)), Deadline())
    touched = store.stat(key(LARGE)).modified
    assert touched > young
    await asyncio.sleep(1.2)
    assert (await inputs(store, inputs_ttl_s=2).kept(naming(init_image=LARGE))).init_image_uri == uri(LARGE)
    assert store.stat(key(LARGE)).modified > touched


async def test_buckets_that_are_allowed_are_read_and_left_alone(s3_variables: dict[str, str]) -> None:
    values = s3_settings(s3_variables)
    theirs = open_url("s3://theirs/public", values)
    theirs.put_bytes("inputs/a.png", LARGE)
    made = theirs.stat("inputs/a.png").modified
    changes = {name: getattr(values, name) for name in ("s3_endpoint", "s3_access_key", "s3_secret_key")}
    ours = open_store(values, "artifacts")
    reader = Inputs(lambda: ours, settings(**changes, input_buckets="theirs/public", inputs_ttl_s=1))
    await asyncio.sleep(1.1)
    filled = await reader.filled(naming(init="s3://theirs/public/inputs/a.png"), Deadline())
    assert filled.init_image == LARGE
    assert theirs.stat("inputs/a.png").modified == made
    assert (await reader.kept(filled)).init_image_uri == uri(LARGE)  # a job has a copy: theirs may change
    assert ours.get_bytes(key(LARGE)) == LARGE
    with pytest.raises(NotFound):
        await reader.filled(naming(init="s3://theirs/public/none"), Deadline())


async def test_a_store_that_hangs_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    class Slow(FileStore):
        def stat(self, key: str) -> Any:
            hung.wait(5)
            return super().stat(key)

    import threading

    hung = threading.Event()
    with pytest.raises(DeadlineExceeded):
        await inputs(Slow(tmp_path)).filled(naming(uri(LARGE)), Deadline.after(0.05))
    hung.set()


async def test_jobs_leave_their_images_in_the_store(queue: JobQueue, tmp_path: Path, store: ObjectStore) -> None:
    async with gateway(queue, tmp_path, store=store) as address, AsyncClient(address) as client:
        await client.submit_job("red apple", init_image=LARGE, request_id="large")
        await client.submit_job("red apple", init_image=SMALL, request_id="small")
        await client.submit_batch(["red apple", "pear"], init_image=OTHER, request_id="batch")
    assert len(LARGE) > queue.settings.input_inline_bytes > len(SMALL)

    async def waiting(job_id: str) -> gateway_pb2.SubmitJobRequest:
        return gateway_pb2.SubmitJobRequest.FromString(await queue.redis.hget(queue.key(job_id), "request"))

    assert (await waiting("large")).request.init_image_uri == uri(LARGE)
    assert (await waiting("large")).ByteSize() < 200
    assert (await waiting("small")).request.init_image == SMALL
    assert [each.init_image_uri for each in (await waiting("batch")).requests] == [uri(OTHER)] * 2
    assert sorted(store.list("inputs/")) == sorted([key(LARGE), key(OTHER)])
    assert store.get_bytes(key(LARGE)) == LARGE


async def test_the_same_images_are_the_same_job_however_they_come(queue: JobQueue, tmp_path: Path, store: ObjectStore) -> None:
    store.put_bytes(key(LARGE), LARGE)
    store.put_bytes(key(OTHER), OTHER)
    async with gateway(queue, tmp_path, store=store) as address, AsyncClient(address) as client:
        for _ in range(2):
            await client.submit_job("red apple", init_image=LARGE, request_id="one")
            await client.submit_job("red apple", init_image_uri=uri(LARGE), request_id="one")
        for other in ({"init_image": OTHER}, {"init_image_uri": uri(OTHER)}, {}):
            with pytest.raises(AlreadyExists):
                await client.submit_job("red apple", request_id="one", **other)
    assert await queue.backlog() == 1


async def test_the_queue_has_room_for_many_large_images(queue: JobQueue, tmp_path: Path) -> None:
    queue.settings = settings(max_queued_bytes=10_000)
    async with gateway(queue, tmp_path) as address, AsyncClient(address) as client:
        for i in range(20):  # 20 times 28 KB
            await client.submit_job("red apple", init_image=LARGE, request_id=f"job-{i}")
    assert await queue.backlog() == 20


async def test_jobs_are_refused_by_the_name_of_the_field(queue: JobQueue, tmp_path: Path) -> None:
    async with gateway(queue, tmp_path) as address, AsyncClient(address) as client:
        for name in ("http://169.254.169.254/", "file:///etc/passwd", "s3://sdxs-models/bundles/x"):
            with pytest.raises(InvalidRequest) as caught:
                await client.submit_job("red apple", init_image_uri=name)
            assert caught.value.field == "request.init_image_uri"
        with pytest.raises(NotFound) as missing:
            await client.submit_batch(["red apple"], init_image_uri=uri(LARGE))
        assert missing.value.field == "requests[0].init_image_uri"
        with pytest.raises(InvalidRequest) as both:
            await client.generate("red apple", init_image=LARGE, init_image_uri=uri(LARGE))
        assert both.value.field == "init_image_uri"
    assert await queue.backlog() == 0


async def test_what_a_job_brings_is_read_before_it_is_kept(queue: JobQueue, tmp_path: Path) -> None:
    async with gateway(queue, tmp_path) as address, AsyncClient(address) as client:
        with pytest.raises(InvalidRequest):
            await client.submit_job("red apple", init_image=b"no image" * 2000)
    assert list(FileStore(tmp_path).list("inputs/")) == []


async def test_without_its_store_a_gateway_refuses_large_images_alone(queue: JobQueue, tmp_path: Path) -> None:
    class Away(FileStore):
        def stat(self, key: str) -> Any:
            raise Unavailable("the object store does not answer")

    async with gateway(queue, tmp_path, store=Away(tmp_path)) as address, AsyncClient(address) as client:
        await client.submit_job("red apple", init_image=SMALL)
        with pytest.raises(Unavailable):
            await client.submit_job("red apple", init_image=LARGE)
    assert await queue.backlog() == 1


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("sha256", {"sha256": "x"}),
        ("sha256", {"sha256": "A" * 64}),
        ("size", {"size": 0}),
        ("size", {"size": 1 << 40}),
        ("media_type", {"media_type": "text/html"}),
    ],
)
async def test_uploads_that_make_no_sense(tmp_path: Path, field: str, changes: dict[str, Any]) -> None:
    right: dict[str, Any] = {"sha256": "0" * 64, "size": 1, "media_type": "image/png"}
    with pytest.raises(InvalidRequest) as caught:
        await inputs(FileStore(tmp_path)).create_upload(gateway_pb2.CreateUploadRequest(**{**right, **changes}))
    assert caught.value.field == field


async def test_a_file_that_is_there_need_not_be_sent(store: ObjectStore) -> None:
    store.put_bytes(key(LARGE), LARGE)
    digest = hashlib.sha256(LARGE).hexdigest()
    asked = gateway_pb2.CreateUploadRequest(sha256=digest, size=len(LARGE), media_type="image/png")
    answer = await inputs(store).create_upload(asked)
    assert (answer.uri, answer.already_there, answer.url) == (uri(LARGE), True, "")


def test_file_times_are_what_touch_changes(tmp_path: Path) -> None:
    """The folder's age is the file's own, as any tool sees it."""
    store = FileStore(tmp_path)
    store.put_bytes("k", b"")
    os.utime(tmp_path / "k", (1, 1))
    assert store.stat("k").modified.timestamp() == 1
