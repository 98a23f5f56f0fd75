"""Block removal on Stable Diffusion's real configurations (meta device) and, with weights, on a small teacher of the same shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from trainer.students import FeatureTap, count_parameters, feature_names, shrink, student_config

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD21: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN), "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}  # fmt: skip
SD15 = {**SD21, "cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False}
SMALL = {
    **SD21, "sample_size": 8, "block_out_channels": (8, 16, 32, 32), "cross_attention_dim": 16, "attention_head_dim": 2,
    "norm_num_groups": 4,
}  # fmt: skip


def test_parameter_counts_of_the_paper() -> None:
    assert count_parameters(SD21) == 865_910_724
    assert count_parameters(student_config(SD21)) == 318_695_364  # the paper's 319M
    assert count_parameters(student_config(SD15)) == 315_746_244  # the released "DreamShaper" student


# Student layer -> teacher layer, written out by hand from the paper's block map.
EXPECTED = {
    "conv_in": "conv_in", "time_embedding.linear_1": "time_embedding.linear_1", "conv_out": "conv_out",
    "down_blocks.0.resnets.0.conv1": "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv": "down_blocks.0.downsamplers.0.conv",
    "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.0.proj_out",
    "up_blocks.0.resnets.0.conv1": "up_blocks.1.resnets.0.conv1", "up_blocks.0.resnets.1.conv1": "up_blocks.1.resnets.2.conv1",
    "up_blocks.0.attentions.1.proj_in": "up_blocks.1.attentions.2.proj_in",
    "up_blocks.1.upsamplers.0.conv": "up_blocks.2.upsamplers.0.conv",
    "up_blocks.2.resnets.1.conv2": "up_blocks.3.resnets.2.conv2",
}  # fmt: skip


def test_weights_come_from_the_layers_of_the_block_map() -> None:
    torch.manual_seed(0)
    teacher = UNet2DConditionModel(**SMALL)
    student = shrink(teacher)
    for mine, theirs in EXPECTED.items():
        torch.testing.assert_close(student.get_submodule(mine).weight, teacher.get_submodule(theirs).weight, rtol=0, atol=0)
    assert not hasattr(student.down_blocks[0], "attentions")
    assert student.mid_block is None


def test_paired_features_have_equal_shapes() -> None:
    teacher = UNet2DConditionModel(**SMALL)
    student = shrink(teacher)
    teacher_names, student_names = feature_names(student)
    taps = FeatureTap(teacher, teacher_names), FeatureTap(student, student_names)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 16)
    with torch.no_grad():
        teacher(*inputs)
        student(*inputs)
    shapes = [[feature.shape for feature in tap.take()] for tap in taps]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 6


def test_teachers_that_cannot_be_shrunk_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 stages"):
        student_config({**SMALL, "block_out_channels": (8, 16)})
    with pytest.raises(ValueError, match="last two stages alike"):
        shrink(UNet2DConditionModel(**{**SMALL, "block_out_channels": (8, 16, 16, 32)}))
