"""ControlNets: sizes by an independent sum, what they hand over, their files, and every weight of a student's by a map written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxs import controlnet
from sdxs.controlnet import StudentControlNetModel, config_for
from sdxs.errors import CorruptArtifact, InvalidRequest
from tests.models import tiny_controlnet, tiny_unet
from trainer.models.controlnets import from_unet, kind_of, shrink_controlnet
from trainer.models.families import FAMILIES
from trainer.models.students import Blocks, shrink, student_config

CROSS = "UNetMidBlock2DCrossAttn"


def conv(inputs: int, outputs: int, side: int) -> int:
    return inputs * outputs * side * side + outputs


def resnet(inputs: int, outputs: int) -> int:
    """Two norms, two convolutions, the time embedding's 1280 numbers, and a shortcut where the width changes."""
    shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * inputs + conv(inputs, outputs, 3) + conv(1280, outputs, 1) + 2 * outputs + conv(outputs, outputs, 3) + shortcut


def transformer(width: int, text: int, depth: int = 1) -> int:
    """A norm, projections in and out, and `depth` layers of self-attention, cross-attention and a feed-forward."""
    attentions = 4 * width * width + width + 2 * width * width + 2 * text * width + width
    feed_forward = conv(width, 8 * width, 1) + conv(4 * width, width, 1)
    return 2 * width + 2 * conv(width, width, 1) + depth * (6 * width + attentions + feed_forward)


CONDITION = sum(conv(*layer, 3) for layer in ((3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320)))
HEAD = conv(4, 320, 3) + conv(320, 1280, 1) + conv(1280, 1280, 1) + CONDITION
DOWN = {width: conv(width, width, 3) for width in (320, 640, 1280)}


def zeros(*widths: int) -> int:
    return sum(conv(width, width, 1) for width in widths)


def student(text: int) -> int:
    """conv_in, three stages of one layer, six zero convolutions."""
    stages = resnet(320, 320) + DOWN[320] + resnet(320, 640) + transformer(640, text) + DOWN[640]
    return HEAD + stages + resnet(640, 1280) + transformer(1280, text) + zeros(320, 320, 320, 640, 640, 1280)


def crossed_mid(text: int) -> int:
    return 2 * resnet(1280, 1280) + transformer(1280, text)


def teacher(text: int) -> int:
    """Four stages of two layers, the last without transformers."""
    stages = resnet(320, 320) * 2 + 2 * transformer(320, text) + DOWN[320]
    stages += resnet(320, 640) + resnet(640, 640) + 2 * transformer(640, text) + DOWN[640]
    stages += resnet(640, 1280) + 3 * resnet(1280, 1280) + 2 * transformer(1280, text) + DOWN[1280]
    return HEAD + stages + crossed_mid(text) + zeros(*[320] * 4, *[640] * 3, *[1280] * 6)


def sdxl(depths: dict[int, tuple[int, int]], mid: int) -> int:
    """Three stages of two layers; pooled text and sizes, 2816 numbers, beside the time embedding."""
    stages = 2 * resnet(320, 320) + DOWN[320] + resnet(320, 640) + resnet(640, 640) + DOWN[640]
    stages += resnet(640, 1280) + resnet(1280, 1280)
    stages += sum(transformer(width, 2048, depth) for width, both in depths.items() for depth in both)
    added = conv(2816, 1280, 1) + conv(1280, 1280, 1)
    return HEAD + added + stages + mid + zeros(*[320] * 4, *[640] * 3, *[1280] * 3)


def count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def meta(config: dict[str, Any]) -> ControlNetModel:
    with torch.device("meta"):
        return StudentControlNetModel(**config_for(UNet2DConditionModel.from_config(config).config, 8))


SIZES = {
    "sd15": (768, 361_279_120, 87_873_680),
    "sd21": (1024, 364_228_240, 88_856_720),
}


@pytest.mark.parametrize("family", SIZES)
def test_the_students_controlnet_is_a_quarter_of_the_teachers(family: str) -> None:
    text, big, tiny = SIZES[family]
    unet = FAMILIES[family].unet
    assert count(meta(unet)) == big == teacher(text)
    made = meta(student_config(unet))
    assert count(made) == tiny == student(text)
    assert made.mid_block is None and not list(made.controlnet_mid_block.parameters())


