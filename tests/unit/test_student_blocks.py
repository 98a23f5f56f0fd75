"""Students of all teacher families: exact parameter counts, every weight by an independently written table, features that pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from sdxs.errors import InvalidRequest
from tests.unit.test_students import ORIGIN, build, shapes
from trainer.models.families import FAMILIES
from trainer.models.students import (
    FeatureTap,
    count_parameters,
    decoder_config,
    default_blocks,
    feature_names,
    kept_stack,
    shrink,
    student_config,
)

SD15, SD21, SDXL = (FAMILIES[name].unet for name in ("sd15", "sd21", "sdxl"))
SMALL = {name: {**family.unet, **family.small_unet} for name, family in FAMILIES.items()}
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# As their authors published them, not derived from a teacher.
SDXS09: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280), "layers_per_block": 1, "mid_block_type": None,
    "down_block_types": (CROSS_DOWN,) * 3, "up_block_types": (CROSS_UP,) * 3, "only_cross_attention": (True, False, False),
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
}  # fmt: skip
VEGA: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D",
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "transformer_layers_per_block": [0, [1, 1], [2, 2]], "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "blocks", "teacher_count", "student_count"),
    [
        (SD21, None, 865_910_724, 318_695_364),
        (SD15, None, 859_520_964, 315_746_244),
        (SD21, "cross-attention", 865_910_724, 328_177_284),
        (SD15, "cross-attention", 859_520_964, 324_245_124),
        (SDXL, None, 2_567_463_684, 745_225_604),
    ],
)
def test_parameter_counts(teacher: dict[str, Any], blocks: Any, teacher_count: int, student_count: int) -> None:
    assert count_parameters(teacher) == teacher_count
    assert count_parameters(student_config(teacher, blocks)) == student_count


def test_students_are_the_published_networks() -> None:
    assert shapes(student_config(SD21, "cross-attention")) == shapes(SDXS09)
    assert shapes(student_config(SDXL)) == shapes(VEGA)
    assert student_config(SD21, "cross-attention")["only_cross_attention"] == (True, False, False)
    assert student_config(SDXL)["transformer_layers_per_block"] == (0, (1, 1), (2, 2))
    assert student_config(SDXL)["reverse_transformer_layers_per_block"] == ((2, 2, 2), (1, 1, 1), 1)
    assert [default_blocks(config) for config in (SD15, SD21, SDXL)] == ["sdxs", "sdxs", "vega"]


def test_the_shrunk_networks_have_the_real_sizes() -> None:
    """On the meta device: `shrink` itself refuses a source of another shape."""
    with torch.device("meta"):
        for config, blocks, count in ((SD21, "cross-attention", 328_177_284), (SDXL, "vega", 745_225_604)):
            student = shrink(UNet2DConditionModel.from_config(config), blocks)  # type: ignore[arg-type]
            assert sum(p.numel() for p in student.parameters()) == count


def origin(name: str, table: dict[str, str]) -> str:
    """The teacher's name of a parameter, by the longest entry of the table that begins it; "" where the entry is "" (zero)."""
    module = max((module for module in table if name.startswith(f"{module}.")), key=len)
    return table[module] + name.removeprefix(module) if table[module] else ""


def check_weights(teacher: UNet2DConditionModel, student: UNet2DConditionModel, table: dict[str, str]) -> None:
    weights, used = teacher.state_dict(), set()
    for name, value in student.state_dict().items():
        source = origin(name, table)
        expected = weights[source] if source else torch.zeros_like(value)
        assert torch.equal(value, expected), name
        used.add(max((module for module in table if name.startswith(f"{module}.")), key=len))
    assert used == set(table)  # no entry is idle


ENDS = ("conv_in", "time_embedding", "conv_norm_out", "conv_out")
VEGA_ORIGIN = (
    {name: name for name in (*ENDS, "add_embedding", "mid_block.resnets.0")}
    | {name: name for i in range(3) for name in (f"down_blocks.{i}.resnets.0", f"down_blocks.{i}.resnets.1")}
    | {f"down_blocks.{i}.downsamplers.0": f"down_blocks.{i}.downsamplers.0" for i in (0, 1)}
    | {f"up_blocks.{i}.resnets.{j}": f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(3)}
    | {f"up_blocks.{i}.upsamplers.0": f"up_blocks.{i}.upsamplers.0" for i in (0, 1)}
    | {
        f"{stack}.{part}": f"{stack}.{part}"
        for stack in (*(f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in range(2)),
                      *(f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in range(3)))
        for part in ("norm", "proj_in", "proj_out", "transformer_blocks.0")
    }
    | {  # of ten the first and the last
        f"{stack}.transformer_blocks.1": f"{stack}.transformer_blocks.9"
        for stack in ("down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "up_blocks.0.attentions.0",
                      "up_blocks.0.attentions.1", "up_blocks.0.attentions.2")
    }
)  # fmt: skip


def test_every_weight_of_vega_comes_from_the_block_map() -> None:
    teacher = build({**SMALL["sdxl"], "transformer_layers_per_block": (1, 2, 10)})
    check_weights(teacher, shrink(teacher), VEGA_ORIGIN)


