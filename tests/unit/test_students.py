"""Block removal: the paper's parameter counts, and every weight of a student by an independently written map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxs.errors import InvalidRequest
from trainer.models.students import FeatureTap, count_parameters, feature_names, kept_layers, shrink, student_config

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD21: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP], "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "norm_num_groups": 32,
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.8.0",
}  # fmt: skip
SD15 = {**SD21, "cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False}
# SDXS-512 as the paper's authors published it, not derived from a teacher.
SDXS512: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280), "layers_per_block": 1, "mid_block_type": None,
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
}  # fmt: skip
SMALL = {
    **SD21, "sample_size": 16, "block_out_channels": (8, 16, 24, 24), "norm_num_groups": 4,
    "cross_attention_dim": 12, "attention_head_dim": (2, 4, 6, 6),
}  # fmt: skip
# Student module -> teacher module that initialises it (BK-SDM's block removal).
ORIGIN = {
    "conv_in": "conv_in", "time_embedding": "time_embedding", "conv_norm_out": "conv_norm_out", "conv_out": "conv_out",
    "down_blocks.0.resnets.0": "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0": "down_blocks.0.downsamplers.0",
    "down_blocks.1.resnets.0": "down_blocks.1.resnets.0", "down_blocks.1.attentions.0": "down_blocks.1.attentions.0",
    "down_blocks.1.downsamplers.0": "down_blocks.1.downsamplers.0",
    "down_blocks.2.resnets.0": "down_blocks.2.resnets.0", "down_blocks.2.attentions.0": "down_blocks.2.attentions.0",
    "up_blocks.0.resnets.0": "up_blocks.1.resnets.0", "up_blocks.0.resnets.1": "up_blocks.1.resnets.2",
    "up_blocks.0.attentions.0": "up_blocks.1.attentions.0", "up_blocks.0.attentions.1": "up_blocks.1.attentions.2",
    "up_blocks.0.upsamplers.0": "up_blocks.1.upsamplers.0",
    "up_blocks.1.resnets.0": "up_blocks.2.resnets.0", "up_blocks.1.resnets.1": "up_blocks.2.resnets.2",
    "up_blocks.1.attentions.0": "up_blocks.2.attentions.0", "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
    "up_blocks.1.upsamplers.0": "up_blocks.2.upsamplers.0",
    "up_blocks.2.resnets.0": "up_blocks.3.resnets.0", "up_blocks.2.resnets.1": "up_blocks.3.resnets.2",
}  # fmt: skip


def build(config: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(config).eval()


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in UNet2DConditionModel.from_config(config).state_dict().items()}


def test_sd21_shrinks_to_sdxs512() -> None:
    assert count_parameters(SD21) == 865_910_724
    assert count_parameters(student_config(SD21)) == 318_695_364
    assert shapes(student_config(SD21)) == shapes(SDXS512)


def test_sd15_shrinks_to_the_dreamshaper_variant() -> None:
    assert count_parameters(SD15) == 859_520_964
    assert count_parameters(student_config(SD15)) == 315_746_244


def test_every_weight_comes_from_the_block_map() -> None:
    teacher = build(SMALL)
    student, weights, covered = shrink(teacher), teacher.state_dict(), set()
    for name, value in student.state_dict().items():
        [module] = [module for module in ORIGIN if name.startswith(f"{module}.")]
        torch.testing.assert_close(value, weights[ORIGIN[module] + name.removeprefix(module)], rtol=0, atol=0)
        covered.add(module)
    assert covered == set(ORIGIN)


def test_students_weights_are_its_own() -> None:
    teacher = build(SMALL)
    before = teacher.conv_in.weight.detach().clone()
    with torch.no_grad():
        shrink(teacher).conv_in.weight.add_(1)
    assert torch.equal(teacher.conv_in.weight, before)


def test_one_layer_teacher_keeps_its_layers() -> None:
    teacher = build({**SMALL, "layers_per_block": 1})
    student, weights = shrink(teacher), teacher.state_dict()
    for i in range(2):
        assert torch.equal(student.up_blocks[0].resnets[i].conv1.weight, weights[f"up_blocks.1.resnets.{i}.conv1.weight"])
    assert kept_layers(3, 2) == [0, 2]
    assert kept_layers(2, 2) == [0, 1]


def test_the_block_map_holds_at_the_real_size() -> None:
    """SD 2.1 on the meta device: `shrink` refuses a kept layer of another shape, and so does the map written here."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel.from_config(SD21)
        student = shrink(teacher)
        small = UNet2DConditionModel.from_config(SMALL)
    assert sum(p.numel() for p in student.parameters()) == 318_695_364
    assert teacher.state_dict().keys() == small.state_dict().keys()  # so what holds for the small one's names holds here
    theirs = {name: value.shape for name, value in teacher.state_dict().items()}
    for name, value in student.state_dict().items():
        [module] = [module for module in ORIGIN if name.startswith(f"{module}.")]
        assert value.shape == theirs[ORIGIN[module] + name.removeprefix(module)]


