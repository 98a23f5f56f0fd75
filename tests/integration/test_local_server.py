"""The gateway with all rooms in one process, a real Redis and a real S3, asked over gRPC."""

import asyncio
import hashlib
import inspect
import io
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import grpc
import numpy as np
import PIL.Image
import pytest

import sdxs
from sdxs import images, tensors
from sdxs.client import AsyncClient, Client
from sdxs.embedded import free_port
from sdxs.errors import AlreadyExists, InvalidRequest, NotFound, Unavailable
from sdxs.pipeline import OneStepPipeline
from sdxs.v1 import decoder_pb2, gateway_pb2, text_encoder_pb2, unet_pb2
from services.fabric.deadline import Deadline
from services.local import serve_local
from services.settings import ServingSettings
from services.unet.service import load
from tests.serving import BAD_REQUESTS, INVALID, MISSING, in_process, refusal

PROMPT = "red apple"


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, redis_url: str, s3_variables: dict[str, str]) -> Iterator[str]:
    values = {name.removeprefix("SDXS_").lower(): value for name, value in s3_variables.items()}
    address = f"127.0.0.1:{free_port()}"
    settings = ServingSettings.model_validate(
        {**values, "redis_url": redis_url, "gateway_address": address, "job_visibility_s": 2, "drain_s": 1}
    )
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        async with serve_local(str(tiny_bundle), settings):
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    with Client(address) as client:
        client.wait_ready(60)
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(tiny_bundle)


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "raw"])
def test_a_served_file_is_the_in_process_file(client: Client, tiny_bundle: Path, name: str) -> None:
    served = client.generate(PROMPT, seed=7, format=name)
    assert served.images[0].data == in_process(tiny_bundle, PROMPT, 7, images.NAMES[name])
    assert (served.receipt.unet_batch, served.receipt.decoder_batch) == (1, 1)


def test_deterministic_images_do_not_depend_on_their_number(client: Client, pipeline: OneStepPipeline) -> None:
    served = client.generate(PROMPT, seed=3, n=5, format="raw", deterministic=True)
    expected = [image.tobytes() for image in pipeline(PROMPT, seed=3, n=5)]
    assert [image.data for image in served.images] == expected
    assert list(served.receipt.seeds) == [3, 4, 5, 6, 7]
    assert (served.receipt.unet_batch, served.receipt.decoder_batch) == (1, 1)


def test_under_load_images_differ_by_rounding_at_most(client: Client, pipeline: OneStepPipeline) -> None:
    with ThreadPoolExecutor(16) as threads:
        served = list(threads.map(lambda seed: client.generate(PROMPT, seed=seed, n=2, format="raw"), range(0, 64, 2)))
    assert max(one.receipt.unet_batch for one in served) > 2, "nothing was batched across requests"
    for one in served:
        for seed, image in zip(one.receipt.seeds, one.images, strict=True):
            expected = np.asarray(pipeline(PROMPT, seed=seed)[0], np.int16)
            assert np.abs(np.asarray(image.pil(), np.int16) - expected).max() <= 1


def test_the_receipt_says_how_to_make_it_again(client: Client) -> None:
    first = client.generate(PROMPT, format="png")
    again = client.generate(first.receipt.prompt, seed=first.receipt.seeds[0], model=first.receipt.model_digest, format="png")
    assert again.images[0].data == first.images[0].data
    text = json.loads(images.receipt_text(first.images[0].data))
    assert text == {"prompt": PROMPT, "seed": first.receipt.seeds[0], "model": "tiny", "digest": first.receipt.model_digest}


def test_the_receipt_says_what_each_stage_took(client: Client) -> None:
    first = client.generate("unasked", seed=1).receipt
    again = client.generate("unasked", seed=2).receipt
    assert [stage.stage for stage in first.stages] == ["text_encoder", "unet", "decoder"]
    assert [stage.stage for stage in again.stages] == ["unet", "decoder"], "the prompt is encoded once"
    for receipt in (first, again):
        assert all(stage.queue_seconds >= 0 and stage.compute_seconds > 0 for stage in receipt.stages)
        assert sum(stage.queue_seconds + stage.compute_seconds for stage in receipt.stages) < receipt.seconds
        installed = f"sdxs/{sdxs.__version__} torch/{version('torch')} diffusers/{version('diffusers')}"
        installed += f" transformers/{version('transformers')}"
        assert receipt.software == installed
        assert {stage.software for stage in receipt.stages} == {f"{installed} cpu/float32"}


