"""ControlNets for teachers and students: made from a U-Net, shrunk by the students' block map, and joined with a U-Net in one module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from sdxs import controlnet
from sdxs.controlnet import StudentControlNetModel, config_for
from sdxs.errors import InvalidRequest
from trainer.models.students import layer_source

KINDS = ("ControlNetModel", "StudentControlNetModel")
MID = "UNetMidBlock2DCrossAttn"  # diffusers' default, of U-Nets too
COPIED = ("conv_in", "time_embedding", "add_embedding", "class_embedding", "encoder_hid_proj", "down_blocks", "mid_block")


def kind_of(config: Mapping[str, Any]) -> type[ControlNetModel]:
    """diffusers' own class where it can be this network, else ours."""
    plain = config.get("mid_block_type", MID) is not None and config.get("time_embedding_dim") is None
    return ControlNetModel if plain else StudentControlNetModel


def built(config: Mapping[str, Any], field: str) -> ControlNetModel:
    """A network of a configuration, which may be that of a file.

    Raises:
        InvalidRequest: there is no such network; names `field`.
    """
    kind = kind_of(config)
    own = {"mid_block_type": MID, **config}  # older files leave it out
    if kind is ControlNetModel:
        own.pop("time_embedding_dim", None)
    try:
        network: ControlNetModel = kind.from_config(own)
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
        raise InvalidRequest(field, dict(config), f"a configuration of {kind.__name__} ({error})") from error
    return network


def from_unet(unet: UNet2DConditionModel, upsampling: int, channels: int = 3) -> ControlNetModel:
    """A ControlNet to train for a U-Net (arXiv:2302.05543): its encoder half copied, zero convolutions after every skip, and a new stack
    that brings a condition of `upsampling` times the latent's size down to it. Float32."""
    made = built(config_for(unet.config, upsampling, channels), "unet")
    for name in COPIED:
        part, source = getattr(made, name, None), getattr(unet, name, None)
        if isinstance(part, nn.Module) and isinstance(source, nn.Module):
            part.load_state_dict(source.state_dict())
    return made.float()


def shrink_controlnet(big: ControlNetModel, student: UNet2DConditionModel) -> ControlNetModel:
    """A student's ControlNet, every weight copied from the teacher's by the block map of the U-Nets.

    Without the teacher's mid stage where the student has none. Of a stage's zero convolutions those of the layers that stay are kept.

    Raises:
        InvalidRequest: the two do not fit together.
    """
    config = config_for(student.config, 1, big.config.conditioning_channels)
    config["conditioning_embedding_out_channels"] = tuple(big.config.conditioning_embedding_out_channels)
    tiny, weights = built(config, "controlnet"), big.state_dict()
    mapped: dict[str, Tensor] = {}
    for name, value in tiny.state_dict().items():
        origin = _source(name, big, tiny)
        if origin not in weights or weights[origin].shape != value.shape:
            found = tuple(weights[origin].shape) if origin in weights else "nothing"
            raise InvalidRequest(f"controlnet.{origin}", found, f"{tuple(value.shape)}, as the student's {name} needs it")
        mapped[name] = weights[origin].to(torch.float32, copy=True)
        if ".attn1.to_out." in name and ".attn2." in origin:
            mapped[name].zero_()
    tiny.load_state_dict(mapped)
    return tiny


def _source(name: str, big: ControlNetModel, tiny: ControlNetModel) -> str:
    """The big one's parameter that initialises `name`."""
    parts = name.split(".")
    if parts[0] == "controlnet_down_blocks":
        place = places(tiny)[int(parts[1])]
        parts[1] = str(places(big).index(place))
    return ".".join(layer_source(name.split("."), parts, big, tiny))


def places(network: Any) -> list[tuple[int, str]]:
    """Where each down residual of a ControlNet comes from: (stage, "resnet 0", ... or "downsampler"), the input first."""
    found = [(0, "input")]
    for index, block in enumerate(network.down_blocks):
        found += [(index, f"resnet {layer}") for layer in range(len(block.resnets))]
        found += [(index, "downsampler")] if block.downsamplers is not None else []
    return found


def load_controlnet(folder: Path, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """A ControlNet folder, frozen. Raises CorruptArtifact."""
    return controlnet.load(folder, dtype)


def as_condition(map_BHWC: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Maps in uint8 as a network takes them: [0, 1], shape (B, 3, H, W)."""
    return torch.from_numpy(np.array(map_BHWC)).to(device).permute(0, 3, 1, 2).float() / 255


def residuals(
    network: nn.Module, noisy_BCHW: Tensor, t_B: Tensor, conditioning: Mapping[str, Any], map_BCHW: Tensor, scale: float = 1.0
) -> dict[str, Any]:
    """What a ControlNet adds to a U-Net, as that one's keyword arguments."""
    down, mid = network(noisy_BCHW, t_B, controlnet_cond=map_BCHW, conditioning_scale=scale, return_dict=False, **conditioning)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class Controlled(nn.Module):
    """A U-Net with a ControlNet, called as the U-Net is, and with `control_BCHW`: one forward call for both, which data-parallel training
    needs. Which of the two learns, their `requires_grad` says."""

    def __init__(self, unet: nn.Module, controlnet: nn.Module) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, control_BCHW: Tensor | None = None, **conditioning: Any) -> Any:
        if control_BCHW is None:
            return self.unet(noisy_BCHW, t_B, **conditioning)
        added = residuals(self.controlnet, noisy_BCHW, t_B, conditioning, control_BCHW)
        return self.unet(noisy_BCHW, t_B, **conditioning, **added)

    def enable_gradient_checkpointing(self) -> None:
        """Of both, as diffusers' own networks do."""
        both: list[Any] = [self.unet, self.controlnet]
        for network in both:
            network.enable_gradient_checkpointing()

    def weights(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a whole state, the ControlNet's part."""
        prefix = "controlnet."
        return {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}


def plain_unet(network: Any) -> Any:
    """The U-Net of a `Controlled`, or the U-Net itself."""
    return network.unet if isinstance(network, Controlled) else network
