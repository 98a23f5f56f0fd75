"""Images sent once and named in requests, on a real server: all rooms in one process, jobs on Redis, files in S3."""

import hashlib
import json
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import urllib3

from sdxs import cli, images
from sdxs.client import AsyncClient, Client
from sdxs.control import Control
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store, open_url
from sdxs.store.metadata import decode
from sdxs.uploads import ask
from sdxs.v1 import control_pb2, gateway_pb2, stream_pb2
from tests.integration.test_control_server import serving
from tests.integration.test_store import s3_settings
from tests.pictures import noise

PICTURE, START = noise(96), noise(40, seed=1)
STEERED: dict[str, Any] = {"seed": 7, "deterministic": True, "format": "png"}


@pytest.fixture(scope="module")
def settings(s3_variables: dict[str, str]) -> Settings:
    return s3_settings(s3_variables, store_url="s3://uploads")


@pytest.fixture(scope="module")
def store(settings: Settings) -> ObjectStore:
    return open_store(settings, "artifacts")


@pytest.fixture(scope="module")
def address(control_bundle: Path, redis_url: str, s3_variables: dict[str, str]) -> Iterator[str]:
    values: dict[str, Any] = {name.removeprefix("SDXS_").lower(): value for name, value in s3_variables.items()}
    values |= {"store_url": "s3://uploads", "input_buckets": "gallery", "redis_url": redis_url, "job_visibility_s": 2}
    with serving(control_bundle, **values) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def raw(address: str, image: bytes) -> gateway_pb2.CreateUploadResponse:
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary("/sdxs.v1.GatewayService/CreateUpload")
        return gateway_pb2.CreateUploadResponse.FromString(call(ask(image).SerializeToString(), timeout=10))


def test_an_image_is_sent_once(client: Client, address: str, store: ObjectStore) -> None:
    picture = noise(30, seed=5)
    digest = hashlib.sha256(picture).hexdigest()
    before = raw(address, picture)
    assert not before.already_there
    assert 3500 < before.url_expires.ToDatetime(UTC).timestamp() - datetime.now(UTC).timestamp() < 3700
    assert client.upload(picture) == before.uri == f"sdxs-input:{digest}"
    assert raw(address, picture).already_there
    assert client.upload(picture) == before.uri
    stat = store.stat(f"inputs/{digest}")
    assert (stat.content_type, stat.metadata["sha256"]) == ("image/png", digest)


def test_the_server_takes_no_other_file_for_it(address: str, store: ObjectStore) -> None:
    picture, other = noise(20, seed=6), noise(20, seed=7)[: len(noise(20, seed=6))]
    upload = raw(address, picture)
    answer = urllib3.request(upload.method, upload.url, body=other, headers=dict(upload.headers), retries=False)
    assert answer.status in (400, 403)
    assert not store.exists(f"inputs/{hashlib.sha256(picture).hexdigest()}")


@pytest.mark.parametrize("by", ["name", "s3 name", "other bucket"])
def test_by_name_it_is_the_same_image(client: Client, settings: Settings, by: str) -> None:
    def named(data: bytes) -> str:
        name = client.upload(data)
        if by == "other bucket":
            open_url("s3://gallery", settings).put_bytes(f"a/{hashlib.sha256(data).hexdigest()}.png", data)
            return f"s3://gallery/a/{hashlib.sha256(data).hexdigest()}.png"
        return name if by == "name" else name.replace("sdxs-input:", "s3://uploads-artifacts/inputs/")

    inline = client.generate(
        "red apple", controls=[Control(PICTURE, "edge", scale=0.8)], init_image=START, strength=0.6, **STEERED
    )
    control = Control(type="edge", scale=0.8, image_uri=named(PICTURE))
    by_name = client.generate("red apple", controls=[control], init_image_uri=named(START), strength=0.6, **STEERED)
    assert by_name.images[0].data == inline.images[0].data
    assert by_name.receipt.controls == inline.receipt.controls
    assert by_name.receipt.controls[0].image_sha256 == hashlib.sha256(PICTURE).hexdigest()
    assert by_name.receipt.init_image_sha256 == hashlib.sha256(START).hexdigest()


