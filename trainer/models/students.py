"""Students by block removal: configuration, weights and feature pairs (paper section 3.2; BK-SDM, arXiv:2305.15798; Segmind Vega,
arXiv:2401.02677). Every student is a plain UNet2DConditionModel, built from its teacher's own configuration.

`sdxs`: without the mid stage, the last down stage, the first up stage and the transformers of the highest resolution; of the remaining
blocks' `layers_per_block` residual layers one less is kept (never fewer than one). `cross-attention`: the same, but the highest
resolution keeps its transformers, whose self-attention looks at the text instead: a matrix of pixels by tokens, not by pixels.
`vega`: all stages of SDXL, their stacks of transformer layers cut short, the mid stage one residual block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxs.errors import InvalidRequest

Blocks = Literal["sdxs", "cross-attention", "vega"]
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
PER_STAGE = (
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
    "layers_per_block",
    "cross_attention_dim",
    "only_cross_attention",
)


def default_blocks(teacher: Mapping[str, Any]) -> Blocks:
    """`vega` for a teacher with SDXL's added conditioning, `sdxs` for any other."""
    return "vega" if teacher.get("addition_embed_type") == "text_time" else "sdxs"


def student_config(teacher: Mapping[str, Any], blocks: Blocks | None = None) -> dict[str, Any]:
    """The student's UNet2DConditionModel config; `blocks` by default the teacher's family's.

    Parameters: SD 2.1-base 318.70M (SDXS-512) or, with `cross-attention`, 328.18M ("0.9"); SD 1.x 315.75M; SDXL 745.23M (SDXS-1024).

    Raises:
        InvalidRequest: this teacher cannot be cut so; names the field of its configuration that stands in the way.
    """
    blocks = blocks or default_blocks(teacher)
    config = {name: value for name, value in teacher.items() if not name.startswith("_")}
    return config | (_vega(teacher) if blocks == "vega" else _removed(teacher, top_attention=blocks == "cross-attention"))


def _removed(teacher: Mapping[str, Any], *, top_attention: bool) -> dict[str, Any]:
    """What changes without the mid stage and the deepest one."""
    _check_removable(teacher, top_attention)
    changed = {name: tuple(teacher[name][:-1]) for name in PER_STAGE if isinstance(teacher.get(name), (list, tuple))}
    layers = changed.get("layers_per_block", teacher.get("layers_per_block", 2))
    down = (CROSS_DOWN if top_attention else DOWN, *teacher["down_block_types"][1:-1])
    if top_attention:
        changed["only_cross_attention"] = (True, *_per_stage(teacher.get("only_cross_attention", False), len(down))[1:])
    return changed | {
        "block_out_channels": tuple(teacher["block_out_channels"][:-1]),
        "layers_per_block": max(1, layers - 1) if isinstance(layers, int) else tuple(max(1, n - 1) for n in layers),
        "down_block_types": down,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        "mid_block_type": None,
    }


def _check_removable(teacher: Mapping[str, Any], top_attention: bool) -> None:
    """Raises InvalidRequest where removing the deepest stage leaves nothing, or what does not fit together."""
    widths = list(teacher["block_out_channels"])
    if len(widths) < 3:
        raise InvalidRequest("teacher.unet.block_out_channels", widths, "at least 3 stages, or block removal leaves nothing")
    if widths[-1] != widths[-2]:
        allowed = (
            "the last two stages alike: else the student's up_blocks.0.resnets.0 would not fit; an SDXL teacher takes vega"
        )
        raise InvalidRequest("teacher.unet.block_out_channels", widths, allowed)
    if top_attention and teacher["down_block_types"][0] != CROSS_DOWN:
        allowed = f"{CROSS_DOWN} first, whose transformers the student's cross-attention starts from"
        raise InvalidRequest("teacher.unet.down_block_types", list(teacher["down_block_types"]), allowed)


def _per_stage(value: Any, stages: int) -> tuple[Any, ...]:
    """A setting of every stage, which diffusers lets one write once for all."""
    return tuple(value)[:stages] if isinstance(value, (list, tuple)) else (value,) * stages


