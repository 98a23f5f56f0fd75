"""Prompts to conditioning: the frozen text encoder of an SD 1.x or 2.x folder, or the two of an SDXL one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.models.conditioning import Conditioning
from trainer.models.tokenizer import tokenize
from trainer.sources import load_frozen

CACHED_BYTES = 512 << 20


class TextEncoder:
    """What teacher and student share; the embeddings of recent captions are kept.

    Args:
        image_size: of the images that SDXL is told of, in pixels; other models are told nothing.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", image_size: int | None = None) -> None:
        self.device, self.image_size = torch.device(device), image_size
        self.parts: list[tuple[CLIPTokenizer, Any]] = [self._load(folder, "tokenizer", "text_encoder", CLIPTextModel)]
        if (folder / "text_encoder_2").is_dir():
            self.parts.append(self._load(folder, "tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))
        self.tokenizer = self.parts[0][0]
        self._cache: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._bytes = 0

    def _load(self, folder: Path, tokenizer: str, network: str, kind: Any) -> tuple[CLIPTokenizer, Any]:
        return CLIPTokenizer.from_pretrained(folder / tokenizer), load_frozen(kind, folder / network).to(self.device)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Conditioning:
        """Of B captions: the last hidden states, or SDXL's (arXiv:2307.01952): both encoders' second last side by side, the second
        one's projection, and the size. SDXL's empty caption is all zeros, as its pipeline has it."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        if missing:
            if self._bytes > CACHED_BYTES:
                self._cache, self._bytes = {c: self._cache[c] for c in captions if c in self._cache}, 0
            self._keep(missing, *self._compute(missing))
        states = torch.stack([self._cache[caption][0] for caption in captions])
        if len(self.parts) == 1:
            return Conditioning(states)
        pooled = torch.stack([part for caption in captions if (part := self._cache[caption][1]) is not None])
        size = float(self.image_size or 0)
        return Conditioning(
            states, pooled, torch.tensor([[size, size, 0, 0, size, size]], device=self.device).repeat(len(captions), 1)
        )

    def _compute(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        if len(self.parts) == 1:
            tokenizer, network = self.parts[0]
            return network(tokenize(tokenizer, captions).to(self.device)).last_hidden_state, None
        found = [net(tokenize(tokenizer, captions).to(self.device), output_hidden_states=True) for tokenizer, net in self.parts]
        said = torch.tensor([float(caption != "") for caption in captions], device=self.device)
        states = torch.cat([output.hidden_states[-2] for output in found], dim=-1) * said.view(-1, 1, 1)
        return states, found[-1].text_embeds * said.view(-1, 1)

    def _keep(self, captions: list[str], states: Tensor, pooled: Tensor | None) -> None:
        for number, caption in enumerate(captions):
            self._cache[caption] = (states[number], None if pooled is None else pooled[number])
        self._bytes += states.nbytes
