"""The shrunk U-Net: configuration, weights and feature pairs of block removal (paper section 3.2, BK-SDM arXiv:2305.15798).

From the teacher are removed: the mid stage, the last down stage, the first up stage, and the transformers of the highest resolution;
of the remaining blocks' `layers_per_block` residual layers one less is kept (never fewer than one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

PER_STAGE = (
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
    "layers_per_block",
    "cross_attention_dim",
    "only_cross_attention",
)


def student_config(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The student's UNet2DConditionModel config. For SD 2.1-base this is SDXS-512: 318.70M parameters.

    Raises:
        ValueError: the teacher has fewer than three stages, so nothing would be left.
    """
    stages = len(teacher["block_out_channels"])
    if stages < 3:
        raise ValueError(f"block_out_channels {teacher['block_out_channels']}: block removal needs at least 3 stages")
    config = {name: value for name, value in teacher.items() if not name.startswith("_")}
    config["block_out_channels"] = tuple(teacher["block_out_channels"][:-1])
    for name in PER_STAGE:
        if isinstance(teacher.get(name), (list, tuple)):
            config[name] = tuple(teacher[name][:-1])
    layers = config["layers_per_block"]
    config["layers_per_block"] = max(1, layers - 1) if isinstance(layers, int) else tuple(max(1, n - 1) for n in layers)
    down = ("DownBlock2D", *teacher["down_block_types"][1:-1])
    config["down_block_types"] = down
    config["up_block_types"] = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    config["mid_block_type"] = None
    return config


def kept_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Which of the teacher's layers an up block keeps: the first ones and the last (its skip connection is the widest block's)."""
    return [*range(student_layers - 1), teacher_layers - 1]


def _source(name: str, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> str:
    """Teacher parameter that initialises the student's parameter `name`."""
    parts = name.split(".")
    if parts[0] != "up_blocks":
        return name
    block = int(parts[1])
    parts[1] = str(block + 1)
    if parts[2] in ("resnets", "attentions"):
        keep = kept_layers(len(teacher.up_blocks[block + 1].resnets), len(student.up_blocks[block].resnets))
        parts[3] = str(keep[int(parts[3])])
    return ".".join(parts)


def shrink(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """A student with every weight copied from the teacher by the block map.

    Raises:
        ValueError: a kept layer has another shape in the teacher (its last two stages differ in width).
    """
    student: UNet2DConditionModel = UNet2DConditionModel.from_config(student_config(teacher.config))
    weights = teacher.state_dict()
    mapped: dict[str, Tensor] = {}
    for name, value in student.state_dict().items():
        source = weights[_source(name, teacher, student)]
        if source.shape != value.shape:
            raise ValueError(
                f"{name}: student {tuple(value.shape)}, teacher {tuple(source.shape)}; block removal needs the last two stages alike"
            )
        mapped[name] = source.clone()
    student.load_state_dict(mapped)
    return student


def feature_names(student: UNet2DConditionModel) -> tuple[list[str], list[str]]:
    """(teacher module names, student module names) of the feature pairs, in order.

    For SD: down0/down0, down1/down1, down2's last attention / down2's last attention, up1/up0, up2/up1, up3/up2.
    """
    last = len(student.down_blocks) - 1
    pairs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(last)]
    student_attention = len(student.down_blocks[last].attentions) - 1
    pairs.append((f"down_blocks.{last}.attentions.-1.proj_out", f"down_blocks.{last}.attentions.{student_attention}.proj_out"))
    pairs += [(f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(len(student.up_blocks))]
    return [t for t, _ in pairs], [s for _, s in pairs]


class FeatureTap:
    """Collects the outputs of named modules during a forward call; "-1" in a name is the last of a module list."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self._outputs: dict[str, Tensor] = {}
        self.names = names
        for name in names:
            self._find(network, name).register_forward_hook(self._hook(name))

    @staticmethod
    def _find(network: nn.Module, name: str) -> nn.Module:
        module: Any = network
        for part in name.split("."):
            module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)
        assert isinstance(module, nn.Module)
        return module

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> list[Tensor]:
        """Outputs of the last forward call, in the order of the names; forgets them."""
        outputs = [self._outputs[name] for name in self.names]
        self._outputs = {}
        return outputs


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a U-Net config, counted on the meta device."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(config))
    return sum(p.numel() for p in unet.parameters())
