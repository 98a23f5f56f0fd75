"""LoRA on diffusers networks through PEFT: style LoRAs read and merged, new ones attached, trained and saved as diffusers loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor

from sdxs.lora.files import NETWORKS, check_fit, read
from trainer.placement import worker_rank
from trainer.sections import LoraSection

# The projections of attention and the time embedding's way into ResNets: what style LoRAs are trained on.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj", "ff.net.0.proj", "ff.net.2")


def attach(network: Any, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION) -> None:
    """Freeze a U-Net and give it a new LoRA to learn: W + alpha / rank B A, B zero at first (arXiv:2106.09685)."""
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,  # type: ignore[arg-type]  # any number does
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
    )


def folded(weights: Mapping[str, Tensor], rank: int, alpha: float | None = None) -> dict[str, Tensor]:
    """The weights of a network with its LoRA added in, W + alpha / rank B A, by the names it has without one.

    Args:
        weights: the state dict of a network that `attach` was called on.
    """
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        layer, _, rest = name.partition(".lora_A.")
        if rest:
            up = weights[f"{layer}.lora_B.{rest}"]
            change = up @ down if up.dim() == 2 else _convolved(up, down)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + (alpha or rank) / rank * change
    return plain


def _convolved(up_OR11: Tensor, down_RIHW: Tensor) -> Tensor:
    """The kernel of a convolution with `down` followed by a 1x1 one with `up`."""
    return torch.einsum("or,rihw->oihw", up_OR11[:, :, 0, 0], down_RIHW)


def save_adapter(weights: Mapping[str, Tensor], folder: Path, rank: int, alpha: float | None = None) -> None:
    """Write the LoRA of a state dict as `pytorch_lora_weights.safetensors` in PEFT's form, which diffusers' `load_lora_weights` reads; on
    the first worker only."""
    if worker_rank():
        return
    layers = {name.replace(".default.", "."): value.contiguous() for name, value in weights.items() if ".lora_" in name}
    targets = sorted({name.rpartition(".lora_")[0] for name in layers})
    config = {"r": rank, "lora_alpha": alpha or rank, "target_modules": targets}
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)


def check_lora(path: str, unet_config: Any) -> None:
    """Refuse a LoRA that does not fit a U-Net, by its shapes alone; no weights of the U-Net are needed.

    Raises:
        InvalidRequest: as `sdxs.lora.files.read`; or a layer is not in the U-Net or has other widths, or its two matrices do not fit each
            other; names it.
    """
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(unet_config))
    check_fit(read(Path(path)), {"unet": unet}, "lora.path", path, elsewhere=NETWORKS)


def merge_lora(unet: Any, text_encoders: Sequence[Any], lora: LoraSection) -> None:
    """Fold a style LoRA into a U-Net and, where it has a part for them, into its text encoders, for good.

    Raises:
        InvalidRequest: as `check_lora`.
    """
    check_lora(lora.path, unet.config)
    weights = read(Path(lora.path))
    tensors, told = dict(weights.tensors), {"network_alphas": weights.alphas, "metadata": weights.config}
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(tensors, unet=unet, adapter_name="style", **told)
    unet.fuse_lora(lora_scale=lora.scale, adapter_names=["style"])
    unet.unload_lora()
    for network, prefix in zip(text_encoders, NETWORKS[1:], strict=False):
        if prefix in weights.networks:
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                tensors, text_encoder=network, prefix=prefix, lora_scale=lora.scale, **told
            )
