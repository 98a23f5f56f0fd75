"""The student's ControlNet learns from the teacher's at every timestep: output and features of the up blocks, both U-Nets frozen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Stage
from trainer.models.controlnets import Controlled, load_controlnet, shrink_controlnet
from trainer.models.students import FeatureTap, feature_names
from trainer.objectives.distillation import feature_distillation, knowledge_distillation, output_distillation
from trainer.optimisation import Losses, stage_trainable
from trainer.placement import Deal, Turn
from trainer.recipe import ControlRecipe
from trainer.sources import controlnet_folder
from trainer.stages.context import Ahead, Predictor, StageContext, load_student, save_student
from trainer.teacher import Denoise, Request, compact


class ControlShrinkStage(Stage):
    """The loss is that of the U-Net's shrinking, on U-Net + ControlNet and never on the zero convolutions' outputs: what the small
    U-Net needs at its skips differs from what the large one does (paper, ControlNet)."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.recipe, ControlRecipe)
        section, placement = context.recipe.shrink, context.placement
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        unet = load_student(context.inputs["unet"]).requires_grad_(False)
        tiny = shrink_controlnet(load_controlnet(controlnet_folder(context.recipe.controlnet)), unet)
        self.student = Controlled(placement.place(unet), tiny)
        pairs = [(theirs, ours) for theirs, ours in zip(*feature_names(unet), strict=True) if ours.startswith("up_blocks")]
        self.teacher_names = tuple(theirs for theirs, _ in pairs)
        self.tap = FeatureTap(unet, [ours for _, ours in pairs])
        self.diffusion = Diffusion.of(context.teacher_folder)
        self.trainables = {"unet": stage_trainable(self.student, section, placement)}
        self.predict = Predictor(self.trainables["unet"].module, context.text_encoder(), placement)
        self.ahead = Ahead(context.teacher, self._draw, section.steps * self.deal.rounds)

    def _draw(self, number: int) -> tuple[Denoise, Request]:
        batch = self.context.draw(self.deal.turn(number), self.deal.size)
        t_B = stratified_timesteps(self.deal.size, 0, self.diffusion.timesteps, batch.generator)
        noise_BCHW = torch.randn(batch.target_BCHW.shape, generator=batch.generator).to(batch.target_BCHW.device)
        noisy_BCHW = compact(self.diffusion.diffuse(batch.target_BCHW, noise_BCHW, t_B))
        request = Denoise(
            noisy_BCHW, t_B.numpy(), batch.captions, feature_names=self.teacher_names, control_BHWC=batch.control_BHWC
        )
        return request, request

    def step(self, index: int) -> Losses:
        return self.trainables["unet"].learn(self.deal.turns(index), self._losses)

    def _losses(self, turn: Turn) -> Losses:
        asked, reply = self.ahead.get(turn.sequence)
        device = self.context.placement.device
        teacher_output, *teacher_features = [part.to(device) for part in reply]
        noisy_BCHW = torch.from_numpy(asked.noisy_BCHW).to(device).float()
        output_BCHW = self.predict(noisy_BCHW, torch.from_numpy(asked.t_B), asked.captions, asked.control_BHWC)
        output_loss = output_distillation(output_BCHW, teacher_output)
        features: list[Tensor] = [feature.float() for feature in self.tap.take()]
        feature_loss = feature_distillation(features, teacher_features)
        loss = knowledge_distillation(output_loss, feature_loss, self.section.feature_weight)
        return {"loss": loss, "output": output_loss, "features": feature_loss}

    def export(self, folder: Path) -> None:
        save_student(self.student, self.trainables["unet"].averaged(), folder)
