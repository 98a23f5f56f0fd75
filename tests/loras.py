"""Small LoRAs in the real formats, made on the spot."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

UNET = ("to_q", "to_k", "to_v", "to_out.0", "conv1")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


def tiny_lora(
    model: Path,
    folder: Path,
    seed: int,
    *,
    unet: Sequence[str] = UNET,
    text: Sequence[str] = TEXT,
    std: float = 0.3,
    **options: Any,
) -> Path:
    """A random LoRA for a model's folder, saved by diffusers with PEFT's configuration; its folder.

    Args:
        unet: layers of the U-Net; none: it is of the text encoder alone. The same the other way round.
        std: of its matrices.
        options: of its LoraConfig.
    """
    pipeline, layers = _pipeline(model), {}
    torch.manual_seed(seed)
    for name, targets in (("unet", unet), ("text_encoder", text)):
        if targets:
            network = getattr(pipeline, name)
            network.add_adapter(LoraConfig(target_modules=list(targets), **({"r": 2, "lora_alpha": 3} | options)))
            for weight_name, weight in network.named_parameters():
                if "lora_" in weight_name:
                    torch.nn.init.normal_(weight, std=std)
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
            layers[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


def peft_adapter(model: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A random LoRA for a model's U-Net, saved by PEFT."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    network = get_peft_model(
        _pipeline(model).unet, LoraConfig(target_modules=list(UNET), **({"r": 2, "lora_alpha": 3} | options))
    )
    for name, weight in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(str(folder))
    return folder


def diffusers_draws(model: Path, prompt: str, noise_CHW: Any, loras: Sequence[tuple[Path, float]], kind: str) -> Any:
    """What StableDiffusionPipeline draws in one step without guidance, with LoRAs loaded and weighted by itself.

    Args:
        kind: "latent", (C, H, W), or "np", float (H, W, 3).
    """
    pipeline = _pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PEFT, that there are several
        for i, (path, _) in enumerate(loras):
            pipeline.load_lora_weights(str(path), adapter_name=f"style-{i}")
    if loras:
        pipeline.set_adapters([f"style-{i}" for i in range(len(loras))], [scale for _, scale in loras])
    latents = torch.from_numpy(noise_CHW)[None].clone()
    return pipeline(prompt, num_inference_steps=1, guidance_scale=0.0, latents=latents, output_type=kind).images[0]


def _pipeline(model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
