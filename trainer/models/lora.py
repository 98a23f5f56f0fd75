"""LoRA on diffusers networks through PEFT: style LoRAs read and merged, new ones attached, trained and saved as diffusers loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from sdxs.errors import InvalidRequest
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


def read_lora(path: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a LoRA in PEFT, diffusers or kohya form, by diffusers' names, and their alphas.

    Raises:
        InvalidRequest: there is no such file, or it is not a LoRA of a diffusion model.
    """
    place = Path(path)
    if not place.exists():
        raise InvalidRequest("lora.path", path, "a .safetensors file, or a folder with pytorch_lora_weights.safetensors")
    try:
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidRequest("lora.path", path, f"a LoRA that diffusers reads ({error})") from error
    if not any("lora" in name for name in state):
        raise InvalidRequest("lora.path", path, "a LoRA; it has no tensor of one")
    return state, alphas


def check_lora(path: str, unet_config: Any) -> None:
    """Refuse a LoRA that does not fit a U-Net, by its shapes alone; no weights of the U-Net are needed.

    Raises:
        InvalidRequest: a layer is not in the U-Net or has other widths, or its two matrices do not fit each other; names it.
    """
    state, _ = read_lora(path)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(unet_config))
    modules = dict(unet.named_modules())
    for layer, (down, up) in _layers_of(state).items():
        fault = _misfit(down, up, modules.get(layer))
        if fault is not None:
            raise InvalidRequest("lora.path", path, f"a LoRA made for this U-Net: {layer} {fault}")


def _misfit(down: torch.Size | None, up: torch.Size | None, module: nn.Module | None) -> str | None:
    """What is wrong with a layer's matrices."""
    if down is None or up is None:
        return "has one matrix of two"
    if module is None:
        return f"takes {down[1]}, the U-Net has no such layer"
    if down[0] != up[1]:
        return f"has matrices of rank {down[0]} and {up[1]}"
    for does, made_for, ways in (("takes", down[1], "in"), ("gives", up[0], "out")):
        own = getattr(module, f"{ways}_features", getattr(module, f"{ways}_channels", None))
        if made_for != own:
            return f"{does} {made_for}, the U-Net has {own} {ways}puts there"
    return None


Sizes = tuple[torch.Size | None, torch.Size | None]
MARKS = {
    "down": (".lora_A.", ".lora.down.", ".lora_linear_layer.down."),
    "up": (".lora_B.", ".lora.up.", ".lora_linear_layer.up."),
}  # fmt: skip


def _layers_of(state: Mapping[str, Tensor]) -> dict[str, Sizes]:
    """Each layer of the U-Net that a LoRA changes, with the shapes of its matrices, down and up."""
    found: dict[str, dict[str, torch.Size]] = {}
    for name, value in state.items():
        if name.startswith("text_encoder"):
            continue
        for way, marks in MARKS.items():
            for layer in (name.partition(mark)[0] for mark in marks if mark in name):
                found.setdefault(layer.removeprefix("unet."), {})[way] = value.shape
    return {layer: (shapes.get("down"), shapes.get("up")) for layer, shapes in found.items()}


def merge_lora(unet: Any, text_encoders: Sequence[Any], lora: LoraSection) -> None:
    """Fold a style LoRA into a U-Net and, where it has a part for them, into its text encoders, for good.

    Raises:
        InvalidRequest: as `read_lora` and `check_lora`.
    """
    check_lora(lora.path, unet.config)
    state, alphas = read_lora(lora.path)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet, adapter_name="style")
    unet.fuse_lora(lora_scale=lora.scale, adapter_names=["style"])
    unet.unload_lora()
    for number, network in enumerate(text_encoders):
        prefix = "text_encoder" if number == 0 else f"text_encoder_{number + 1}"
        if any(name.startswith(f"{prefix}.") for name in state):
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                state, alphas, network, prefix=prefix, lora_scale=lora.scale
            )
