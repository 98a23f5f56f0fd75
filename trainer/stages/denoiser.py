"""Teacher, part 2: the text-conditioned latent diffusion model, U-Net and text encoder trained together from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Stage, step_generator
from trainer.models.tokenizer import tokenize
from trainer.optimisation import Trainable
from trainer.sections import DenoiserSection

LatentBatch = Callable[[int, torch.Generator], tuple[Tensor, list[str]]]


class DenoiserStage(Stage):
    """Denoising loss with stratified t, caption dropout for classifier-free guidance, EMA on both networks.

    Args:
        latents: draws (latent_BCHW, captions); the captions' dropout happens here.
    """

    def __init__(self, section: DenoiserSection, tokenizer: CLIPTokenizer, latents: LatentBatch, seed: int) -> None:
        torch.manual_seed(seed)
        self.section, self.tokenizer, self.latents, self.seed, self.steps = section, tokenizer, latents, seed, section.steps
        self.scheduler = DDIMScheduler(**section.scheduler)
        self.diffusion = Diffusion(self.scheduler.config)
        self.unet = UNet2DConditionModel(**section.unet).to(memory_format=torch.channels_last)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
        self.text = CLIPTextModel(CLIPTextConfig(**section.text, **special, **size))
        both = torch.nn.ModuleDict({"unet": self.unet, "text_encoder": self.text})
        self.trainables = {"denoiser": Trainable(both, section.schedule(), weight_decay=0.0, ema_decay=section.ema)}
        self._ids: dict[str, Tensor] = {}

    def _tokens(self, captions: list[str]) -> Tensor:
        for caption in captions:
            if caption not in self._ids:
                self._ids[caption] = tokenize(self.tokenizer, [caption])[0]
        return torch.stack([self._ids[caption] for caption in captions])

    def step(self, index: int) -> dict[str, Tensor | float]:
        generator, batch = step_generator(self.seed, index), self.section.batch
        latent_BCHW, captions = self.latents(batch, generator)
        dropped = torch.rand(batch, generator=generator) < self.section.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        t_B = stratified_timesteps(batch, 0, self.diffusion.timesteps, generator)
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