def test_the_published_kind_spends_more_than_half_on_a_mid_stage() -> None:
    """diffusers' own class, made from the configuration of a student of SD 1.x, which has none."""
    config = config_for(student_config(FAMILIES["sd15"].unet), 8)
    own = {name: value for name, value in config.items() if name not in ("mid_block_type", "time_embedding_dim")}
    with torch.device("meta"):
        made = ControlNetModel(**own)
    assert made.config.mid_block_type == CROSS
    assert count(made) == 186_551_440 == student(768) + crossed_mid(768) + zeros(1280)
    assert count(made.mid_block) == 97_038_080 == crossed_mid(768)
    assert config["mid_block_type"] is None and kind_of(config) is StudentControlNetModel


def test_sdxl_sizes() -> None:
    unet = FAMILIES["sdxl"].unet
    mid = 2 * resnet(1280, 1280) + transformer(1280, 2048, 10) + zeros(1280) - zeros(1280)
    assert count(meta(unet)) == 1_251_014_160 == sdxl({640: (2, 2), 1280: (10, 10)}, mid)
    vega = student_config(unet)
    assert count(meta(vega)) == 292_931_600 == sdxl({640: (1, 1), 1280: (2, 2)}, resnet(1280, 1280))
    assert kind_of(config_for(vega, 8)) is ControlNetModel


# Of one image, (channels, times the latent's side); the mid residual last.
SD = [(320, 1), (320, 1), (320, 2), (640, 2), (640, 4), (1280, 4), (1280, 4)]
XL = [(320, 1), (320, 1), (320, 1), (320, 2), (640, 2), (640, 2), (640, 4), (1280, 4), (1280, 4), (1280, 4)]