def test_jpeg_is_what_comes_when_nothing_is_asked(client: Client) -> None:
    image = client.generate(PROMPT).images[0]
    assert (image.format, image.width, image.height) == ("jpeg", 32, 32)
    assert PIL.Image.open(io.BytesIO(image.data)).format == "JPEG"


@pytest.mark.parametrize(("payload", "code", "field"), BAD_REQUESTS)
def test_a_bad_request_names_its_field(address: str, payload: bytes, code: grpc.StatusCode, field: str) -> None:
    found = refusal(address, "Generate", payload)
    assert (found.code, found.fields) == (code, (field,))


def test_a_bad_job_names_its_field(address: str) -> None:
    def submit(**fields: object) -> bytes:
        return gateway_pb2.SubmitJobRequest(**fields).SerializeToString()  # type: ignore[arg-type]

    found = refusal(address, "SubmitJob", submit(request=gateway_pb2.GenerateRequest(prompt="")))
    assert (found.code, found.fields) == (INVALID, ("request.prompt",))
    found = refusal(address, "SubmitJob", submit(request=gateway_pb2.GenerateRequest(prompt="a", model="nobody")))
    assert (found.code, found.fields) == (MISSING, ("request.model",))
    found = refusal(address, "SubmitJob", submit(request=gateway_pb2.GenerateRequest(prompt="a"), request_id="no spaces"))
    assert (found.code, found.fields) == (INVALID, ("request_id",))
    found = refusal(address, "SubmitJob", submit(request=gateway_pb2.GenerateRequest(prompt="a", model="other")))
    assert (found.code, found.fields) == (grpc.StatusCode.NOT_FOUND, ("request.model",))
    found = refusal(address, "GetJob", b"")
    assert (found.code, found.fields) == (INVALID, ("job_id",))


def test_errors_reach_the_client_as_they_were_raised(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="16 tokens") as caught:
        client.generate("a " * 20)
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        client.generate(PROMPT, seed=2**64)
    assert caught.value.field == "seed"
    with pytest.raises(NotFound, match="tiny") as missing:
        client.generate(PROMPT, model="other")
    assert missing.value.field == "model"
    with pytest.raises(NotFound):
        client.get_job("never-submitted")


def test_models_are_listed(client: Client, pipeline: OneStepPipeline) -> None:
    [model] = client.list_models()
    assert (model.name, model.digest) == ("tiny", pipeline.manifest.digest)
    assert (model.width, model.height, model.max_prompt_tokens) == (32, 32, 16)


