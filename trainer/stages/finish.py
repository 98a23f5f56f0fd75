"""The GAN finish: a LoRA of an extremely low rank regains texture against projected discriminators (arXiv:2111.01007)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.diffusion import Diffusion
from trainer.loop import Stage
from trainer.models import lora
from trainer.models.discriminators import ProjectedDiscriminator
from trainer.objectives.gan import discriminator_hinge, generator_hinge
from trainer.optimisation import Losses, Trainable, stage_trainable
from trainer.placement import Deal, Turn, frozen
from trainer.recipe import DistillRecipe
from trainer.schedule import Schedule
from trainer.stages.context import Batch, OneStep, StageContext, load_student, save_network
from trainer.stages.encoders import encoder_of
from trainer.stages.warmup import Matching


class FinishStage(Stage):
    """All weights of the student stay but for the LoRA, which is folded into them at the end."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.recipe, DistillRecipe)
        section, placement = context.recipe.finish, context.placement
        assert section is not None
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        torch.manual_seed(context.recipe.seed)
        upstream = next(context.inputs[name] for name in ("diff_instruct", "warmup", "unet") if name in context.inputs)
        self.student = load_student(upstream)
        lora.attach(self.student, section.lora_rank, targets=lora.EVERYWHERE)
        text = context.text_encoder()
        features = encoder_of(section, context, text)
        self.text, self.matching = text, Matching(section, features)
        self.discriminator = ProjectedDiscriminator(
            features.encoder, self.student.config["cross_attention_dim"], section.discriminator_width
        )
        heads = Schedule(section.steps, section.discriminator_lr)
        self.trainables = {
            "unet": stage_trainable(self.student, section, placement),
            "discriminator": Trainable(
                self.discriminator.to(placement.device), heads, betas=(0.0, 0.99), weight_decay=0.0, placement=placement
            ),
        }
        self.generate = OneStep(self.trainables["unet"].module, text, Diffusion.of(context.teacher_folder), placement)
        self._made: dict[int, tuple[Batch, Tensor]] = {}

    def step(self, index: int) -> Losses:
        turns, self._made = self.deal.turns(index), {}
        metrics = self.trainables["unet"].learn(turns, self._losses)
        found = self.trainables["discriminator"].learn(turns, self._discriminator_losses)
        return metrics | {"discriminator": found["loss"]}

    def _losses(self, turn: Turn) -> Losses:
        batch = self.context.draw(turn, self.deal.size)
        x0_BCHW = self.generate(self.generate.start(batch, self.section), batch.captions)
        self._made[turn.sequence] = (batch, x0_BCHW.detach())
        with frozen(self.discriminator):
            realism = generator_hinge(self._logits(self.discriminator, x0_BCHW, batch.captions))
        matched = self.matching(x0_BCHW, batch.target_BCHW, batch.captions)
        loss = self.section.gan_weight * realism + self.section.anchor * matched["loss"]
        return {"loss": loss, "gan": realism, "feature_matching": matched["feature_matching"]}

    def _discriminator_losses(self, turn: Turn) -> Losses:
        batch, fake_BCHW = self._made[turn.sequence]
        judge = self.trainables["discriminator"].module
        both_2BCHW = torch.cat([batch.target_BCHW, fake_BCHW])
        halves = [level.chunk(2) for level in self._logits(judge, both_2BCHW, batch.captions * 2)]
        real, fake = ([half[side] for half in halves] for side in (0, 1))
        return {"loss": discriminator_hinge(real, fake)}

    def _logits(self, judge: torch.nn.Module, latent_BCHW: Tensor, captions: list[str]) -> list[Tensor]:
        with self.context.placement.autocast():
            found: list[Tensor] = judge(latent_BCHW, self.text.encode(captions))
        return [level.float() for level in found]

    def export(self, folder: Path) -> None:
        weights = self.trainables["unet"].averaged()
        save_network(UNet2DConditionModel, self.student.config, lora.folded(weights, self.section.lora_rank), folder / "unet")
        lora.save_adapter(weights, folder / "lora", self.section.lora_rank)
