"""Stage 2: the U-Net shrunk by block removal, taught the teacher's outputs and features (eqs. 6-8)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Stage, Trainable
from trainer.objectives.distillation import feature_distillation, knowledge_distillation, output_distillation
from trainer.stages.context import Ahead, StageContext
from trainer.students import FeatureTap, feature_names, shrink
from trainer.teacher import Denoise, Request, TextEncoder, compact


class UNetStage(Stage):
    """x_t are diffused teacher samples, t over the whole range; the captions are dropped now and then, as in the teacher's training,
    so that the student keeps an unconditional mode."""

    caption_dropout = 0.1

    def __init__(self, context: StageContext) -> None:
        section = context.recipe.unet
        self.context, self.section, self.steps = context, section, section.steps
        teacher = UNet2DConditionModel.from_pretrained(context.teacher_folder / "unet", torch_dtype=torch.float32)
        self.student = shrink(teacher).to(memory_format=torch.channels_last)
        self.teacher_names, student_names = feature_names(self.student)
        self.tap = FeatureTap(self.student, student_names)
        self.text = TextEncoder(context.teacher_folder)
        self.diffusion = Diffusion.of(context.teacher_folder)
        self.trainables = {"unet": Trainable(self.student, section.schedule(), ema_decay=section.ema)}
        self.ahead = Ahead(context.teacher, self._draw, section.steps)

    def _draw(self, index: int) -> tuple[Denoise, Request]:
        generator = self.context.generator(index)
        _, latent_BCHW, captions = self.context.pairs.draw(self.section.batch, generator)
        dropped = torch.rand(len(captions), generator=generator) < self.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        t_B = stratified_timesteps(len(captions), 0, self.diffusion.timesteps, generator)
        noise_BCHW = torch.randn(latent_BCHW.shape, generator=generator)
        noisy_BCHW = compact(self.diffusion.diffuse(latent_BCHW, noise_BCHW, t_B))
        request = Denoise(noisy_BCHW, t_B.numpy(), captions, feature_names=tuple(self.teacher_names))
        return request, request

    def step(self, index: int) -> dict[str, Tensor | float]:
        asked, (teacher_output, *teacher_features) = self.ahead.get(index)
        noisy_BCHW = torch.from_numpy(asked.noisy_BCHW).float().contiguous(memory_format=torch.channels_last)
        output_BCHW = self.student(noisy_BCHW, torch.from_numpy(asked.t_B), self.text.encode(asked.captions)).sample
        output_loss = output_distillation(output_BCHW, teacher_output)
        feature_loss = feature_distillation(self.tap.take(), teacher_features)
        loss = knowledge_distillation(output_loss, feature_loss, self.section.feature_weight)
        self.trainables["unet"].update(loss, index)
        return {"loss": loss, "output": output_loss, "features": feature_loss}

    def export(self, folder: Path) -> None:
        self.student.load_state_dict(self.trainables["unet"].averaged())
        self.student.save_pretrained(folder / "unet")