TOP = {
    "down_blocks.0.attentions.0": "down_blocks.0.attentions.0",
    "up_blocks.2.attentions.0": "up_blocks.3.attentions.0",
    "up_blocks.2.attentions.1": "up_blocks.3.attentions.2",
}
TURNED = {
    "attn1.to_q": "attn2.to_q",
    "attn1.to_k": "attn2.to_k",
    "attn1.to_v": "attn2.to_v",
    "norm1": "norm2",
    "attn1.to_out": "",
}
CROSS_ORIGIN = ORIGIN | TOP | {
    f"{ours}.transformer_blocks.0.{part}": f"{theirs}.transformer_blocks.0.{source}" if source else ""
    for ours, theirs in TOP.items()
    for part, source in TURNED.items()
}  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_every_weight_with_cross_attention_comes_from_the_block_map(name: str) -> None:
    teacher = build(SMALL[name])
    check_weights(teacher, shrink(teacher, "cross-attention"), CROSS_ORIGIN)


def test_self_attention_turned_to_the_text_begins_silent() -> None:
    """The student's top-level layer is the teacher's without its self-attention, until it learns."""
    teacher = build(SMALL["sd21"])
    layer = shrink(teacher, "cross-attention").down_blocks[0].attentions[0].transformer_blocks[0]
    theirs = teacher.down_blocks[0].attentions[0].transformer_blocks[0]
    pixels_BND, text_BLD = torch.randn(2, 9, 4), torch.randn(2, 5, 16)
    with torch.no_grad():
        for parameter in theirs.attn1.to_out.parameters():
            parameter.zero_()
        torch.testing.assert_close(
            layer(pixels_BND, encoder_hidden_states=text_BLD), theirs(pixels_BND, encoder_hidden_states=text_BLD)
        )
    layer(pixels_BND, encoder_hidden_states=text_BLD).square().sum().backward()
    assert layer.attn1.to_out[0].weight.grad.abs().max() > 0  # and it does learn


def features(network: UNet2DConditionModel, names: list[str], config: dict[str, Any]) -> list[Tensor]:
    tap, generator = FeatureTap(network, names), torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    text_BLD = torch.randn(2, 5, config["cross_attention_dim"], generator=generator)
    added = {"text_embeds": torch.randn(2, 20, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        network(x_BCHW, torch.tensor([10, 900]), text_BLD, added_cond_kwargs=added if "addition_embed_type" in config else None)
    return tap.take()


@pytest.mark.parametrize(
    ("name", "blocks", "pairs"),
    [(name, blocks, 6) for name in ("sd15", "sd21") for blocks in ("sdxs", "cross-attention")] + [("sdxl", "vega", 7)],
)
def test_features_pair_with_equal_shapes(name: str, blocks: Any, pairs: int) -> None:
    teacher = build(SMALL[name])
    student = shrink(teacher, blocks)
    teacher_names, student_names = feature_names(student)
    theirs, ours = features(teacher, teacher_names, SMALL[name]), features(student, student_names, SMALL[name])
    assert [f.shape for f in theirs] == [f.shape for f in ours]
    assert len(ours) == pairs


def test_vegas_features_are_every_block() -> None:
    names = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"]
    assert feature_names(shrink(build(SMALL["sdxl"]))) == (names, names)


def test_a_half_precision_teacher_has_a_float32_student() -> None:
    teacher = build(SMALL["sdxl"]).to(torch.bfloat16)
    student = shrink(teacher)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight.float())


@pytest.mark.parametrize(
    ("teacher", "blocks", "field"),
    [
        (SDXL, "sdxs", "block_out_channels"),
        (SDXL, "cross-attention", "block_out_channels"),
        (SD21, "vega", "transformer_layers_per_block"),
        ({**SDXL, "mid_block_type": None}, "vega", "mid_block_type"),
        ({**SD21, "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN, "DownBlock2D")}, "cross-attention", "down_block_types"),
        ({**SD21, "block_out_channels": (320, 1280)}, "sdxs", "block_out_channels"),
    ],
)  # fmt: skip
def test_impossible_teachers_are_named(teacher: dict[str, Any], blocks: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        student_config(teacher, blocks)
    assert caught.value.field == f"teacher.unet.{field}"


def test_stacks_keep_the_first_and_the_last() -> None:
    assert [kept_stack(*depths) for depths in ((1, 1), (2, 1), (10, 2), (2, 2), (4, 2))] == [[0], [0], [0, 9], [0, 1], [0, 3]]


@pytest.mark.parametrize(("channels", "count"), [(4, 1_222_531), (16, 1_229_443)])
def test_the_tiny_decoder(channels: int, count: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderTiny.from_config(decoder_config(channels))
    assert sum(p.numel() for p in vae.decoder.parameters()) == count
    assert count == 1_222_531 + (channels - 4) * 9 * 64  # the first convolution reads the other channels too
    small = {"encoder_block_out_channels": (4,) * 3, "decoder_block_out_channels": (4,) * 3}
    four = AutoencoderTiny.from_config(decoder_config(channels, upsampling=4) | small)
    assert four.decode(torch.zeros(1, channels, 8, 8)).sample.shape == (1, 3, 32, 32)
    with pytest.raises(InvalidRequest, match="power of two"):
        decoder_config(channels, upsampling=6)
