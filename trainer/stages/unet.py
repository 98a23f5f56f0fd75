"""The U-Net shrunk by block removal, taught the teacher's outputs and features (eqs. 6-8)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Stage
from trainer.models.students import FeatureTap, feature_names, shrink
from trainer.objectives.distillation import feature_distillation, knowledge_distillation, output_distillation
from trainer.optimisation import Losses, stage_trainable
from trainer.placement import Deal, Turn
from trainer.recipe import ControlRecipe, DistillRecipe
from trainer.sources import load_network
from trainer.stages.context import Ahead, Predictor, StageContext, save_network
from trainer.teacher import Denoise, Request, compact


class UNetStage(Stage):
    """x_t are diffused teacher samples or real images, t over the whole range. Captions are dropped now and then, as in the teacher's
    training, so that the student keeps an unconditional mode."""

    caption_dropout = 0.1

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.recipe, (DistillRecipe, ControlRecipe))
        section, placement = context.recipe.unet, context.placement
        self.context, self.section, self.steps = context, section, section.steps
        teacher = load_network(UNet2DConditionModel, context.teacher_folder / "unet")
        self.student = shrink(teacher, context.recipe.student.blocks)
        del teacher
        self.teacher_names, student_names = feature_names(self.student)
        self.tap = FeatureTap(self.student, student_names)
        self.diffusion = Diffusion.of(context.teacher_folder)
        self.trainables = {"unet": stage_trainable(self.student, section, placement)}
        self.predict = Predictor(self.trainables["unet"].module, context.text_encoder(), placement)
        self.deal = Deal.of(section)
        self.ahead = Ahead(context.teacher, self._draw, section.steps * self.deal.rounds)

    def _draw(self, number: int) -> tuple[Denoise, Request]:
        batch = self.context.draw_latents(self.deal.turn(number), self.deal.size)
        dropped = torch.rand(self.deal.size, generator=batch.generator) < self.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped.tolist(), strict=True)]
        t_B = stratified_timesteps(self.deal.size, 0, self.diffusion.timesteps, batch.generator)
        noise_BCHW = torch.randn(batch.target_BCHW.shape, generator=batch.generator).to(batch.target_BCHW.device)
        noisy_BCHW = compact(self.diffusion.diffuse(batch.target_BCHW, noise_BCHW, t_B))
        request = Denoise(noisy_BCHW, t_B.numpy(), captions, feature_names=tuple(self.teacher_names))
        return request, request

    def step(self, index: int) -> Losses:
        return self.trainables["unet"].learn(self.deal.turns(index), self._losses)

    def _losses(self, turn: Turn) -> Losses:
        asked, reply = self.ahead.get(turn.sequence)
        device = self.context.placement.device
        teacher_output, *teacher_features = [part.to(device) for part in reply]
        noisy_BCHW = torch.from_numpy(asked.noisy_BCHW).to(device).float()
        output_BCHW = self.predict(noisy_BCHW, torch.from_numpy(asked.t_B), asked.captions)
        output_loss = output_distillation(output_BCHW, teacher_output)
        features: list[Tensor] = [feature.float() for feature in self.tap.take()]
        feature_loss = feature_distillation(features, teacher_features)
        loss = knowledge_distillation(output_loss, feature_loss, self.section.feature_weight)
        return {"loss": loss, "output": output_loss, "features": feature_loss}

    def export(self, folder: Path) -> None:
        save_network(UNet2DConditionModel, self.student.config, self.trainables["unet"].averaged(), folder / "unet")
