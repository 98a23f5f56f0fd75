"""Image conditions and image to image on a real server: all rooms in one process, residuals in shared memory, jobs on Redis and S3."""

import asyncio
import functools
import hashlib
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import numpy as np
import pytest
import safetensors.torch
from hypothesis import strategies as st

from sdxs.client import AsyncClient, Client
from sdxs.control import Control
from sdxs.embedded import free_port
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.pipeline import OneStepPipeline
from sdxs.v1 import control_pb2, gateway_pb2
from services.controlnet.sending import Sender
from services.local import serve_local
from services.settings import ServingSettings
from tests.controlnets import animation, control_folder, drawing, huge_header, sixteen_bit
from tests.serving import INVALID, message, refusal

PROMPT = "red apple"
DRAWING, OTHER, SMALL = drawing(), drawing(shift=9), drawing((13, 70))


@contextmanager
def serving(folder: Path, fused: bool = False, **values: Any) -> Iterator[str]:
    """A server of that bundle in a thread of its own; its address."""
    address = f"127.0.0.1:{free_port()}"
    settings = ServingSettings.model_validate({"redis_url": "", "gateway_address": address, "drain_s": 1, **values})
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        async with serve_local(str(folder), settings, fused):
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    try:
        with Client(address) as client:
            client.wait_ready(60)
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def senders() -> Iterator[list[Sender]]:
    """All that are made meanwhile."""
    made: list[Sender] = []
    init = Sender.__init__

    def remember(self: Sender, *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sender, "__init__", remember)
        yield made


@pytest.fixture(scope="module")
def address(control_bundle: Path, redis_url: str, s3_variables: dict[str, str], senders: list[Sender]) -> Iterator[str]:
    values: dict[str, Any] = {name.removeprefix("SDXS_").lower(): value for name, value in s3_variables.items()}
    with serving(control_bundle, **values, redis_url=redis_url, job_visibility_s=2) as address:
        yield address


@pytest.fixture(scope="module")
def fused(control_bundle: Path) -> Iterator[str]:
    with serving(control_bundle, fused=True) as address:
        yield address


