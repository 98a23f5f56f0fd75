"""What the ControlNets of a batch add to its images, and the residuals a U-Net's room takes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxs import bundle, control, tensors
from sdxs.control import Control
from sdxs.controlnet import StudentControlNetModel, config_for
from sdxs.errors import InvalidRequest
from sdxs.image_to_image import Init
from sdxs.prompts import Prompts
from sdxs.residuals import Residuals
from sdxs.settings import Settings
from sdxs.sizes import Size
from sdxs.stages import ControlNets
from sdxs.v1 import tensor_pb2, unet_pb2
from services.fabric import denoising
from services.fabric.deadline import Deadline
from services.fabric.denoising import Condition, Facts, Guided, Image
from services.fabric.handover import Lender
from services.settings import ServingSettings
from services.unet.receiving import residual_shapes
from services.unet.service import UNetService, load
from tests.controlnets import drawing

DIGEST = "ours"


@pytest.fixture(scope="module")
def controlnets(control_bundle: Path) -> ControlNets:
    return ControlNets.from_bundle(control_bundle, Settings())


@pytest.fixture(scope="module")
def facts(control_bundle: Path) -> Facts:
    return Facts.of(control_bundle, DIGEST)


@pytest.fixture
def passes(controlnets: ControlNets) -> "Iterator[Counter[tuple[str, int]]]":
    """Forward passes of each ControlNet by batch size."""
    seen: Counter[tuple[str, int]] = Counter()
    hooks = []
    for name, network in controlnets.networks.items():

        def count(_: Any, arguments: tuple[Any, ...], name: str = name) -> None:
            seen[name, len(arguments[0])] += 1

        hooks.append(network.register_forward_pre_hook(count))
    yield seen
    for hook in hooks:
        hook.remove()


def condition(controlnets: ControlNets, kind: str, scale: float = 1.0, guess: bool = False, shift: int = 0) -> Condition:
    asked = Control(drawing(shift=shift), kind, scale=scale, guess=guess)
    return Condition(controlnets.pick(asked, "c"), control.map_of(asked, 32, "c"), controlnets.weights(asked))


def image(seed: int, facts: Facts, *conditions: Condition, init: Init | None = None) -> Image:
    text = np.random.default_rng(100 + seed).standard_normal((1, *facts.text_shape), np.float32)
    return Image(seed, Prompts(text), Size.of(facts.image_size), init, conditions)


def guide(images: Sequence[Image], facts: Facts, controlnets: ControlNets) -> list[Guided]:
    return denoising.guide(images, denoising.noise(images, facts), controlnets)


def directly(one: Image, facts: Facts, controlnets: ControlNets) -> list[np.ndarray]:
    """One image's residuals from diffusers' networks themselves, summed in float64."""
    noise = torch.from_numpy(denoising.noise([one], facts)) * controlnets.constants.input_scale
    total: list[np.ndarray] = []
    for each in one.conditions:
        shown = torch.from_numpy(each.map_HWC.copy()).permute(2, 0, 1)[None].float() / 255
        text = torch.from_numpy(one.prompt.text_BLD)
        with torch.inference_mode():
            down, mid = controlnets.networks[each.name](noise, 999, text, controlnet_cond=shown, return_dict=False)
        parts = [part.double().numpy() * weight for part, weight in zip((*down, mid), each.weights_R, strict=True)]
        total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
    return total


def parts(guided: Guided) -> tuple[np.ndarray, ...]:
    assert guided.residuals is not None
    return guided.residuals.parts


def test_several_controls_are_summed(controlnets: ControlNets, facts: Facts) -> None:
    """Two ControlNets, one of them twice with other images, each with its scale."""
    conditions = [
        condition(controlnets, "edge", 0.5),
        condition(controlnets, "colour", 1.5, guess=True),
        condition(controlnets, "sketch", 0.7, shift=9),
    ]
    one = image(1, facts, *conditions)
    [found] = guide([one], facts, controlnets)
    expected = directly(one, facts, controlnets)
    assert max(np.abs(part).max() for part in expected) > 0.1, "they add nothing"
    for part, sum_ in zip(parts(found), expected, strict=True):
        np.testing.assert_allclose(part, sum_, rtol=1e-4, atol=1e-5)
    assert found.batch == 1


def mixed(controlnets: ControlNets, facts: Facts) -> list[Image]:
    """None, one, the other, both, one of them twice, and image to image."""
    edge, colour = condition(controlnets, "edge"), condition(controlnets, "colour", 0.8)
    sketch = condition(controlnets, "sketch", 1.2, guess=True)
    init = Init(np.random.default_rng(3).standard_normal(facts.latent_shape, np.float32), 0.5)
    return [
        image(1, facts),
        image(2, facts, edge),
        image(3, facts, colour),
        image(4, facts, colour, edge),
        image(5, facts, edge, sketch),
        image(6, facts, edge, init=init),
        image(7, facts),
    ]


def test_a_mixed_batch_adds_to_each_what_it_gets_alone(
    controlnets: ControlNets, facts: Facts, passes: "Counter[tuple[str, int]]"
) -> None:
    images = mixed(controlnets, facts)
    together = guide(images, facts, controlnets)
    assert passes == {("lines", 4): 1, ("paint", 2): 1, ("lines", 1): 1}, "those of one ControlNet go together, once each"
    assert [guided.batch for guided in together] == [0, 4, 2, 4, 4, 4, 0]
    for one, guided in zip(images, together, strict=True):
        [alone] = guide([one], facts, controlnets)
        if not one.conditions:
            assert guided.residuals is None and alone.residuals is None
            continue
        for part, expected in zip(parts(guided), parts(alone), strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-4)


def test_an_image_alone_gets_the_bytes_of_the_pipeline(controlnets: ControlNets, facts: Facts) -> None:
    for one in mixed(controlnets, facts):
        if not one.conditions:
            continue
        [guided] = guide([one], facts, controlnets)
        noise, total = denoising.noise([one], facts), None
        for each in one.conditions:
            added = controlnets.residuals(noise, one.prompt, each.map_HWC[None], each.name, each.weights_R[None], [one.init])
            total = added if total is None else total + added
        assert total is not None
        assert [part.tobytes() for part in parts(guided)] == [part.tobytes() for part in total.parts]


# The U-Net's room.


@pytest.fixture(scope="module")
def room(control_bundle: Path) -> UNetService:
    return load(control_bundle, DIGEST, ServingSettings())


def asked(facts: Facts, added: Residuals | None = None, seeds: Sequence[int] = (1,)) -> unet_pb2.DenoiseRequest:
    request = denoising.warming(facts)
    request.seeds[:] = seeds
    if added is not None:
        request.inline.parts.extend(tensors.encode(part) for part in added.parts)
    return request


def added(controlnets: ControlNets, facts: Facts) -> Residuals:
    [guided] = guide([image(1, facts, condition(controlnets, "edge"))], facts, controlnets)
    return Residuals(parts(guided))


Change = Callable[[list[tensor_pb2.Tensor]], object]


def _change(index: int, edit: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(inline: list[tensor_pb2.Tensor]) -> None:
        inline[index] = tensors.encode(edit(tensors.decode(inline[index], "part").copy()))

    return change


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(part: np.ndarray) -> np.ndarray:
        part[0, 0, 0, 0] = value
        return part

    return edit


WRONG: dict[str, tuple[Change, str]] = {
    "one too few": (lambda inline: inline.pop(), "inline.parts"),
    "one too many": (lambda inline: inline.append(inline[0]), "inline.parts"),
    "none": (lambda inline: inline.clear(), "inline.parts"),
    "order": (lambda inline: inline.reverse(), "inline.parts[0].shape"),
    "channels": (_change(1, lambda part: part[:, :-1]), "inline.parts[1].shape"),
    "height": (_change(4, lambda part: part[:, :, :-1]), "inline.parts[4].shape"),
    "images": (_change(2, lambda part: np.concatenate([part, part])), "inline.parts[2].shape"),
    "no axes": (_change(0, lambda part: part.reshape(-1)), "inline.parts[0].shape"),
    "half precision": (_change(0, lambda part: part.astype(np.float16)), "inline.parts[0].element_type"),
    "not a number": (_change(3, _with(np.nan)), "inline.parts[3].data"),
    "infinite": (_change(0, _with(-np.inf)), "inline.parts[0].data"),
}


@pytest.mark.parametrize(("change", "field"), WRONG.values(), ids=WRONG.keys())
async def test_wrong_residuals_are_named_and_harm_nobody_else(
    room: UNetService, controlnets: ControlNets, facts: Facts, change: Change, field: str
) -> None:
    right = asked(facts, added(controlnets, facts))
    wrong = asked(facts, added(controlnets, facts))
    inline = list(wrong.inline.parts)
    change(inline)
    wrong.inline.CopyFrom(unet_pb2.InlineResiduals(parts=inline))
    calls = [room.denoise(each, Deadline()) for each in (right, wrong, asked(facts), right)]
    first, refused, plain, last = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(refused, InvalidRequest) and refused.field == field
    alone = await room.denoise(right, Deadline())
    for answer in (first, last):
        assert isinstance(answer, unet_pb2.DenoiseResponse)
        np.testing.assert_allclose(latent(answer), latent(alone), atol=1e-5)
    assert isinstance(plain, unet_pb2.DenoiseResponse)
    assert np.abs(latent(plain) - latent(alone)).max() > 1e-3, "the residuals do nothing"


def latent(answer: unet_pb2.DenoiseResponse) -> np.ndarray:
    return tensors.decode(answer.latent, "latent")


async def test_means_are_added_everywhere(room: UNetService, controlnets: ControlNets, facts: Facts) -> None:
    """As ControlNets with global_pool_conditions give them: alone, and in a batch with others that fill their maps."""
    full = added(controlnets, facts)
    means = Residuals(tuple(part.mean(axis=(2, 3), keepdims=True) for part in full.parts))
    spread = Residuals(tuple(np.broadcast_to(mean, part.shape) for mean, part in zip(means.parts, full.parts, strict=True)))
    alone, expected = [await room.denoise(asked(facts, each), Deadline()) for each in (means, spread)]
    assert alone.latent == expected.latent
    calls = [room.denoise(asked(facts, each), Deadline()) for each in (full, means, None, full, means)]
    answers = await asyncio.gather(*calls)
    assert max(answer.batch for answer in answers) > 1
    for i in (1, 4):
        np.testing.assert_allclose(latent(answers[i]), latent(alone), atol=1e-5)


async def test_shared_residuals_are_checked_as_those_in_the_message(
    room: UNetService, controlnets: ControlNets, facts: Facts
) -> None:
    given, lender = added(controlnets, facts), Lender(1 << 20)
    loan = lender.lend([part.shape for part in given.parts])
    assert loan is not None
    loan.write(given)
    request = asked(facts)
    request.shared.CopyFrom(loan.message)
    inline = await room.denoise(asked(facts, given), Deadline())
    assert (await room.denoise(request, Deadline())).latent == inline.latent
    edits: list[tuple[Callable[[unet_pb2.SharedResiduals], object], str]] = [
        (lambda message: message.shapes.pop(), "shared.shapes"),
        (lambda message: message.shapes[2].sizes.pop(), "shared.shapes[2]"),
        (lambda message: message.shapes[1].sizes.__setitem__(0, 2), "shared.shapes[1]"),
        (lambda message: message.ClearField("nonce"), "shared"),
    ]
    for edit, field in edits:
        wrong = asked(facts)
        wrong.shared.CopyFrom(loan.message)
        edit(wrong.shared)
        with pytest.raises(InvalidRequest) as caught:
            await room.denoise(wrong, Deadline())
        assert caught.value.field == field
    given.parts[3][0, 0, 0, 0] = np.nan
    loan.write(given)
    with pytest.raises(InvalidRequest) as caught:
        await room.denoise(request, Deadline())
    assert caught.value.field == "shared.shapes[3]"
    room._receiver._borrower.close()
    lender.close()


async def test_a_unet_without_controlnets_takes_no_controls(room: UNetService, facts: Facts) -> None:
    request = asked(facts)
    request.controls.add(image=drawing(), type="edge")
    with pytest.raises(InvalidRequest, match="hosts no ControlNets"):
        await room.denoise(request, Deadline())


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 8),
        ({}, 7),
        ({"layers_per_block": 3, "block_out_channels": (8, 16)}, 5),
        ({"block_out_channels": (8, 16, 24), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2}, 12),
    ],
)  # fmt: skip
def test_a_unet_adds_residuals_of_the_shapes_its_controlnet_makes(
    control_bundle: Path, change: dict[str, Any], size: int
) -> None:
    config = UNet2DConditionModel.load_config(control_bundle / "unet") | {"norm_num_groups": 8, **change}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        controlnet = StudentControlNetModel(**config_for(unet.config, 8))
        channels = unet.config.in_channels
        down, mid = controlnet(
            torch.zeros(2, channels, size, size), torch.zeros(2), torch.zeros(2, 4, 32),
            controlnet_cond=torch.zeros(2, 3, 8 * size, 8 * size), return_dict=False,
        )  # fmt: skip
    assert residual_shapes(unet, (channels, size, size)) == tuple(tuple(part.shape[1:]) for part in (*down, mid))


def test_full_size_residuals(control_bundle: Path) -> None:
    """Of SDXS-512's U-Net, counted by hand: two of 320 at full size, 320 and 640 at half, 640, 1280 and the mid one at a quarter."""
    config = bundle.read_config(control_bundle, "unet/config.json") | {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280), "norm_num_groups": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 1024,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    sizes = [sum(int(np.prod(shape)) for shape in residual_shapes(unet, (4, side, side))) for side in (64, 128)]
    by_hand = 2 * 320 * 64**2 + (320 + 640) * 32**2 + (640 + 1280 + 1280) * 16**2
    assert sizes == [by_hand, 4 * by_hand]
    assert (round(2 * sizes[0] / 2**20), round(4 * sizes[1] / 2**20)) == (8, 68), "MB: float16 at 512, float32 at 1024"
