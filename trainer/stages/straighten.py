"""LCM fine-tuning of the teacher's U-Net (arXiv:2310.04378): consistent along its paths, it draws in a few steps, on straighter ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.diffusion import Diffusion
from trainer.loop import Stage
from trainer.models import lora
from trainer.objectives.lcm import boundary_scalings, ddim_step, pseudo_huber
from trainer.optimisation import Losses, gathered, stage_trainable
from trainer.placement import Deal, Turn
from trainer.recipe import DistillRecipe
from trainer.sources import load_network
from trainer.stages.context import Ahead, Batch, Predictor, StageContext, save_network
from trainer.teacher import Denoise, Request, compact


class StraightenStage(Stage):
    """f_theta(x_{t_n+1}) learns to equal f_theta-(x_{t_n}), x_{t_n} being one guided DDIM step of the frozen teacher further."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.recipe, DistillRecipe)
        section, placement = context.recipe.straighten, context.placement
        assert section is not None
        torch.manual_seed(context.recipe.seed)
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        self.unet: Any = load_network(UNet2DConditionModel, context.teacher_folder / "unet")
        if section.lora_rank is not None:
            lora.attach(self.unet, section.lora_rank, targets=lora.EVERYWHERE)
        self.target = placement.place(copy.deepcopy(self.unet)).eval().requires_grad_(False)
        self.diffusion = Diffusion.of(context.teacher_folder)
        self.trainables = {"unet": stage_trainable(self.unet, section, placement)}
        text = context.text_encoder()
        self.online, self.slow = (
            Predictor(self.trainables["unet"].module, text, placement),
            Predictor(self.target, text, placement),
        )
        self.ahead = Ahead(context.teacher, self._draw, section.steps * self.deal.rounds)

    def _draw(self, number: int) -> tuple[tuple[Batch, Tensor, Tensor], Request]:
        """A sample diffused to a timestep of the grid; the teacher is asked for its guided output there."""
        batch = self.context.draw(self.deal.turn(number), self.deal.size)
        stride = self.diffusion.timesteps // self.section.grid
        t_B = torch.randint(1, self.section.grid + 1, (self.deal.size,), generator=batch.generator) * stride - 1
        noise_BCHW = torch.randn(batch.target_BCHW.shape, generator=batch.generator).to(batch.target_BCHW.device)
        noisy_BCHW = self.diffusion.diffuse(batch.target_BCHW, noise_BCHW, t_B)
        asked = Denoise(compact(noisy_BCHW), t_B.numpy(), batch.captions, self.section.guidance)
        return (batch, noisy_BCHW, t_B.to(noisy_BCHW.device)), asked

    def step(self, index: int) -> Losses:
        metrics = self.trainables["unet"].learn(self.deal.turns(index), self._losses)
        self._follow()
        return metrics

    def _losses(self, turn: Turn) -> Losses:
        (batch, noisy_BCHW, t_B), (output_BCHW,) = self.ahead.get(turn.sequence)
        before_B = t_B - self.diffusion.timesteps // self.section.grid
        with torch.no_grad():
            closer_BCHW = self._towards(noisy_BCHW, output_BCHW.to(noisy_BCHW.device), t_B, before_B)
            target_BCHW = self._consistency(self.slow, closer_BCHW, before_B.clamp_min(0), batch.captions)
            start = (before_B < 0).view(-1, 1, 1, 1)
            target_BCHW = torch.where(start, closer_BCHW, target_BCHW)  # f(x, 0) = x
        found_BCHW = self._consistency(self.online, noisy_BCHW, t_B, batch.captions)
        return {"loss": pseudo_huber(found_BCHW, target_BCHW, self.section.huber)}

    def _towards(self, noisy_BCHW: Tensor, output_BCHW: Tensor, t_B: Tensor, before_B: Tensor) -> Tensor:
        """One DDIM step of the teacher; before the first timestep lies the sample itself."""
        x0_BCHW = self.diffusion.x0(noisy_BCHW, output_BCHW, t_B)
        alpha, sigma = self.diffusion.coefficients(t_B, noisy_BCHW.device)
        noise_BCHW = (noisy_BCHW - alpha * x0_BCHW) / sigma
        next_alpha, next_sigma = self.diffusion.coefficients(before_B.clamp_min(0), noisy_BCHW.device)
        start = (before_B < 0).view(-1, 1, 1, 1)
        return ddim_step(x0_BCHW, noise_BCHW, torch.where(start, 1.0, next_alpha), torch.where(start, 0.0, next_sigma))

    def _consistency(self, predict: Predictor, x_BCHW: Tensor, t_B: Tensor, captions: list[str]) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x0_hat."""
        skip, out = boundary_scalings(t_B)
        return skip * x_BCHW + out * self.diffusion.x0(x_BCHW, predict(x_BCHW, t_B, captions), t_B)

    @torch.no_grad()
    def _follow(self) -> None:
        """theta- <- decay theta- + (1 - decay) theta."""
        learning = self.unet.state_dict()
        for name, value in self.target.state_dict().items():
            if value.is_floating_point():
                value.lerp_(gathered(learning[name]).to(value), 1 - self.section.target_ema)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"target": {name: value.cpu() for name, value in self.target.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.target.load_state_dict(state["target"])

    def export(self, folder: Path) -> None:
        weights = self.trainables["unet"].averaged()
        if self.section.lora_rank is not None:
            weights = lora.folded(weights, self.section.lora_rank)
        save_network(UNet2DConditionModel, self.unet.config, weights, folder / "unet")