@pytest.mark.parametrize(
    ("family", "pixels", "parts", "megabytes"),
    [("sd21", 512, SD, 8.84736), ("sd21", 1024, SD, 35.38944), ("sd15", 512, SD, 8.84736),
     ("sdxl", 512, XL, 13.43488), ("sdxl", 1024, XL, 53.73952)],
)  # fmt: skip
def test_what_is_handed_over(family: str, pixels: int, parts: list[tuple[int, int]], megabytes: float) -> None:
    network, latent = meta(student_config(FAMILIES[family].unet)), pixels // 8
    added = {"text_embeds": torch.zeros(1, 1280, device="meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    with torch.device("meta"):
        down, mid = network(
            torch.zeros(1, 4, latent, latent), torch.tensor([999]), torch.zeros(1, 77, network.config.cross_attention_dim),
            controlnet_cond=torch.zeros(1, 3, pixels, pixels), added_cond_kwargs=added if family == "sdxl" else None, return_dict=False,
        )  # fmt: skip
    shapes = [tuple(part.shape) for part in (*down, mid)]
    assert shapes == [(1, width, latent // step, latent // step) for width, step in parts]
    assert 2 * sum(part.numel() for part in (*down, mid)) == round(megabytes * 1e6)  # in 16 bits


def answer(network: nn.Module, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy_BCHW, text_BLD = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 5, 32, generator=generator)
    map_BCHW = torch.rand(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        down, mid = network(noisy_BCHW, torch.tensor([10, 900]), text_BLD, controlnet_cond=map_BCHW, return_dict=False)
    return [*down, mid]


def same(one: nn.Module, other: nn.Module) -> None:
    """The same weights, bit by bit, and the same answer."""
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    for ours, theirs in zip(answer(one), answer(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_students_controlnet_is_saved_and_loaded_as_diffusers_does(tmp_path: Path) -> None:
    made = StudentControlNetModel.from_pretrained(tiny_controlnet(tiny_unet(), tmp_path, 0))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["_class_name"], config["mid_block_type"], config["block_out_channels"]) == (
        "StudentControlNetModel",
        None,
        [16, 32],
    )
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not [name for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors") if "mid" in name]
    loaded = controlnet.load(tmp_path)
    same(loaded, made)
    assert type(loaded) is StudentControlNetModel and not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert answer(loaded)[0].abs().max() > 0.01 and not answer(loaded)[-1].any()


def test_the_published_kind_is_loaded(tmp_path: Path) -> None:
    made = ControlNetModel.from_pretrained(tiny_controlnet(tiny_unet(), tmp_path, 0, CROSS))
    loaded = controlnet.load(tmp_path)
    assert type(loaded) is ControlNetModel
    same(loaded, made)
    assert answer(loaded)[-1].abs().max() > 0.01


@pytest.mark.parametrize("mid", [None, CROSS])
def test_half_precision_file_names_are_found(tmp_path: Path, mid: str | None) -> None:
    made = controlnet.load(tiny_controlnet(tiny_unet(), tmp_path / "whole", 0, mid))
    made.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = controlnet.load(tmp_path / "half")
    assert loaded.dtype == torch.float32
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, made.state_dict()[name].float())
    assert controlnet.load(tmp_path / "half", torch.float16).dtype == torch.float16


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    weights = tiny_controlnet(tiny_unet(), tmp_path / "edge", 0) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["controlnet_down_blocks.2.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(
        CorruptArtifact, match=r"edge lacks 1 weights of its StudentControlNetModel.*controlnet_down_blocks\.2\.weight"
    ):
        controlnet.load(tmp_path / "edge")


def test_what_is_no_controlnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=r"config\.json is missing"):
        controlnet.load(tmp_path)
    for text, words in (
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"_class_name": "UNet2DConditionModel"}', "is none of"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CorruptArtifact, match=words):
            controlnet.load(tmp_path)
    tiny_controlnet(tiny_unet(), tmp_path, 0)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    for changed in (data[: len(data) // 2], None):
        weights.unlink() if changed is None else weights.write_bytes(changed)
        with pytest.raises(CorruptArtifact, match=r"the weights of .* cannot be read"):
            controlnet.load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    config = tiny_controlnet(tiny_unet(), tmp_path, 0) / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(CorruptArtifact, match=r"the weights of .* cannot be read"):
        controlnet.load(tmp_path)


def wide_time() -> UNet2DConditionModel:
    """Text embedded in time, and a time embedding of a width that ControlNetModel does not know."""
    return UNet2DConditionModel.from_config(
        {**tiny_unet().config, "time_embedding_dim": 48, "addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    )


def with_mid() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config({**tiny_unet().config, "mid_block_type": CROSS})


@pytest.mark.parametrize("build", [tiny_unet, wide_time, with_mid])
def test_a_new_controlnet_is_the_unets_encoder_and_changes_nothing(build: Any, tmp_path: Path) -> None:
    """Zero at first (arXiv:2302.05543); with identities for its zero convolutions, it gives what the U-Net hands to its other half."""
    torch.manual_seed(0)
    unet = build()
    made = from_unet(unet, 8)
    fresh = answer(made)
    assert not any(part.any() for part in fresh)
    made.save_pretrained(tmp_path)
    assert controlnet.load(tmp_path).state_dict().keys() == made.state_dict().keys()
    for zero in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        if isinstance(zero, nn.Conv2d):
            zero.weight.data.copy_(torch.eye(zero.in_channels)[..., None, None])
    skips: list[Tensor] = []
    unet.conv_in.register_forward_hook(lambda _module, _inputs, output: skips.append(output))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: skips.extend(output[1]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        unet(torch.randn(2, 8, 4, 4, generator=generator), torch.tensor([10, 900]), torch.randn(2, 5, 32, generator=generator))
    given = answer(made)
    assert len(given) == len(skips) + 1
    for ours, theirs in zip(given, skips, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert bool(given[-1].any()) == (unet.mid_block is not None)


# A student's module -> the teacher's that it starts from; zero convolutions are counted: input, then a stage's layers and its downsampler.
SAME = ("conv_in", "time_embedding", "controlnet_cond_embedding")
SDXS = {
    **{name: name for name in SAME},
    "down_blocks.0.resnets.0": "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0": "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0": "down_blocks.1.resnets.0", "down_blocks.1.attentions.0": "down_blocks.1.attentions.0",
    "down_blocks.1.downsamplers.0": "down_blocks.1.downsamplers.0",
    "down_blocks.2.resnets.0": "down_blocks.2.resnets.0", "down_blocks.2.attentions.0": "down_blocks.2.attentions.0",
    "controlnet_down_blocks.0": "controlnet_down_blocks.0",
    "controlnet_down_blocks.1": "controlnet_down_blocks.1", "controlnet_down_blocks.2": "controlnet_down_blocks.3",
    "controlnet_down_blocks.3": "controlnet_down_blocks.4", "controlnet_down_blocks.4": "controlnet_down_blocks.6",
    "controlnet_down_blocks.5": "controlnet_down_blocks.7",
}  # fmt: skip
TOP = "down_blocks.0.attentions.0"
TURNED = {  # self-attention that now reads the text starts from the cross-attention; the rest is longer, so it is looked up first
    f"{TOP}.transformer_blocks.0.attn1": f"{TOP}.transformer_blocks.0.attn2",
    f"{TOP}.transformer_blocks.0.norm1": f"{TOP}.transformer_blocks.0.norm2",
    TOP: TOP,
}
STACK = "down_blocks.2.attentions.{}.transformer_blocks.{}"
VEGA = {
    **{STACK.format(i, layer): STACK.format(i, kept) for i in (0, 1) for layer, kept in ((0, 0), (1, 2))},
    **{name: name for name in (*SAME, "add_embedding", "down_blocks", "mid_block.resnets.0")},
    **{name: name for name in ("controlnet_down_blocks", "controlnet_mid_block")},
}  # fmt: skip
SMALL_SD = {**FAMILIES["sd21"].unet, **FAMILIES["sd21"].small_unet}
SMALL_XL = {**FAMILIES["sdxl"].unet, **FAMILIES["sdxl"].small_unet}


def randomised(network: ControlNetModel) -> ControlNetModel:
    generator = torch.Generator().manual_seed(3)
    for weight in network.parameters():
        weight.data.normal_(generator=generator)
    return network


@pytest.mark.parametrize(
    ("unet", "blocks", "origin"),
    [(SMALL_SD, "sdxs", SDXS), (SMALL_SD, "cross-attention", TURNED | SDXS), (SMALL_XL, "vega", VEGA)],
)
def test_every_weight_of_a_students_comes_from_the_block_map(
    unet: dict[str, Any], blocks: Blocks, origin: dict[str, str]
) -> None:
    theirs = UNet2DConditionModel.from_config(unet)
    big = randomised(from_unet(theirs, 8))
    tiny = shrink_controlnet(big, shrink(theirs, blocks))
    weights, covered = big.state_dict(), set()
    for name, value in tiny.state_dict().items():
        module = next(module for module in origin if name.startswith(f"{module}."))
        source = weights[origin[module] + name.removeprefix(module)]
        silent = blocks == "cross-attention" and ".attn1.to_out." in name and name.startswith(TOP)
        torch.testing.assert_close(value, torch.zeros_like(source) if silent else source, rtol=0, atol=0)
        covered.add(module)
    assert covered == set(origin)
    assert (tiny.mid_block is None) == (blocks != "vega")
    before = big.conv_in.weight.detach().clone()
    tiny.conv_in.weight.data.add_(1)
    assert torch.equal(big.conv_in.weight, before)


def test_the_block_map_holds_at_the_real_size() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(FAMILIES["sd21"].unet)
        tiny = shrink_controlnet(from_unet(theirs, 8), shrink(theirs))
        small = UNet2DConditionModel.from_config(SMALL_SD)
        same_names = shrink_controlnet(from_unet(small, 8), shrink(small)).state_dict().keys()
    assert count(tiny) == 88_856_720
    assert tiny.state_dict().keys() == same_names  # so what holds for the small one's names holds here


def test_a_controlnet_of_another_teacher_is_refused() -> None:
    other = UNet2DConditionModel.from_config(
        {**SMALL_SD, "block_out_channels": (4, 8, 16, 16), "attention_head_dim": (1, 2, 4, 4)}
    )
    with pytest.raises(InvalidRequest, match=r"controlnet\.down_blocks\.2\..*as the student's down_blocks\.2"):
        shrink_controlnet(from_unet(UNet2DConditionModel.from_config(SMALL_SD), 8), shrink(other))


@pytest.mark.parametrize(
    ("upsampling", "widths"), [(8, (16, 32, 96, 256)), (4, (16, 32, 96)), (2, (16, 32)), (16, (16, 32, 96, 256, 256))]
)
def test_a_condition_is_brought_down_to_the_latent(upsampling: int, widths: tuple[int, ...]) -> None:
    unet = {**SMALL_SD, "block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32}
    config = config_for(unet, upsampling)
    assert config["conditioning_embedding_out_channels"] == widths
    narrow = config_for(UNet2DConditionModel.from_config(SMALL_SD).config, upsampling)
    assert narrow["conditioning_embedding_out_channels"] == (16,) * len(widths)
    embedding = StudentControlNetModel(**narrow).controlnet_cond_embedding
    assert embedding(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 32 // upsampling, 32 // upsampling)