async def test_the_asyncio_client_too(address: str, client: Client) -> None:
    picture = noise(33, seed=8)
    async with AsyncClient(address) as other:
        name = await other.upload(picture)
        made = await other.generate("red apple", init_image_uri=name, **STEERED)
    assert made.images[0].data == client.generate("red apple", init_image=picture, **STEERED).images[0].data


def test_jobs_by_name_and_by_bytes_give_the_same_image(client: Client, store: ObjectStore) -> None:
    expected = client.generate("red apple", controls=[Control(PICTURE, "edge")], **STEERED).images[0].data
    controls = ([Control(PICTURE, "edge")], [Control(type="edge", image_uri=client.upload(PICTURE))])
    for given in controls:
        job = client.wait_job(client.submit_job("red apple", controls=given, **STEERED))
        [image] = job.images
        with urllib.request.urlopen(image.url) as answer:
            assert answer.read() == expected
        assert answer.headers["content-type"] == "image/png"
    facts = decode(store.stat(image.key).metadata)
    assert image.key == f"results/{job.job_id}/0.png"
    known = {"prompt": "red apple", "seed": "7", "model-digest": job.receipt.model_digest, "job": job.job_id}
    assert known.items() <= facts.items()
    assert facts["sha256"] == hashlib.sha256(expected).hexdigest()
    assert [each.partition("=")[0] for each in facts["stage-seconds"].split(",")] == [time.stage for time in job.receipt.stages]
    assert 0 < float(facts["seconds"]) < 60


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_files_say_what_they_follow_from_and_not_when(client: Client, name: str) -> None:
    options = {**STEERED, "format": name}
    made = [client.generate("café, an apple", init_image=START, **options) for _ in range(2)]
    assert made[0].images[0].data == made[1].images[0].data  # times would differ
    receipt = json.loads(images.receipt_text(made[0].images[0].data))
    assert receipt == {
        "prompt": "café, an apple",
        "seed": 7,
        "model": made[0].receipt.model,
        "digest": made[0].receipt.model_digest,
        "init_image_sha256": hashlib.sha256(START).hexdigest(),
        "strength": 1.0,
    }


def test_a_stream_says_that_it_takes_bytes(client: Client) -> None:
    name = client.upload(PICTURE)
    control = control_pb2.Control(type="edge", image_uri=name)
    frame = stream_pb2.StreamFrame(id=1, prompt="red apple", controls=[control])
    opening = stream_pb2.StreamRequest(open=stream_pb2.StreamOpen())
    requests = [opening, stream_pb2.StreamRequest(frame=frame), stream_pb2.StreamRequest(close=stream_pb2.StreamClose())]
    call: Any = client._channel.stream_stream("/sdxs.v1.GatewayService/Stream")
    answers = [stream_pb2.StreamResponse.FromString(each) for each in call(iter(each.SerializeToString() for each in requests))]
    [error] = [answer.error for answer in answers if answer.HasField("error")]
    assert (error.frame_id, error.error.code) == (1, "INVALID_ARGUMENT")
    assert error.error.field == "frame.controls[0].image_uri"


def test_what_is_no_image_is_not_sent(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="a PNG, JPEG or WebP file"):
        client.upload(b"GIF89a")


def test_a_server_with_a_folder_says_so(control_bundle: Path, tmp_path: Path) -> None:
    told = pytest.raises(PreconditionFailed, match="send the image in the request")
    with serving(control_bundle, store_url=f"file://{tmp_path}") as address, Client(address) as client, told:
        client.upload(PICTURE)


def sdxs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sdxs", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_line(
    client: Client, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from services.artifacts_cli import upload

    (tmp_path / "p.png").write_bytes(PICTURE)
    upload(tmp_path / "p.png", address)
    name = capsys.readouterr().out.strip()
    common = ["generate", "red apple", "--control-type", "edge", "--seed", "7"]
    assert sdxs(monkeypatch, *common, "-o", str(tmp_path / "a.png"), "--control", name, "--server", address, "--model", "") == 0
    expected = client.generate("red apple", controls=[Control(PICTURE, "edge")], **STEERED).images[0]
    assert (tmp_path / "a.png").read_bytes() == expected.data
    capsys.readouterr()
    assert sdxs(monkeypatch, *common, "-o", str(tmp_path / "b.png"), "--control", name) == 2
    assert "--server" in capsys.readouterr().err