@pytest.fixture(scope="module")
def inline(control_bundle: Path) -> Iterator[str]:
    with serving(control_bundle, handover_bytes=0) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(control_bundle: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(control_bundle)


@dataclass(frozen=True)
class Ask:
    """What steers an image, as the server and the pipeline take it."""

    controls: tuple[Control, ...] = ()
    init_image: bytes = b""
    strength: float = 1.0
    width: int = 0
    height: int = 0

    def of(self, client: Client, seed: int = 5, **options: Any) -> Any:
        if self.init_image:
            options |= {"init_image": self.init_image, "strength": self.strength}
        size: Any = {"width": self.width, "height": self.height}
        return client.generate(PROMPT, seed=seed, format="raw", controls=self.controls, **size, **options)

    def here(self, pipeline: OneStepPipeline, seed: int = 5) -> np.ndarray:
        size: Any = {"width": self.width, "height": self.height}
        return np.asarray(pipeline(PROMPT, seed, 1, self.controls, self.init_image, self.strength, **size)[0], np.int16)


EDGE, SKETCH, COLOUR = Control(DRAWING, "edge"), Control(SMALL, "sketch"), Control(OTHER, "colour")
ASKS = {
    "nothing": Ask(),
    "edge": Ask((EDGE,)),
    "sketch": Ask((SKETCH,)),
    "colour": Ask((COLOUR,)),
    "preprocessed": Ask((Control(DRAWING, controlnet="lines", preprocessed=True),)),
    "preprocessed, other size": Ask((Control(SMALL, controlnet="paint", preprocessed=True),)),
    "scale": Ask((Control(DRAWING, "edge", scale=0.3),)),
    "guess": Ask((Control(DRAWING, "edge", scale=1.7, guess=True),)),
    "two": Ask((EDGE, Control(OTHER, "colour", scale=0.6))),
    "the same twice": Ask((EDGE, Control(OTHER, "sketch", scale=0.4))),
    "four": Ask((EDGE, COLOUR, SKETCH, Control(OTHER, "edge", guess=True))),
    "image to image": Ask(init_image=DRAWING, strength=0.4),
    "image to image, other size": Ask(init_image=SMALL, strength=0.9),
    "both": Ask((COLOUR, EDGE), DRAWING, 0.6),
    "all the way": Ask((EDGE,), DRAWING, 1.0),
    "wide": Ask(width=48),
    "tall, two": Ask((EDGE, Control(OTHER, "sketch", scale=0.6)), width=24, height=40),
    "tall, both": Ask((COLOUR, EDGE), DRAWING, 0.6, width=24, height=40),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_a_served_image_is_the_in_process_one(client: Client, pipeline: OneStepPipeline, ask: Ask) -> None:
    served, here = ask.of(client), ask.here(pipeline)
    assert served.images[0].data == here.astype(np.uint8).tobytes()
    assert served.receipt.unet_batch == 1
    assert served.receipt.controlnet_batch == bool(ask.controls)
    way = {"image_encoder": bool(ask.init_image), "controlnet": bool(ask.controls), "unet": True, "decoder": True}
    stages = [stage.stage for stage in served.receipt.stages if stage.stage != "text_encoder"]
    assert stages == [stage for stage, passed in way.items() if passed]
    assert (served.receipt.height, served.receipt.width) == here.shape[:2] == (ask.height or 32, ask.width or 32)
    plain = Ask(width=ask.width, height=ask.height).here(pipeline)
    if replace(ask, width=0, height=0) != Ask():
        assert np.abs(here - plain).max() > 8, "it changes nothing"


@pytest.mark.parametrize("name", ["edge", "two", "the same twice", "both", "nothing"])
def test_fused_inline_and_shared_are_the_same_bytes(client: Client, fused: str, inline: str, name: str) -> None:
    expected = ASKS[name].of(client).images[0].data
    for address in (fused, inline):
        with Client(address) as other:
            served = ASKS[name].of(other)
        assert served.images[0].data == expected
        assert served.receipt.controlnet_batch == bool(ASKS[name].controls)


def test_residuals_go_by_shared_memory(client: Client, senders: list[Sender]) -> None:
    [sender] = [sender for sender in senders if sender._lender is not None]
    before = sender.sent["shared"]
    for _ in range(3):
        ASKS["edge"].of(client)
    assert sender.sent == {"shared": before + 3}


def test_images_of_one_request_share_its_controls(client: Client, pipeline: OneStepPipeline) -> None:
    ask = ASKS["two"]
    served = ask.of(client, n=3, deterministic=True)
    assert [image.data for image in served.images] == [
        ask.here(pipeline, seed).astype(np.uint8).tobytes() for seed in (5, 6, 7)
    ]
    assert (served.receipt.unet_batch, served.receipt.controlnet_batch) == (1, 1)


@pytest.mark.parametrize("where", ["address", "fused"])
def test_all_kinds_of_requests_are_batched_together(
    request: pytest.FixtureRequest, pipeline: OneStepPipeline, where: str
) -> None:
    """None, one ControlNet, the other, both, image to image: one forward pass of the U-Net, each within rounding of its own."""
    kinds = [ASKS[name] for name in ("nothing", "edge", "colour", "two", "image to image", "both")]
    asked = [(kinds[i % len(kinds)], i) for i in range(48)]
    with Client(request.getfixturevalue(where)) as client, ThreadPoolExecutor(24) as threads:
        served = list(threads.map(lambda one: one[0].of(client, seed=one[1]), asked))
    assert max(one.receipt.unet_batch for one in served) > 2
    assert max(one.receipt.controlnet_batch for one in served) > 1
    for (ask, seed), one in zip(asked, served, strict=True):
        found = np.asarray(one.images[0].pil(), np.int16)
        assert np.abs(found - ask.here(pipeline, seed)).max() <= 1


@pytest.mark.parametrize("where", ["address", "fused"])
def test_images_of_one_size_are_batched_past_those_of_others(
    request: pytest.FixtureRequest, pipeline: OneStepPipeline, where: str
) -> None:
    """However the sizes come, each waits in its bucket, and every image is its own."""
    kinds = [Ask(), Ask(width=48), Ask((EDGE,), width=24, height=40), Ask((COLOUR,)), Ask((), DRAWING, 0.5, width=48)]
    asked = [(kinds[i % len(kinds)], i) for i in range(60)]
    with Client(request.getfixturevalue(where)) as client, ThreadPoolExecutor(30) as threads:
        served = list(threads.map(lambda one: one[0].of(client, seed=one[1]), asked))
    for size in {(ask.width, ask.height) for ask in kinds}:
        batches = [
            one.receipt.unet_batch for (ask, _), one in zip(asked, served, strict=True) if (ask.width, ask.height) == size
        ]
        assert max(batches) > 2, size
    for (ask, seed), one in zip(asked, served, strict=True):
        found = np.asarray(one.images[0].pil(), np.int16)
        assert np.abs(found - ask.here(pipeline, seed)).max() <= 1


@pytest.mark.parametrize(
    ("size", "field", "allowed"),
    [
        ({"width": 33}, "width", "a multiple of 8 from 16 to 64"),
        ({"height": 8}, "height", "a multiple of 8"),
        ({"width": 72}, "width", "from 16 to 64"),
        ({"width": 64, "height": 64}, "width", "at most 1536 pixels"),
    ],
)
def test_other_sizes_are_refused(client: Client, size: Any, field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest, match=allowed) as caught:
        client.generate(PROMPT, **size)
    assert caught.value.field == field


def test_a_receipt_says_what_steered(client: Client) -> None:
    asked = Ask(
        (Control(DRAWING, "edge", scale=0.5), Control(OTHER, controlnet="paint", guess=True, preprocessed=True)), SMALL, 0.25
    )
    receipt = asked.of(client).receipt
    first, second = receipt.controls
    assert (first.controlnet, first.type, first.scale, first.guess, first.preprocessed) == ("lines", "edge", 0.5, False, False)
    assert (second.controlnet, second.type, second.scale, second.guess, second.preprocessed) == ("paint", "", 1, True, True)
    assert [each.image_sha256 for each in receipt.controls] == [hashlib.sha256(image).hexdigest() for image in (DRAWING, OTHER)]
    assert (receipt.init_image_sha256, receipt.strength) == (hashlib.sha256(SMALL).hexdigest(), 0.25)
    plain = Ask().of(client).receipt
    assert (list(plain.controls), plain.init_image_sha256, plain.strength, plain.controlnet_batch) == ([], "", 0, 0)


def test_the_server_lists_its_controlnets(client: Client) -> None:
    [model] = client.list_models()
    assert {each.name: tuple(each.types) for each in model.controlnets} == {"lines": ("edge", "sketch"), "paint": ("colour",)}


def test_a_job_is_steered_as_a_call_is(client: Client, pipeline: OneStepPipeline) -> None:
    ask = ASKS["both"]
    options: Any = {"controls": ask.controls, "init_image": ask.init_image, "strength": ask.strength}
    job = client.wait_job(client.submit_job(PROMPT, seed=5, format="raw", **options), timeout=30)
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED, job.error
    assert urllib.request.urlopen(job.images[0].url, timeout=10).read() == ask.here(pipeline).astype(np.uint8).tobytes()
    assert [each.controlnet for each in job.receipt.controls] == ["paint", "lines"]


def test_a_job_with_an_image_that_cannot_be_read_is_refused_at_once(address: str) -> None:
    def submit(**fields: Any) -> tuple[grpc.StatusCode, tuple[str, ...]]:
        request = gateway_pb2.GenerateRequest(prompt=PROMPT, **fields)
        found = refusal(address, "SubmitJob", gateway_pb2.SubmitJobRequest(request=request).SerializeToString())
        return found.code, found.fields

    good, bad = control_pb2.Control(image=DRAWING, type="edge"), control_pb2.Control(image=DRAWING[:60], type="edge")
    assert submit(controls=[good, bad]) == (INVALID, ("request.controls[1].image",))
    assert submit(init_image=b"no image") == (INVALID, ("request.init_image",))
    assert submit(controls=[control_pb2.Control(image=DRAWING, type="edgy")]) == (INVALID, ("request.controls[0].type",))


# What strangers send.


def one(**fields: Any) -> bytes:
    return message(controls=[control_pb2.Control(**{"image": DRAWING, "type": "edge", **fields})])


MISUSE: dict[str, tuple[bytes, str]] = {
    "no image": (one(image=b""), "controls[0].image"),
    "not an image": (one(image=b"hello"), "controls[0].image"),
    "another format": (one(image=drawing(file_format="BMP")), "controls[0].image"),
    "truncated": (one(image=DRAWING[: len(DRAWING) // 2]), "controls[0].image"),
    "truncated JPEG": (one(image=drawing((256, 256), "JPEG")[:-500]), "controls[0].image"),
    "header alone": (one(image=DRAWING[:33]), "controls[0].image"),
    "200 megapixels": (one(image=huge_header()), "controls[0].image"),
    "41 megapixels": (one(image=huge_header(41_000, 1000)), "controls[0].image"),
    "animated GIF": (one(image=animation("GIF")), "controls[0].image"),
    "animated WebP": (one(image=animation("WEBP")), "controls[0].image"),
    "APNG": (one(image=animation("PNG")), "controls[0].image"),
    "preprocessed and not an image": (one(image=b"hello", type="", controlnet="paint", preprocessed=True), "controls[0].image"),
    "unknown type": (one(type="edgy"), "controls[0].type"),
    "no type": (one(type=""), "controls[0].type"),
    "a type no ControlNet knows": (one(type="depth"), "controls[0].type"),
    "unknown ControlNet": (one(controlnet="union"), "controls[0].controlnet"),
    "a ControlNet of another type": (one(controlnet="paint"), "controls[0].type"),
    "scale": (one(scale=-1), "controls[0].scale"),
    "init image": (message(init_image=b"hello"), "init_image"),
    "animated init image": (message(init_image=animation("WEBP"), strength=0.5), "init_image"),
    "huge init image": (message(init_image=huge_header(), strength=0.5), "init_image"),
    "strength": (message(init_image=DRAWING, strength=1.5), "strength"),
    "strength alone": (message(strength=0.5), "strength"),
    "too many bytes": (one(image=bytes(33 << 20)), "controls"),
    "malformed": (message() + b"\x4a\x03\x0a\x7f\x00", "controls"),
}


@pytest.mark.parametrize("where", ["address", "fused"])
@pytest.mark.parametrize(("payload", "field"), MISUSE.values(), ids=MISUSE.keys())
def test_misuse_names_its_field_and_the_server_goes_on(
    request: pytest.FixtureRequest, where: str, payload: bytes, field: str
) -> None:
    address = request.getfixturevalue(where)
    found = refusal(address, "Generate", payload)
    assert (found.code, found.fields) == (INVALID, (field,))
    assert "Traceback" not in found.message
    with Client(address) as client:
        ASKS["edge"].of(client)


ODD = {
    "one pixel": drawing((1, 1)),
    "one row": drawing((3000, 1)),
    "large": drawing((900, 1500), "JPEG"),
    "CMYK JPEG": drawing((50, 40), "JPEG", "CMYK"),
    "16 bits": sixteen_bit(),
    "alpha": drawing(mode="RGBA"),
    "grey and alpha": drawing(mode="LA"),
    "palette": drawing(mode="P"),
    "bits": drawing(mode="1"),
    "WebP": drawing((64, 64), "WEBP"),
}


@pytest.mark.parametrize("image", ODD.values(), ids=ODD.keys())
def test_odd_images_steer_as_they_do_in_process(client: Client, pipeline: OneStepPipeline, image: bytes) -> None:
    for ask in (Ask((Control(image, "edge"),)), Ask((Control(image, "colour"),)), Ask(init_image=image, strength=0.5)):
        assert ask.of(client).images[0].data == ask.here(pipeline).astype(np.uint8).tobytes()


def test_a_model_without_controlnets_says_so(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as address:
        for fields in ({}, {"controlnet": "lines"}):
            found = refusal(address, "Generate", one(**fields))
            assert found.code == INVALID
            assert found.fields == ("controls[0].controlnet" if fields else "controls[0].type",)
            assert "this model has none" in found.message
        with Client(address) as client:
            assert not client.list_models()[0].controlnets
            ASKS["image to image"].of(client)


async def test_a_model_whose_decoder_came_alone_makes_images_but_not_from_images(tmp_path: Path) -> None:
    folder = control_folder(tmp_path / "tiny")
    (folder / "bundle.json").unlink()
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v for k, v in weights.items() if not k.startswith("encoder.")}, file)
    settings = ServingSettings(redis_url="", gateway_address=f"127.0.0.1:{free_port()}", drain_s=1)
    async with serve_local(str(folder), settings), AsyncClient(settings.gateway_address) as client:
        made = await client.generate(PROMPT, seed=5, format="raw", controls=[EDGE])
        with pytest.raises(PreconditionFailed, match="no image encoder"):
            await client.generate(PROMPT, init_image=DRAWING, strength=0.5)
    expected = OneStepPipeline.from_bundle(folder)(PROMPT, 5, controls=[EDGE])[0]
    assert made.images[0].data == expected.tobytes()


async def test_a_server_with_controlnets_ends_its_threads(control_bundle: Path) -> None:
    def devices() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("device")}

    before = devices()
    settings = ServingSettings(redis_url="", gateway_address=f"127.0.0.1:{free_port()}", drain_s=1)
    async with serve_local(str(control_bundle), settings), AsyncClient(settings.gateway_address) as client:
        await client.generate(PROMPT, controls=[EDGE], init_image=DRAWING)
        assert len(devices() - before) == 5
    async with asyncio.timeout(5):
        while devices() - before:  # noqa: ASYNC110 - threads know nothing of events
            await asyncio.sleep(0.01)


def test_errors_reach_the_client_as_they_were_raised(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="animation of 2 frames") as caught:
        client.generate(PROMPT, controls=[EDGE, Control(animation("PNG"), "edge")])
    assert caught.value.field == "controls[1].image"


WISHES = st.tuples(
    st.sampled_from(["red apple", "blue star"]),
    st.integers(0, 3),
    st.integers(1, 2),
    st.sampled_from(["none", "edge"]),
    st.booleans(),
    st.sampled_from([0, 48]),
)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.lists(st.tuples(WISHES, st.sampled_from(["a", "b"]), st.sampled_from(["high", "low"])), min_size=2, max_size=8)
)
def test_the_same_request_is_the_same_image_in_any_company(
    address: str, pipeline: OneStepPipeline, calls: list[tuple[tuple[str, int, int, str, bool, int], str, Any]]
) -> None:
    """Random requests at once, of tenants, classes and sizes: within 1/255 of the in-process image in any batch, the same bytes
    where it is alone in one, which it may ask for."""

    async def ask(wish: tuple[str, int, int, str, bool, int], tenant: str, urgency: Any) -> Any:
        prompt, seed, n, steered, deterministic, width = wish
        controls = [Control(DRAWING, "edge")] if steered == "edge" else []
        options: Any = {"controls": controls, "deterministic": deterministic, "width": width, "format": "raw"}
        async with AsyncClient(address, tenant=tenant, urgency=urgency) as client:
            return await client.generate(prompt, seed=seed, n=n, **options)

    async def together() -> list[Any]:
        return await asyncio.gather(*(ask(*call) for call in calls))

    for (wish, _, _), served in zip(calls, asyncio.run(together()), strict=True):
        prompt, seed, _, steered, deterministic, width = wish
        receipt = served.receipt
        alone = max(receipt.unet_batch, receipt.controlnet_batch, receipt.decoder_batch) == 1
        assert alone or not deterministic
        for number, image in enumerate(served.images):
            wanted = reference(pipeline, prompt, seed + number, steered, width)
            found = np.frombuffer(image.data, np.uint8).reshape(wanted.shape).astype(int)
            assert np.abs(found - wanted).max() <= (0 if alone else 1)


@functools.cache
def reference(pipeline: OneStepPipeline, prompt: str, seed: int, steered: str, width: int) -> np.ndarray:
    """The in-process image."""
    controls = [Control(DRAWING, "edge")] if steered == "edge" else []
    return np.asarray(pipeline(prompt, seed, controls=controls, width=width)[0]).astype(int)
