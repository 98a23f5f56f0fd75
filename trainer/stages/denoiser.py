"""Teacher, part 2: the text-conditioned latent diffusion model, U-Net and text encoder trained together from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Schedule, Stage, Trainable, step_generator
from trainer.tokenizer import tokenize

LatentBatch = Callable[[int, torch.Generator], tuple[Tensor, list[str]]]


class DenoiserStage(Stage):
    """Denoising loss with stratified t, caption dropout for classifier-free guidance, EMA on both networks.

    Args:
        latents: draws (latent_BCHW, captions); the captions' dropout happens here.
    """

    def __init__(
        self,
        unet_config: dict[str, Any],
        text_config: dict[str, Any],
        scheduler_config: dict[str, Any],
        tokenizer: CLIPTokenizer,
        schedule: Schedule,
        latents: LatentBatch,
        batch: int,
        seed: int,
        caption_dropout: float = 0.1,
    ) -> None:
        torch.manual_seed(seed)
        self.tokenizer, self.latents, self.batch, self.seed = tokenizer, latents, batch, seed
        self.scheduler = DDIMScheduler(**scheduler_config)
        self.diffusion, self.caption_dropout = Diffusion(self.scheduler.config), caption_dropout
        self.unet = UNet2DConditionModel(**unet_config).to(memory_format=torch.channels_last)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        self.text = CLIPTextModel(
            CLIPTextConfig(
                **text_config, **ids, pad_token_id=tokenizer.pad_token_id, vocab_size=len(tokenizer),
                max_position_embeddings=tokenizer.model_max_length,
            )
        )  # fmt: skip
        self.steps = schedule.steps
        both = torch.nn.ModuleDict({"unet": self.unet, "text_encoder": self.text})
        self.trainables = {"denoiser": Trainable(both, schedule, betas=(0.9, 0.99), weight_decay=0.0, ema_decay=0.999)}
        self._ids: dict[str, Tensor] = {}

    def _tokens(self, captions: list[str]) -> Tensor:
        for caption in captions:
            if caption not in self._ids:
                self._ids[caption] = tokenize(self.tokenizer, [caption])[0]
        return torch.stack([self._ids[caption] for caption in captions])

    def step(self, index: int) -> dict[str, Tensor | float]:
        generator = step_generator(self.seed, index)
        latent_BCHW, captions = self.latents(self.batch, generator)
        dropped = torch.rand(self.batch, generator=generator) < self.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        t_B = stratified_timesteps(self.batch, 0, self.diffusion.timesteps, generator)
        noise_BCHW = torch.randn(latent_BCHW.shape, generator=generator)
        noisy_BCHW = self.diffusion.diffuse(latent_BCHW, noise_BCHW, t_B).contiguous(memory_format=torch.channels_last)
        text_BLD = self.text(self._tokens(captions)).last_hidden_state
        output_BCHW = self.unet(noisy_BCHW, t_B, text_BLD).sample
        loss = F.mse_loss(output_BCHW, self.diffusion.target(latent_BCHW, noise_BCHW, t_B))
        norm = self.trainables["denoiser"].update(loss, index)
        return {"loss": loss, "gradient_norm": norm}

    def export(self, folder: Path) -> None:
        """Write `unet/`, `text_encoder/`, `tokenizer/`, `scheduler/`."""
        trainable = self.trainables["denoiser"]
        trainable.network.load_state_dict(trainable.averaged())
        self.unet.save_pretrained(folder / "unet")
        self.text.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")
