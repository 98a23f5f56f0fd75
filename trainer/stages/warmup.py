"""Feature-matching warm-up of one-step generation (eq. 10) on (noise, teacher sample) pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.diffusion import Diffusion
from trainer.loop import Stage
from trainer.objectives.feature_matching import feature_matching
from trainer.optimisation import Losses, stage_trainable
from trainer.placement import Deal, Turn
from trainer.recipe import DistillRecipe
from trainer.sections import MatchingSection, WarmupSection
from trainer.stages.context import OneStep, StageContext, load_student, save_student
from trainer.stages.encoders import Features, encoder_of


class Matching:
    """Eq. 10 of a section, and a plain L2 on the latent beside it."""

    def __init__(self, section: MatchingSection, features: Features) -> None:
        self.section, self.features = section, features

    def __call__(self, x0_BCHW: Tensor, target_BCHW: Tensor, captions: list[str]) -> Losses:
        """The terms and, as "loss", their weighted sum."""
        with torch.no_grad():
            target_features = self.features(target_BCHW, captions)
        matching = feature_matching(self.features(x0_BCHW, captions), target_features, self.section.feature_weights)
        l2 = F.mse_loss(x0_BCHW, target_BCHW)
        return {"loss": matching + self.section.latent_l2 * l2, "feature_matching": matching, "latent_l2": l2}


class WarmupStage(Stage):
    """The shrunk U-Net learns to land on the teacher's multi-step sample of the same noise, compared by structure, not by pixel."""

    def __init__(self, context: StageContext) -> None:
        section = self.section_of(context)
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        self.student = self.load(context)
        self.trainables = {"unet": stage_trainable(self.student, section, context.placement)}
        text, diffusion = context.text_encoder(), Diffusion.of(context.teacher_folder)
        self.generate = OneStep(self.trainables["unet"].module, text, diffusion, context.placement)
        self.matching = Matching(section, encoder_of(section, context, text))

    @staticmethod
    def section_of(context: StageContext) -> WarmupSection:
        assert isinstance(context.recipe, DistillRecipe)
        assert context.recipe.warmup is not None
        return context.recipe.warmup

    @staticmethod
    def load(context: StageContext) -> nn.Module:
        """The student as the stage before left it."""
        student: nn.Module = load_student(context.inputs["unet"])
        return student

    def step(self, index: int) -> Losses:
        return self.trainables["unet"].learn(self.deal.turns(index), self._losses)

    def _losses(self, turn: Turn) -> Losses:
        batch = self.context.draw(turn, self.deal.size)
        x0_BCHW = self.generate(self.generate.start(batch, self.section), batch.captions, batch.control_BHWC)
        return self.matching(x0_BCHW, batch.target_BCHW, batch.captions)

    def export(self, folder: Path) -> None:
        save_student(self.student, self.trainables["unet"].averaged(), folder)
