"""The published SDXS repositories, small: their layout, files and settings, random weights of few channels.

Images are 32x32 pixels from latents of 4x4x4; what is said of sizes in their settings is made smaller, all else is as published.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DEISMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.models import END, LENGTH, START, tiny_tokenizer

_SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SD2_PADDING = "-</w>"
"""SD 2 pads with a word, "!", where SD 1 pads with the end."""
_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def dreamshaper(folder: Path, seed: int = 0) -> Path:
    """SD 1.x: heads of one number, attention but at the top, DEIS."""
    unet = {
        "cross_attention_dim": 32, "attention_head_dim": 2, "use_linear_projection": False,
        "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN), "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
    }  # fmt: skip
    scheduler = DEISMultistepScheduler(**_SD, prediction_type="epsilon")
    return _repository(folder, seed, 32, unet, scheduler)


def old(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """0.9, SD 2.1: a number of heads for each stage, attention everywhere, at the top to the text only; Euler with trailing timesteps.

    Args:
        scheduler: settings in place of its own.
    """
    unet = {
        "cross_attention_dim": 48, "attention_head_dim": (2, 2, 4), "use_linear_projection": True,
        "only_cross_attention": (True, False, False), "down_block_types": (_CROSS_DOWN,) * 3, "up_block_types": (_CROSS_UP,) * 3,
    }  # fmt: skip
    settings = {**_SD, "prediction_type": "epsilon", "timestep_spacing": "trailing", "interpolation_type": "linear"}
    return _repository(folder, seed, 48, unet, EulerDiscreteScheduler(**settings | scheduler), padding=SD2_PADDING)


def sketch(folder: Path, unet: Path, seed: int = 9) -> Path:
    """A ControlNetModel alone, with a mid stage that the U-Net does not have, and no word of what it was trained for."""
    torch.manual_seed(seed)
    config = UNet2DConditionModel.load_config(unet)
    kept = (
        "block_out_channels",
        "cross_attention_dim",
        "attention_head_dim",
        "norm_num_groups",
        "layers_per_block",
        "down_block_types",
    )
    made = ControlNetModel(
        **{name: config[name] for name in kept}, in_channels=4, conditioning_embedding_out_channels=(16, 16, 16, 16)
    )
    for weight in made.parameters():
        if weight.dim() > 1 and not weight.any():  # the zero convolutions
            nn.init.normal_(weight, std=0.5)
    made.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    return folder


def _write_tokenizer_config(folder: Path, padding: str) -> None:
    """As transformers wrote it then: tokens with all their properties, and a file of them."""
    (folder / "tokenizer.json").unlink(missing_ok=True)  # younger than these repositories
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END}
    config = {name: {"__type": "AddedToken", "content": token, **flags} for name, token in tokens.items()}
    others = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH}
    said = {**config, **others, "pad_token": padding, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    names = {name: {"content": token, **flags} for name, token in tokens.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "pad_token": padding}))


def _repository(folder: Path, seed: int, width: int, unet: dict[str, Any], scheduler: Any, padding: str = END) -> Path:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    _write_tokenizer_config(folder / "tokenizer", padding)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32, 32), layers_per_block=1, mid_block_type=None, norm_num_groups=8, **unet
    ).save_pretrained(folder / "unet")
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**blocks, **widths).save_pretrained(folder / "vae")
    AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1, sample_size=32, scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae_large")  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.25.1", "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    (folder / "output.png").write_bytes(b"a picture")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"another form, which is never read")
    return folder


def fp16_alone(folder: Path, target: Path) -> Path:
    """A copy whose U-Net has its weights under the name of diffusers' fp16 variant only."""
    shutil.copytree(folder, target)
    weights = target / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    return target
