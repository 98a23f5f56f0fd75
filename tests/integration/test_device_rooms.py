"""A ControlNet's room and a U-Net's, two processes that hand residuals over on the device: images, deaths, and those who cannot read.

The device is the CPU here, with the host's memory in a GPU's place; the rooms, the sender and the receiver are those of a server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxs import tensors
from sdxs.errors import Unavailable
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.v1 import control_pb2, text_encoder_pb2, unet_pb2
from tests.integration.test_control_server import ASKS, PROMPT, Ask
from tests.rooms import Room, denoise

DIGEST = "ours"
ON_DEVICE = {"SDXS_HANDOVER_DEVICE": "always"}
TYPES = ["float16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "bfloat16"))]
DEVICE, SHARED = "sdxs-device", "sdxs-residuals"


@dataclass
class Pair:
    """Both rooms, and the pipeline that computes as they do."""

    folder: Path
    unet: Room
    controlnet: Room
    pipeline: OneStepPipeline

    def request(self, ask: Ask, seeds: Sequence[int] = (5,)) -> unet_pb2.DenoiseRequest:
        """As the gateway makes it."""
        encoded = self.pipeline.text_encoder.encode([PROMPT])
        text = text_encoder_pb2.EncodeResponse(text=tensors.encode(encoded.text_BLD[0]), model_digest=DIGEST)
        size: Any = {"width": ask.width, "height": ask.height}
        request = unet_pb2.DenoiseRequest(text=text, seeds=seeds, deterministic=True, **size)
        for control in ask.controls:
            found: Any = {name: getattr(control, name) for name in ("image", "type", "controlnet", "guess", "preprocessed")}
            request.controls.append(control_pb2.Control(scale=control.scale, **found))
        init = self.pipeline._init(ask.init_image, ask.strength, self.pipeline.manifest.size(**size))
        if init is not None:
            request.init_latent.CopyFrom(tensors.encode(init.latent_CHW))
            request.strength = init.strength
        return request

    def ask(self, *asks: Ask, seeds: Sequence[int] = (5,)) -> list[list[np.ndarray]]:
        """Images of each, uint8, by way of the ControlNet's room."""
        answers = asyncio.run(denoise("ControlNet", self.controlnet, DIGEST, [self.request(ask, seeds) for ask in asks]))
        found = []
        for answer in answers:
            assert isinstance(answer, unet_pb2.DenoiseResponse), answer
            latents = tensors.decode(answer.latent, "latent").copy()
            found.append([self.pipeline.decoder.decode(one[None])[0] for one in latents])
        return found

    def check(self, *asks: Ask, seeds: Sequence[int] = (5,)) -> None:
        """Each image is the in-process one, byte for byte."""
        for ask, images in zip(asks, self.ask(*asks, seeds=seeds), strict=True):
            for seed, image in zip(seeds, images, strict=True):
                np.testing.assert_array_equal(image, ask.here(self.pipeline, seed))


Start = Callable[..., Pair]


@pytest.fixture(scope="module")
def start(control_bundle: Path) -> Iterator[Start]:
    rooms: list[Room] = []

    def started(dtype: str = "float32", unet: dict[str, str] | None = None, **variables: str) -> Pair:
        common = {**ON_DEVICE, "SDXS_TORCH_DEVICE": "cpu", "SDXS_TORCH_DTYPE": dtype, **variables}
        rooms.append(Room("unet", control_bundle, DIGEST, variables=common | (unet or {})))
        rooms.append(before(rooms[-1], control_bundle, common))
        settings = Settings.model_validate({"torch_device": "cpu", "torch_dtype": dtype})
        return Pair(control_bundle, rooms[-2], rooms[-1], OneStepPipeline.from_bundle(control_bundle, settings))

    yield started
    assert {room.close() for room in reversed(rooms)} <= {0, -9}


def before(unet: Room, folder: Path, variables: dict[str, str]) -> Room:
    """A ControlNet's room in front of that U-Net's."""
    return Room("controlnet", folder, DIGEST, unet.target, str(unet.pid), variables=variables)


