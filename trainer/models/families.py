"""The teachers that are distilled here, as their published configuration files have them, and folders of random weights of them.

Knows shapes, not weights: a folder made here loads wherever the real one does, in seconds or at full width, and paints noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from sdxs.errors import InvalidRequest
from trainer.models.folders import write_model_index

Config = dict[str, Any]
START, END = "<|startoftext|>", "<|endoftext|>"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True)
class Family:
    """Configurations by folder. A text encoder's tokenizer pads with the token of the same place in `pads`; `small_unet` is what
    a small U-Net has otherwise."""

    unet: Config
    vae: Config
    scheduler: Config
    text_encoders: tuple[Config, ...]
    pads: tuple[str, ...]
    small_unet: Config


# Shared by all: scaled-linear betas, 8-fold autoencoder, CLIP.
NOISE: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
PNDM: Config = {
    "_class_name": "PNDMScheduler", **NOISE, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip
EULER: Config = {"_class_name": "EulerDiscreteScheduler", **NOISE, "steps_offset": 1, "timestep_spacing": "leading"}
VAE: Config = {
    "latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
UNET: Config = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": (320, 640, 1280, 1280), "mid_block_type": "UNetMidBlock2DCrossAttn",
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
}  # fmt: skip
CLIP_L: Config = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768,
    "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_H: Config = {  # of 24 layers the last is not used and was cut off
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512,
    "hidden_act": "gelu",
}  # fmt: skip
CLIP_G: Config = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
SMALL: Config = {"sample_size": 8, "block_out_channels": (4, 8, 12, 12), "norm_num_groups": 2, "cross_attention_dim": 16}

FAMILIES: dict[str, Family] = {
    "sd15": Family(
        {**UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        VAE, PNDM, (CLIP_L,), (END,), {**SMALL, "attention_head_dim": 2},
    ),
    "sd21": Family(  # stable-diffusion-2-1-base
        {**UNET, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        VAE, PNDM, (CLIP_H,), ("!",), {**SMALL, "attention_head_dim": (1, 2, 3, 3)},
    ),
    "sdxl": Family(  # stable-diffusion-xl-base-1.0
        {
            **UNET, "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, EULER, (CLIP_L, CLIP_G), (END, "!"),
        {
            **SMALL, "cross_attention_dim": 40, "block_out_channels": (4, 8, 12), "attention_head_dim": (1, 2, 3),
            "transformer_layers_per_block": (1, 2, 3), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
    ),
}  # fmt: skip
SMALL_VAE: Config = {"sample_size": 64, "block_out_channels": (4, 8, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
SMALL_TEXT: tuple[Config, ...] = (
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16},
    {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 20},
)


def family(name: str) -> Family:
    """A family by its name. Raises InvalidRequest(field="family") for another."""
    if name not in FAMILIES:
        raise InvalidRequest("family", name, " or ".join(FAMILIES))
    return FAMILIES[name]


def write_teacher(
    name: str, folder: Path, *, small: bool = True, seed: int = 0, latent_channels: int = 4, dtype: torch.dtype = torch.float32
) -> Path:
    """A complete diffusers text-to-image folder of that family with random weights, and the folder's path.

    Args:
        name: `sd15`, `sd21` (2.1-base) or `sdxl`.
        small: the same classes, blocks and conditioning at tiny widths: 64 x 64 pixels, below a second. Otherwise the real widths;
            the largest network (SDXL's U-Net: 5.1 GB in 16 bits) is built alone, in `dtype`.
        seed: of the weights; the caller's generator is left as it was.
        latent_channels: of autoencoder and U-Net: 4, or 16 as newer autoencoders have.
        dtype: of the weights, in memory and on disk.

    Raises:
        InvalidRequest: there is no such family.
    """
    found = family(name)
    channels = {"in_channels": latent_channels, "out_channels": latent_channels}
    unet = {**found.unet, **(found.small_unet if small else {}), **channels}
    vae = {**found.vae, **(SMALL_VAE if small else {}), "latent_channels": latent_channels}
    with _random_weights(seed, dtype):
        for i in range(len(found.text_encoders)):
            _write_text_encoder(folder, found, i, small)
        diffusers.AutoencoderKL.from_config(vae).save_pretrained(folder / "vae")
        diffusers.UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    scheduler = getattr(diffusers, found.scheduler["_class_name"])
    scheduler.from_config(found.scheduler).save_pretrained(folder / "scheduler")
    write_model_index(folder)
    return folder


def set_image_size(folder: Path, pixels: int) -> None:
    """Make the teacher in `folder` one of images of that size, such as full width at 64 pixels: networks do not depend on it.

    Raises:
        InvalidRequest: the U-Net's stages cannot halve the latent of that size as often as they do.
    """
    paths = {name: folder / name / "config.json" for name in ("unet", "vae")}
    unet, vae = (json.loads(path.read_text()) for path in paths.values())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    if pixels < step or pixels % step:
        raise InvalidRequest("image_size", pixels, f"a multiple of {step}")
    paths["unet"].write_text(json.dumps({**unet, "sample_size": pixels // factor}, indent=2))
    paths["vae"].write_text(json.dumps({**vae, "sample_size": pixels}, indent=2))


@contextmanager
def _random_weights(seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Networks built inside have weights of `dtype` that follow from the seed."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _write_text_encoder(folder: Path, found: Family, index: int, small: bool) -> None:
    """The family's text encoder of that index and its tokenizer. With real widths the table of tokens has its real size, of which
    the tokenizer knows the beginning."""
    suffix = "" if index == 0 else f"_{index + 1}"
    tokenizer = write_tokenizer(folder / f"tokenizer{suffix}", found.pads[index])
    config = transformers.CLIPTextConfig(
        **{**found.text_encoders[index], **(SMALL_TEXT[index] if small else {})},
        vocab_size=len(tokenizer) if small else 49408,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModel if index == 0 else transformers.CLIPTextModelWithProjection
    kind(config).save_pretrained(folder / f"text_encoder{suffix}")


def write_tokenizer(folder: Path, pad: str = END, length: int = 77) -> transformers.CLIPTokenizer:
    """A CLIPTokenizer without merges: every byte is a token, alone and at the end of a word, as the first 512 of CLIP's own are.

    Reads any text of up to `length` tokens with start and end. Two pads are in use: the end token, and "!", token 0.
    """
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    load = transformers.CLIPTokenizer.from_pretrained
    load(folder, model_max_length=length, pad_token=pad, unk_token=END).save_pretrained(folder)
    return load(folder)
