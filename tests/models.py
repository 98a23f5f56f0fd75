"""Small random models in the real formats, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only, each its own token: enough to be a real CLIPTokenizer."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789-"]
    vocabulary = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, pad_token=END, unk_token=END).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tiny_unet() -> UNet2DConditionModel:
    """A student-shaped U-Net: no mid block, cross-attention at the lower resolution only."""
    return UNet2DConditionModel(
        sample_size=4, in_channels=8, out_channels=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None, cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8, use_linear_projection=True,
    )  # fmt: skip


def tiny_controlnet(unet: UNet2DConditionModel, folder: Path, seed: int, mid: str | None = None, **options: Any) -> Path:
    """A random ControlNet for 8-fold autoencoders whose residuals are not zero, and its folder.

    Args:
        mid: type of its mid stage, as published ones have it; None: as the U-Net.
        options: others of its configuration.
    """
    from torch import nn

    from sdxs.controlnet import StudentControlNetModel, config_for

    torch.manual_seed(seed)
    config = config_for(unet.config, 8) | options
    if mid is None:
        made = StudentControlNetModel(**config)
    else:
        made = ControlNetModel(**{k: v for k, v in config.items() if k != "time_embedding_dim"} | {"mid_block_type": mid})
    for weight in made.parameters():
        if weight.dim() > 1 and not weight.any():  # the zero convolutions
            nn.init.normal_(weight, std=0.5)
    made.save_pretrained(folder)
    return folder


def tiny_folder(folder: Path, scheduler: Any = None, seed: int = 0) -> Path:
    """A text-to-image folder of 32x32 images in diffusers format, loadable by StableDiffusionPipeline."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    tiny_unet().save_pretrained(folder / "unet")
    channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(latent_channels=8, **channels, **blocks).save_pretrained(folder / "vae")
    scheduler = scheduler or DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"], "scheduler": ["diffusers", type(scheduler).__name__],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_teacher(folder: Path, seed: int = 1) -> Path:
    """A random multi-step teacher of 32x32 images: three stages, so that block removal leaves two."""
    from diffusers import AutoencoderKL

    tiny_folder(folder, seed=seed)
    torch.manual_seed(seed)
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    UNet2DConditionModel(
        sample_size=4, in_channels=8, out_channels=8, block_out_channels=(16, 32, 32), layers_per_block=1,
        down_block_types=(cross, cross, plain), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8, use_linear_projection=True,
        addition_embed_type="text", addition_embed_type_num_heads=2,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1, sample_size=32, scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    index = folder / "model_index.json"  # or diffusers loads the class before it, with weights of whatever was in memory
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}))
    return folder


def tiny_recipe(teacher: Path, steps: int = 4) -> dict[str, Any]:
    """A distillation of `tiny_teacher` that takes seconds."""
    size = {"steps": steps, "batch": 4, "lr": 1e-3}
    tiny_vae = {
        "latent_channels": 8, "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
        "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4,
    }  # fmt: skip
    weights = {"feature_weights": (1.0, 0.5, 0.5, 0.5), "latent_l2": 1.0}
    return {
        "kind": "distill", "name": "tiny", "world": "scenes", "teacher": str(teacher),
        "pairs": {"count": 16, "steps": 3, "guidance": 2.0, "solver": "dpm"},
        "compositions": {"count": 16, "steps": 3, "guidance": 2.0, "solver": "dpm"},
        "decoder": {**size, "config": tiny_vae, "gan_weight": 0.01, "pixel_weight": 1.0, "encoder_weight": 0.1},
        "unet": {**size, "ema": 0.9}, "warmup": {**size, **weights},
        "diff_instruct": {**size, "online_lr": 1e-4, **weights},
        "evaluation": {"train_images": 8, "heldout_images": 8, "teacher_steps": 3},
    }  # fmt: skip


def tiny_sdxl(folder: Path, seed: int = 0) -> Path:
    """A one-step student of a random SDXL: two text encoders, pooled embedding, sizes; 64x64 images, Euler, not sealed."""
    from trainer.models.families import write_teacher
    from trainer.models.folders import write_model_index, write_one_step_scheduler
    from trainer.models.students import decoder_config, shrink

    teacher = write_teacher("sdxl", folder, seed=seed)
    shrink(UNet2DConditionModel.from_pretrained(teacher / "unet")).save_pretrained(folder / "unet")
    torch.manual_seed(seed)
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny.from_config(decoder_config(4) | widths).save_pretrained(folder / "vae")
    write_one_step_scheduler(teacher, folder)
    write_model_index(folder)
    return folder