@pytest.fixture(scope="module", params=TYPES)
def pair(start: Start, request: pytest.FixtureRequest) -> Pair:
    return start(request.param)


@pytest.mark.parametrize("name", ASKS)
def test_an_image_by_way_of_the_device_is_the_in_process_one(pair: Pair, name: str) -> None:
    pair.check(ASKS[name])
    assert pair.unet.opened(SHARED) == 0, "it went by the host"


def test_residuals_went_by_the_device(pair: Pair) -> None:
    pair.check(ASKS["edge"])
    assert (pair.unet.opened(DEVICE), pair.unet.opened(SHARED)) == (1, 0)


def test_many_requests_at_once_are_each_their_own(pair: Pair) -> None:
    """Loans of several images, and several loans at a time."""
    pair.check(*(ASKS[name] for name in ("edge", "two", "both", "colour", "guess", "edge")), seeds=(5, 6, 7))
    assert (pair.unet.opened(DEVICE), pair.unet.opened(SHARED)) == (1, 0)


def test_a_unet_outlives_the_controlnet_whose_memory_it_reads(start: Start) -> None:
    """Killed while calls are under way: they fail, the U-Net's own do not; the next ControlNet's memory takes the place of the dead's."""
    pair = start()
    pair.check(ASKS["edge"])
    plain = pair.request(Ask())

    async def killed() -> tuple[list[Any], list[Any]]:
        steered = [pair.request(ASKS["two"], range(8)) for _ in range(40)]
        calls = asyncio.create_task(denoise("ControlNet", pair.controlnet, DIGEST, steered))
        beside = asyncio.create_task(denoise("UNet", pair.unet, DIGEST, [plain] * 40))
        await asyncio.sleep(0.3)
        pair.controlnet.kill()
        return await calls, await beside

    steered, beside = asyncio.run(killed())
    broken = [each for each in steered if not isinstance(each, unet_pb2.DenoiseResponse)]
    assert broken and all(isinstance(each, Unavailable) for each in broken)
    assert len({each.latent.data for each in beside}) == 1, "every one of them was answered"
    pair.controlnet = before(pair.unet, pair.folder, ON_DEVICE | {"SDXS_TORCH_DEVICE": "cpu"})
    pair.check(ASKS["edge"], ASKS["both"])
    assert pair.unet.opened(DEVICE) == 1
    pair.controlnet.close()


def test_a_controlnet_goes_on_before_a_unet_that_reads_no_device(start: Start) -> None:
    pair = start(unet={"SDXS_HANDOVER_DEVICE": "never"})
    pair.check(ASKS["edge"])
    pair.check(*(ASKS[name] for name in ("edge", "two", "both")))
    assert (pair.unet.opened(DEVICE), pair.unet.opened(SHARED)) == (0, 1)


def test_a_unet_of_another_type_is_sent_all_the_bits(start: Start) -> None:
    """float16 residuals would be less than a float32 U-Net is due."""
    pair = start("float32", unet={"SDXS_TORCH_DTYPE": "bfloat16"})
    images = pair.ask(ASKS["edge"])
    assert images[0][0].shape == (32, 32, 3)
    assert (pair.unet.opened(DEVICE), pair.unet.opened(SHARED)) == (0, 1)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("room", [64, 0])
def test_a_slab_without_room_is_passed_by(start: Start, room: int) -> None:
    pair = start(SDXS_HANDOVER_BYTES=str(room))
    pair.check(ASKS["edge"], ASKS["two"])
    assert (pair.unet.opened(DEVICE), pair.unet.opened(SHARED)) == (0, 0)


@pytest.mark.slow
def test_a_slab_with_room_for_some_lends_to_those(start: Start) -> None:
    """What does not fit it goes in shared memory or in the message, at the same time."""
    pair = start(SDXS_HANDOVER_BYTES="4096")
    begin = time.monotonic()
    while pair.unet.opened(DEVICE) == 0 or pair.unet.opened(SHARED) == 0:
        pair.check(*[ASKS["edge"], ASKS["two"]] * 4)
        assert time.monotonic() - begin < 60, "one of the ways is never taken"
