"""Prompts to conditioning: the frozen text encoder of an SD 1.x or 2.x folder, or the two of an SDXL one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.models.conditioning import Conditioning
from trainer.models.embeddings import EmbeddingCache
from trainer.models.tokenizer import tokenize
from trainer.sources import folder_digest, load_frozen

CACHED_BYTES = 512 << 20


class TextEncoder:
    """What teacher and student share; the embeddings of recent captions are kept in memory, in float32.

    Args:
        image_size: of the images that SDXL is told of, in pixels; other models are told nothing.
        kept: a folder in which all embeddings are kept, rounded to float16, for other processes and runs.
    """

    def __init__(
        self, folder: Path, device: torch.device | str = "cpu", image_size: int | None = None, kept: Path | None = None
    ) -> None:
        self.device, self.image_size = torch.device(device), image_size
        self.parts: list[tuple[CLIPTokenizer, Any]] = [self._load(folder, "tokenizer", "text_encoder", CLIPTextModel)]
        if (folder / "text_encoder_2").is_dir():
            self.parts.append(self._load(folder, "tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))
        self.tokenizer = self.parts[0][0]
        key = f"{folder_digest(folder, ('text_encoder*', 'tokenizer*'))}/{image_size}" if kept else ""
        kind = torch.float16 if kept else torch.float32
        self.cache = EmbeddingCache(self.compute, key, kept, CACHED_BYTES, batch=8, kept=kind, device=self.device)

    def _load(self, folder: Path, tokenizer: str, network: str, kind: Any) -> tuple[CLIPTokenizer, Any]:
        return CLIPTokenizer.from_pretrained(folder / tokenizer), load_frozen(kind, folder / network).to(self.device)

    def encode(self, captions: list[str]) -> Conditioning:
        """Of B captions, each computed once. See `compute`."""
        return self.cache.encode(captions)

    @torch.no_grad()
    def compute(self, captions: list[str]) -> Conditioning:
        """Of B captions: the last hidden states, or SDXL's (arXiv:2307.01952): both encoders' second last side by side, the second
        one's projection, and the size. SDXL's empty caption is all zeros, as its pipeline has it."""
        if len(self.parts) == 1:
            tokenizer, network = self.parts[0]
            return Conditioning(network(tokenize(tokenizer, captions).to(self.device)).last_hidden_state)
        found = [net(tokenize(tokenizer, captions).to(self.device), output_hidden_states=True) for tokenizer, net in self.parts]
        said = torch.tensor([float(caption != "") for caption in captions], device=self.device)
        states = torch.cat([output.hidden_states[-2] for output in found], dim=-1) * said.view(-1, 1, 1)
        size = float(self.image_size or 0)
        sizes_B6 = torch.tensor([[size, size, 0, 0, size, size]], device=self.device).repeat(len(captions), 1)
        return Conditioning(states, found[-1].text_embeds * said.view(-1, 1), sizes_B6)
