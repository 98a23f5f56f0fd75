"""ControlNets in diffusers' format, those of students included: a small subclass where diffusers' own class cannot say what is needed.

The student U-Nets have no mid stage, and diffusers' ControlNetModel refuses to be without one; some U-Nets have a time embedding of a
width it does not know. Everything else, file format and pipelines included, is diffusers'.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.embeddings import TextTimeEmbedding, TimestepEmbedding
from torch import Tensor, nn

from sdxs import weights
from sdxs.errors import CorruptArtifact

_MID = "UNetMidBlock2D"


class _NoResidual(nn.Module):
    """Stands where the mid stage's zero convolution would: diffusers' pipelines and U-Nets add what it gives, so it gives zeros."""

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        return torch.zeros_like(hidden_BCHW)


class StudentControlNetModel(ControlNetModel):  # type: ignore[misc]  # diffusers is half typed
    """ControlNetModel with two more choices.

    Args:
        mid_block_type: also None: no mid stage, and a mid residual of zeros.
        time_embedding_dim: width of the time embedding; by default four times the first stage's, as in ControlNetModel.
        options: all others of ControlNetModel.
    """

    def __init__(self, mid_block_type: str | None = None, time_embedding_dim: int | None = None, **options: Any) -> None:
        super().__init__(mid_block_type=mid_block_type or _MID, **options)
        if mid_block_type is None:
            self.mid_block, self.controlnet_mid_block = None, _NoResidual()
        if time_embedding_dim is not None:
            self._set_time_embedding(time_embedding_dim)
        self.register_to_config(mid_block_type=mid_block_type, time_embedding_dim=time_embedding_dim)

    def _set_time_embedding(self, width: int) -> None:
        """New layers of that width, wherever the time embedding is made or read."""
        config = self.config
        self.time_embedding = TimestepEmbedding(config.block_out_channels[0], width, act_fn=config.act_fn)
        if config.addition_embed_type == "text":
            self.add_embedding = TextTimeEmbedding(config.cross_attention_dim, width, config.addition_embed_type_num_heads)
        elif config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, width)
        for module in self.modules():
            if isinstance(getattr(module, "time_emb_proj", None), nn.Linear):
                module.time_emb_proj = nn.Linear(width, module.time_emb_proj.out_features)


def _signature() -> inspect.Signature:
    """ControlNetModel's arguments and ours: diffusers reads from it which entries of a config.json are arguments."""
    ours = inspect.signature(StudentControlNetModel.__init__).parameters
    theirs = dict(inspect.signature(ControlNetModel.__init__).parameters)
    added = {name: ours[name] for name in ("mid_block_type", "time_embedding_dim")}
    return inspect.Signature(list((theirs | added).values()))


StudentControlNetModel.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


def config_for(unet: Mapping[str, Any], upsampling: int, channels: int = 3) -> dict[str, Any]:
    """StudentControlNetModel config for a U-Net's.

    Args:
        unet: the U-Net's configuration.
        upsampling: pixels of an image per latent element and side, a power of two; the condition is brought down by it.
        channels: of a condition.
    """
    arguments = set(inspect.signature(StudentControlNetModel.__init__).parameters) - {"self"}
    config = {name: value for name, value in unet.items() if name in arguments}
    default = unet["block_out_channels"][0] * 4
    width = unet.get("time_embedding_dim")
    return config | {
        "time_embedding_dim": None if width == default else width,
        "conditioning_channels": channels,
        "conditioning_embedding_out_channels": _widths(upsampling, unet["block_out_channels"][0]),
    }


def _widths(upsampling: int, last: int) -> tuple[int, ...]:
    """Of the condition's stages: diffusers' 16, 32, 96, 256 where 8 pixels are an element and the U-Net is wide enough, else as many
    stages as it takes, none wider than the U-Net's first."""
    levels = upsampling.bit_length()
    return tuple(min(width, max(last, 16)) for width in (16, 32, 96, 256, 256, 256)[:levels])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """A ControlNet folder of either class, in eval mode, without gradients.

    Raises:
        CorruptArtifact: it is none, its weights cannot be read, or some are missing, which diffusers would draw at random.
    """
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf8")).get("_class_name")
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise CorruptArtifact(f"{folder.name}/config.json is missing or not a JSON object") from error
    kinds = {model.__name__: model for model in (ControlNetModel, StudentControlNetModel)}
    if kind not in kinds:
        raise CorruptArtifact(f"{folder.name}/config.json: {kind!r} is none of {', '.join(kinds)}")
    plain = (folder / "diffusion_pytorch_model.safetensors").is_file()
    variant = "fp16" if not plain and any(folder.glob("*.fp16*.safetensors")) else None
    network: ControlNetModel = weights.load(kinds[kind], folder, dtype, variant=variant)
    return network