def test_a_job_ends_as_a_file_behind_a_url(client: Client, tiny_bundle: Path) -> None:
    job_id = client.submit_job(PROMPT, seed=11, n=2, format="png", deterministic=True)
    job = client.wait_job(job_id, timeout=30)
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
    for seed, image in zip((11, 12), job.images, strict=True):
        data = urllib.request.urlopen(image.url, timeout=10).read()
        assert data == in_process(tiny_bundle, PROMPT, seed, images.PNG)
        assert (image.size, image.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_batch_ends_as_files_behind_urls(client: Client, tiny_bundle: Path) -> None:
    prompts = ["red apple", "green apple", "red apple"]
    job_id = client.submit_batch(prompts, seed=11, format="png", deterministic=True, priority="high")
    [*_, job] = client.watch_job(job_id, timeout=60)
    assert (job.state, job.progress.done) == (gateway_pb2.JOB_STATE_SUCCEEDED, 3)
    for prompt, item in zip(prompts, job.items, strict=True):
        data = urllib.request.urlopen(item.images[0].url, timeout=10).read()
        assert data == in_process(tiny_bundle, prompt, 11, images.PNG)
        assert item.receipt.prompt == prompt
    with pytest.raises(InvalidRequest) as caught:
        client.submit_batch(["red apple", "a " * 20])
    assert caught.value.field == "requests[1].prompt"


def test_a_job_sent_twice_is_one_job(client: Client) -> None:
    first = client.submit_job(PROMPT, request_id="once")
    assert client.submit_job(PROMPT, request_id="once") == first == "once"
    with pytest.raises(AlreadyExists):
        client.submit_job("green apple", request_id="once")
    done = client.wait_job("once", timeout=30)
    client.submit_job(PROMPT, request_id="once")
    assert client.get_job("once").finished == done.finished


async def test_the_async_client_does_the_same(address: str, tiny_bundle: Path) -> None:
    async with AsyncClient(address) as client:
        await client.wait_ready(timeout=5)
        assert await client.ready()
        served = await client.generate(PROMPT, seed=7, format="png")
        job = await client.wait_job(await client.submit_job(PROMPT, seed=7, format="png"))
        assert [model.name for model in await client.list_models()] == ["tiny"]
        with pytest.raises(InvalidRequest, match="prompt"):
            await client.generate("")
    expected = in_process(tiny_bundle, PROMPT, 7, images.PNG)
    assert served.images[0].data == expected
    assert job.images[0].sha256 == hashlib.sha256(expected).hexdigest()


async def test_both_clients_say_that_nobody_serves() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    async with AsyncClient(nowhere) as client:
        assert not await client.ready()
        with pytest.raises(Unavailable, match="not SERVING after"):
            await client.wait_ready(timeout=0.2)
    with Client(nowhere) as blocking, pytest.raises(Unavailable, match="not SERVING after"):
        await asyncio.to_thread(blocking.wait_ready, 0.2)


def test_the_async_client_has_all_that_the_blocking_one_has() -> None:
    def public(client: type) -> dict[str, list[str]]:
        methods = {name: method for name, method in vars(client).items() if not name.startswith("_")}
        return {name: [str(p) for p in inspect.signature(method).parameters.values()] for name, method in methods.items()}

    assert public(AsyncClient) == public(Client)


def test_a_foreign_client_finds_its_way_by_reflection(address: str) -> None:
    buf = str(Path(sys.executable).with_name("buf"))
    body = json.dumps({"prompt": PROMPT, "seed": 7, "format": "IMAGE_FORMAT_PNG"})
    curl = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", body]
    done = subprocess.run([*curl, f"http://{address}/sdxs.v1.GatewayService/Generate"], capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["receipt"]["seeds"] == ["7"]
    assert answer["images"][0]["width"] == 32


async def test_a_stage_refuses_what_does_not_fit(tiny_bundle: Path) -> None:
    settings = ServingSettings()
    room = load(tiny_bundle, "ours", settings)
    good = tensors.encode(np.zeros((16, 32), np.float32))
    wrong = tensors.encode(np.zeros((16, 31), np.float32))
    cases = [
        (unet_pb2.DenoiseRequest(text=text_encoder_pb2.EncodeResponse(text=good, model_digest="ours")), "seeds"),
        (unet_pb2.DenoiseRequest(text=text_encoder_pb2.EncodeResponse(text=good), seeds=[1]), "text.model_digest"),
        (
            unet_pb2.DenoiseRequest(text=text_encoder_pb2.EncodeResponse(text=wrong, model_digest="ours"), seeds=[1]),
            "text.text.shape",
        ),
    ]
    for request, field in cases:
        with pytest.raises(InvalidRequest) as caught:
            await room.denoise(request, Deadline())
        assert caught.value.field == field


async def test_a_latent_that_is_no_number_is_refused(tiny_bundle: Path) -> None:
    import services.decoder.service as decoder

    room = decoder.load(tiny_bundle, "ours", ServingSettings())
    latent = tensors.encode(np.full((1, 8, 4, 4), np.nan, np.float32))
    denoised = unet_pb2.DenoiseResponse(latent=latent, model_digest="ours")
    with pytest.raises(InvalidRequest) as caught:
        await room.decode(decoder_pb2.DecodeRequest(latent=denoised), Deadline())
    assert caught.value.field == "latent.latent.data"


async def test_a_server_that_stops_ends_its_threads(tiny_bundle: Path) -> None:
    def devices() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("device")}

    before = devices()
    settings = ServingSettings(redis_url="", gateway_address=f"127.0.0.1:{free_port()}", drain_s=1)
    async with serve_local(str(tiny_bundle), settings), AsyncClient(settings.gateway_address) as client:
        await client.generate(PROMPT)
        assert len(devices() - before) == 3
    async with asyncio.timeout(5):
        while devices() - before:  # noqa: ASYNC110 - threads know nothing of events
            await asyncio.sleep(0.01)
