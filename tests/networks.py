"""The usual evaluation networks, small or untrained, in the files that the real ones come in."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.models import LENGTH, tiny_tokenizer

CLIP_SIZE = 30


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP model that sees 30x30 pixels and reads letters."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = len(tiny_tokenizer(folder))
    text = {
        **size, "vocab_size": words, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {**size, "image_size": CLIP_SIZE, "patch_size": 10}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    square = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIZE}, crop_size=square).save_pretrained(folder)
    return folder
