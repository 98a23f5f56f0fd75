"""The online model of Diff-Instruct: learns the student's distribution, and may classify real from generated on the side (DMD2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.models import lora
from trainer.models.controlnets import plain_unet
from trainer.models.discriminators import MidClassifier
from trainer.models.students import FeatureTap
from trainer.models.text import TextEncoder
from trainer.objectives.diff_instruct import denoising_loss
from trainer.objectives.gan import classifier_loss, generator_loss
from trainer.optimisation import Losses, Trainable
from trainer.placement import frozen
from trainer.schedule import Schedule
from trainer.sections import DiffInstructSection
from trainer.stages.context import Batch, Predictor, StageContext, told


class Classified(NamedTuple):
    """A U-Net's output, named as diffusers names it, and the classifier's."""

    sample: Tensor
    logits_B: Tensor


class Classifying(nn.Module):
    """A U-Net with a classifier on its deepest features: one forward call for both, which data-parallel training needs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        unet: UNet2DConditionModel = plain_unet(network)
        self.unet, self.classifier = network, MidClassifier(unet.config["block_out_channels"][-1])
        self._tap = FeatureTap(unet, ["mid_block" if unet.mid_block is not None else "down_blocks.-1"])

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, **conditioning: Any) -> Classified:
        output_BCHW: Tensor = self.unet(noisy_BCHW, t_B, **conditioning).sample
        return Classified(output_BCHW, self.classifier(self._tap.take()[0]))


class OnlineModel:
    """Starts as the offline model. All weights of its U-Net learn, or a LoRA on them; a ControlNet stays as it is."""

    def __init__(self, section: DiffInstructSection, context: StageContext, text: TextEncoder, network: nn.Module) -> None:
        self.section, self.context, self.text = section, context, text
        unet = plain_unet(network)
        self.diffusion = Diffusion.of(context.teacher_folder)
        placement = context.placement
        if section.online_lora_rank is not None:
            lora.attach(unet, section.online_lora_rank)
        self.network: nn.Module = Classifying(network) if section.latent_gan else network
        placement.place(unet)
        self.trainable = Trainable(
            self.network.to(placement.device), Schedule(section.steps * section.online_ratio, section.online_lr), betas=section.betas,
            clip=10.0, placement=placement, moments=section.online_optimizer,
        )  # fmt: skip
        self.predict = Predictor(self.network, text, placement)  # outside training: no averaging over workers

    def losses(self, batch: Batch, x0_BCHW: Tensor) -> Losses:
        """The denoising loss on student samples over all t (Alg. 1), and DMD2's classification of them against the teacher's."""
        noisy_BCHW, t_B, target_BCHW = self._diffused(batch, x0_BCHW)
        if self.section.latent_gan is None:
            return {"loss": denoising_loss(self._train(noisy_BCHW, t_B, batch), target_BCHW)}
        real_BCHW, _, _ = self._diffused(batch, batch.target_BCHW, t_B)
        output_BCHW, logits_2B = self._both(torch.cat([noisy_BCHW, real_BCHW]), torch.cat([t_B, t_B]), batch)
        fake_B, real_B = logits_2B.chunk(2)
        told = classifier_loss(real_B, fake_B)
        denoising = denoising_loss(output_BCHW.chunk(2)[0], target_BCHW)
        return {"loss": denoising + self.section.latent_gan.classifier_weight * told, "classifier": told}

    def realism(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch) -> Tensor:
        """The generator's side of the classification, differentiable to x_t; the online model stays as it is."""
        assert isinstance(self.network, Classifying)
        with frozen(self.network), self.context.placement.autocast():
            arguments = told(self.text, batch.captions, batch.control_BHWC, noisy_BCHW.device)
            _, logits_B = self.network(noisy_BCHW, t_B, **arguments)
        return generator_loss(logits_B.float())

    def _diffused(self, batch: Batch, x0_BCHW: Tensor, t_B: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and what the network should say of them."""
        device = x0_BCHW.device
        if t_B is None:
            t_B = stratified_timesteps(len(x0_BCHW), 0, self.diffusion.timesteps, batch.generator).to(device)
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=batch.generator).to(device)
        return self.diffusion.diffuse(x0_BCHW, noise_BCHW, t_B), t_B, self.diffusion.target(x0_BCHW, noise_BCHW, t_B)

    def _train(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch) -> Tensor:
        predict = Predictor(self.trainable.module, self.text, self.context.placement)
        return predict(noisy_BCHW, t_B, batch.captions, batch.control_BHWC)

    def _both(self, noisy_2BCHW: Tensor, t_2B: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of generated and real at once, each batch under the same captions and control images."""
        control = None if batch.control_BHWC is None else np.concatenate([batch.control_BHWC] * 2)
        arguments = told(self.text, batch.captions * 2, control, noisy_2BCHW.device)
        with self.context.placement.autocast():
            output_BCHW, logits_B = self.trainable.module(noisy_2BCHW, t_2B, **arguments)
        return output_BCHW.float(), logits_B.float()