def _vega(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What changes when SDXL's stacks are cut: its (1, 2, 10) layers become (0, (1, 1), (2, 2)), reversed ((2, 2, 2), (1, 1, 1), 1)."""
    depths, down = teacher.get("transformer_layers_per_block"), teacher["down_block_types"]
    if not isinstance(depths, (list, tuple)) or not isinstance(teacher.get("layers_per_block", 2), int):
        raise InvalidRequest("teacher.unet.transformer_layers_per_block", depths, "SDXL's list of one depth per stage")
    if teacher.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
        raise InvalidRequest("teacher.unet.mid_block_type", None, "a mid stage, whose first residual block the student keeps")
    layers, reverse = teacher.get("layers_per_block", 2), teacher.get("reverse_transformer_layers_per_block") or depths[::-1]
    cross = [kind == CROSS_DOWN for kind in down]
    # UpBlock2D has no transformers; what Vega's own file says of it is kept.
    return {
        "transformer_layers_per_block": tuple(_cut(n, layers) if c else 0 for n, c in zip(depths, cross, strict=True)),
        "reverse_transformer_layers_per_block": tuple(
            _cut(n, layers + 1) if c else 1 for n, c in zip(reverse, reversed(cross), strict=True)
        ),
        "mid_block_type": "UNetMidBlock2D",
    }


def _cut(depths: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Depth of each of a stage's stacks: half, rounded up, and at most two (SDXL's 2 and 10 become Vega's 1 and 2)."""
    return tuple(min(2, (depth + 1) // 2) for depth in _per_stage(depths, layers))


def decoder_config(latent_channels: int = 4, upsampling: int = 8) -> dict[str, Any]:
    """AutoencoderTiny config of a decoder that makes `upsampling` pixels of a latent element's side: three residual blocks at each
    resolution, one at the last. 4 channels and 8: diffusers' default, a decoder of 1,222,531 parameters; 16 channels: 1,229,443.

    Raises:
        InvalidRequest: `upsampling` is no power of two from 2.
    """
    levels = upsampling.bit_length()
    if upsampling < 2 or upsampling != 1 << (levels - 1):
        raise InvalidRequest("upsampling", upsampling, "a power of two from 2")
    more = (3,) * (levels - 1)
    return {
        "latent_channels": latent_channels,
        "encoder_block_out_channels": (64,) * levels,
        "decoder_block_out_channels": (64,) * levels,
        "num_encoder_blocks": (1, *more),
        "num_decoder_blocks": (*more, 1),
    }


def kept_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Which of the teacher's layers an up block keeps: the first ones and the last (its skip connection is the widest block's)."""
    return [*range(student_layers - 1), teacher_layers - 1]


def kept_stack(teacher_depth: int, student_depth: int) -> list[int]:
    """Which of a stack's transformer layers stay: the first, which alone reads what proj_in writes, and for more than one the last,
    which alone writes what proj_out reads. Vega's authors do not say theirs."""
    return [0] if student_depth == 1 else kept_layers(teacher_depth, student_depth)


def _source(name: str, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> str:
    """Teacher parameter that initialises the student's parameter `name`."""
    parts = name.split(".")
    if parts[0] == "up_blocks":
        block = int(parts[1])
        theirs = block + len(teacher.up_blocks) - len(student.up_blocks)
        parts[1] = str(theirs)
        if parts[2] in ("resnets", "attentions"):
            keep = kept_layers(len(teacher.up_blocks[theirs].resnets), len(student.up_blocks[block].resnets))
            parts[3] = str(keep[int(parts[3])])
    return ".".join(layer_source(name.split("."), parts, teacher, student))


def layer_source(ours: list[str], parts: list[str], teacher: nn.Module, student: nn.Module) -> list[str]:
    """The same within a stack of transformer layers: which layer, and for self-attention turned to the text, which attention.

    That takes the layer's cross-attention and its norm whole: self-attention's keys and values read pixels and have other shapes,
    and its queries are made for such keys, not for those of the text.
    """
    if "transformer_blocks" not in parts:
        return parts
    at = parts.index("transformer_blocks") + 1
    stacks: list[Any] = [module.get_submodule(".".join(path[:at])) for module, path in ((teacher, parts), (student, ours))]
    index = int(parts[at])
    kept = kept_stack(len(stacks[0]), len(stacks[1]))[index]
    turned = stacks[1][index].only_cross_attention and not stacks[0][kept].only_cross_attention
    renamed = {"attn1": "attn2", "norm1": "norm2"} if turned else {}
    return [*parts[:at], str(kept), *(renamed.get(part, part) for part in parts[at + 1 :])]


def shrink(teacher: UNet2DConditionModel, blocks: Blocks | None = None) -> UNet2DConditionModel:
    """A float32 student with every weight copied from the teacher by the block map.

    Only self-attention that is turned to the text (`cross-attention`) has no weights to copy: it asks as the layer's own
    cross-attention does and begins silent, its output projection zero. With that copied too, the text would count twice; on the emoji
    teacher that was 4 to 8% worse after 90 steps, in outputs and in features, with two seeds.

    Raises:
        InvalidRequest: this teacher cannot be cut so; see `student_config`.
    """
    with torch.device("meta"):  # no memory and no time for random weights that the teacher's replace
        student: UNet2DConditionModel = UNet2DConditionModel.from_config(student_config(teacher.config, blocks))
    weights = teacher.state_dict()
    mapped: dict[str, Tensor] = {}
    for name, value in student.state_dict().items():
        origin = _source(name, teacher, student)
        source = weights[origin]
        if source.shape != value.shape:
            raise InvalidRequest(f"teacher.unet.{name}", tuple(source.shape), f"{tuple(value.shape)}, as the student needs it")
        mapped[name] = source.to(torch.float32, copy=True)
        if ".attn1.to_out." in name and ".attn2." in origin:
            mapped[name].zero_()
    student.load_state_dict(mapped, assign=True)
    return student


def feature_names(student: UNet2DConditionModel) -> tuple[list[str], list[str]]:
    """(teacher module names, student module names) of the feature pairs, in order.

    Without a mid stage (SD): down0/down0, down1/down1, down2's last attention / down2's last attention, up1/up0, up2/up1, up3/up2.
    With one (vega): every down stage, mid and every up stage of both.
    """
    ups = range(len(student.up_blocks))
    if student.mid_block is not None:
        names = [*(f"down_blocks.{i}" for i in range(len(student.down_blocks))), "mid_block", *(f"up_blocks.{i}" for i in ups)]
        return names, list(names)
    last = len(student.down_blocks) - 1
    pairs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(last)]
    student_attention = len(student.down_blocks[last].attentions) - 1
    pairs.append((f"down_blocks.{last}.attentions.-1.proj_out", f"down_blocks.{last}.attentions.{student_attention}.proj_out"))
    pairs += [(f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in ups]
    return [t for t, _ in pairs], [s for _, s in pairs]


class FeatureTap:
    """Collects the outputs of named modules during a forward call; "-1" in a name is the last of a module list.

    Between `take` and the next forward call of the network nothing is kept: activation checkpointing runs modules again in backward.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self._outputs: dict[str, Tensor] = {}
        self.names, self._open = names, False
        network.register_forward_pre_hook(self._begin)
        for name in names:
            self._find(network, name).register_forward_hook(self._hook(name))

    @staticmethod
    def _find(network: nn.Module, name: str) -> nn.Module:
        module: Any = network
        for part in name.split("."):
            module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)
        assert isinstance(module, nn.Module)
        return module

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._open = True

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._open:
                self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> list[Tensor]:
        """Outputs of the last forward call, in the order of the names; forgets them."""
        outputs = [self._outputs[name] for name in self.names]
        self._outputs, self._open = {}, False
        return outputs


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a U-Net config, counted on the meta device."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(config))
    return sum(p.numel() for p in unet.parameters())