def forward(network: UNet2DConditionModel, names: list[str]) -> list[Tensor]:
    tap = FeatureTap(network, names)
    generator = torch.Generator().manual_seed(1)
    x_BCHW, text_BLD = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        network(x_BCHW, torch.tensor([10, 900]), text_BLD)
    return tap.take()


def test_feature_pairs_have_equal_shapes() -> None:
    teacher = build(SMALL)
    student = shrink(teacher)
    teacher_names, student_names = feature_names(student)
    assert student_names == [
        "down_blocks.0", "down_blocks.1", "down_blocks.2.attentions.0.proj_out", "up_blocks.0", "up_blocks.1", "up_blocks.2",
    ]  # fmt: skip
    assert teacher_names == [
        "down_blocks.0", "down_blocks.1", "down_blocks.2.attentions.-1.proj_out", "up_blocks.1", "up_blocks.2", "up_blocks.3",
    ]  # fmt: skip
    theirs, ours = forward(teacher, teacher_names), forward(student, student_names)
    assert [f.shape for f in theirs] == [f.shape for f in ours]
    by_hand = forward(teacher, ["down_blocks.2.attentions.1.proj_out", "down_blocks.0.downsamplers.0"])
    assert torch.equal(theirs[2], by_hand[0])  # -1 is the last of the teacher's two
    assert torch.equal(theirs[0], by_hand[1])  # a block's feature is what it hands on


def test_tap_forgets_what_was_taken() -> None:
    student = shrink(build(SMALL))
    tap = FeatureTap(student, ["conv_in"])
    with torch.no_grad():
        student(torch.zeros(1, 4, 16, 16), 0, torch.zeros(1, 5, 12))
    [feature] = tap.take()
    assert feature.shape == (1, 8, 16, 16)
    with pytest.raises(KeyError, match="conv_in"):
        tap.take()


def test_two_stages_are_too_few() -> None:
    two = {**SMALL, "block_out_channels": (8, 16), "down_block_types": SMALL["down_block_types"][2:], "attention_head_dim": 2}
    with pytest.raises(InvalidRequest, match="at least 3 stages"):
        student_config(two)


def test_last_two_stages_must_be_alike() -> None:
    teacher = build({**SMALL, "block_out_channels": (8, 16, 24, 32), "attention_head_dim": (2, 4, 6, 8)})
    with pytest.raises(InvalidRequest, match=r"block_out_channels.*last two stages alike"):
        shrink(teacher)


def test_settings_given_per_stage_lose_the_last_stage() -> None:
    config = student_config({**SMALL, "layers_per_block": (2, 3, 2, 2), "only_cross_attention": (True, False, True, False)})
    assert config["layers_per_block"] == (1, 2, 1)
    assert config["attention_head_dim"] == (2, 4, 6)
    assert config["only_cross_attention"] == (True, False, True)
    UNet2DConditionModel.from_config(config)
