"""Stage 3: feature-matching warm-up of one-step generation (eq. 10) on (noise, teacher sample) pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.diffusion import Diffusion
from trainer.loop import Stage, Trainable
from trainer.objectives.feature_matching import feature_matching
from trainer.stages.context import EncoderFeatures, OneStep, StageContext, load_student
from trainer.teacher import TextEncoder


class WarmupStage(Stage):
    """The shrunk U-Net learns to land on the teacher's multi-step sample of the same noise, compared by structure, not by pixel."""

    def __init__(self, context: StageContext) -> None:
        section = context.recipe.warmup
        self.context, self.section, self.steps = context, section, section.steps
        self.student = load_student(context.inputs["unet"])
        text = TextEncoder(context.teacher_folder)
        self.generate = OneStep(self.student, text, Diffusion.of(context.teacher_folder))
        self.features = EncoderFeatures(context.teacher_folder, text)
        self.trainables = {"unet": Trainable(self.student, section.schedule(), ema_decay=section.ema)}

    def step(self, index: int) -> dict[str, Tensor | float]:
        noise_BCHW, target_BCHW, captions = self.context.pairs.draw(self.section.batch, self.context.generator(index))
        output_BCHW = self.generate(noise_BCHW, captions)
        with torch.no_grad():
            target_features = self.features(target_BCHW, captions)
        matching = feature_matching(self.features(output_BCHW, captions), target_features, self.section.feature_weights)
        l2 = F.mse_loss(output_BCHW, target_BCHW)
        loss = matching + self.section.latent_l2 * l2
        self.trainables["unet"].update(loss, index)
        return {"loss": loss, "feature_matching": matching, "latent_l2": l2}

    def export(self, folder: Path) -> None:
        self.student.load_state_dict(self.trainables["unet"].averaged())
        self.student.save_pretrained(folder / "unet")
