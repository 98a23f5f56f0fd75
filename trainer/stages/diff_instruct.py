"""Stage 4: Segmented Diff-Instruct (eqs. 11-12, Alg. 1): the one-step student against an offline and an online score."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Schedule, Stage, Trainable
from trainer.objectives.diff_instruct import denoising_loss, diff_instruct, linear_schedule, score_gradient, segment_end
from trainer.objectives.feature_matching import feature_matching
from trainer.stages.context import EncoderFeatures, OneStep, StageContext, load_student
from trainer.teacher import Denoise, TextEncoder, compact


class DiffInstructStage(Stage):
    """Each step: the student generates; the pool is asked for the offline score of the diffused result; meanwhile the online model
    learns the student's distribution and gives its score; then the student moves along their difference plus feature matching."""

    def __init__(self, context: StageContext) -> None:
        section = context.recipe.diff_instruct
        assert section is not None
        self.context, self.section, self.steps = context, section, section.steps
        self.student = load_student(context.inputs["warmup"])
        self.online = UNet2DConditionModel.from_pretrained(context.teacher_folder / "unet", torch_dtype=torch.float32)
        self.online.to(memory_format=torch.channels_last)
        self.text, self.diffusion = TextEncoder(context.teacher_folder), Diffusion.of(context.teacher_folder)
        self.generate = OneStep(self.student, self.text, self.diffusion)
        self.features = EncoderFeatures(context.teacher_folder, self.text)
        online = Schedule(section.steps, section.online_lr)
        self.trainables = {
            "unet": Trainable(self.student, section.schedule(), betas=section.betas, clip=10.0, ema_decay=section.ema),
            "online": Trainable(self.online, online, betas=section.betas, clip=10.0),
        }

    def step(self, index: int) -> dict[str, Tensor | float]:
        section, generator = self.section, self.context.generator(index)
        noise_BCHW, target_BCHW, captions = self.context.pairs.draw(section.batch, generator)
        x0_BCHW = self.generate(noise_BCHW, captions)
        alpha = linear_schedule(*section.alpha, index, section.steps)
        end = segment_end(alpha, self.diffusion.timesteps)
        low = min(round(section.t_min * self.diffusion.timesteps), end - 1)
        t_B = stratified_timesteps(len(captions), low, end, generator)
        noisy_BCHW = self.diffusion.diffuse(x0_BCHW.detach(), torch.randn(x0_BCHW.shape, generator=generator), t_B)
        pending = self.context.teacher.submit(Denoise(compact(noisy_BCHW), t_B.numpy(), captions, section.guidance))
        online_loss = self._train_online(x0_BCHW.detach(), captions, index, generator)
        online_x0 = self._online_x0(noisy_BCHW, t_B, captions)
        offline_output = torch.from_numpy(pending.result()[0].astype("float32"))
        offline_x0 = self.diffusion.x0(noisy_BCHW, offline_output, t_B)
        gradient_BCHW = score_gradient(x0_BCHW.detach(), offline_x0, online_x0)
        score_loss = diff_instruct(x0_BCHW, gradient_BCHW)
        matching = self._matching(x0_BCHW, target_BCHW, captions)
        lambda_fm = linear_schedule(*section.lambda_fm, index, section.steps)
        loss = score_loss + lambda_fm * matching
        self.trainables["unet"].update(loss, index)
        return {
            "loss": loss, "score_gradient": gradient_BCHW.square().mean().sqrt(), "feature_matching": matching,
            "online": online_loss, "alpha": alpha, "lambda_fm": lambda_fm,
        }  # fmt: skip

    def _train_online(self, x0_BCHW: Tensor, captions: list[str], index: int, generator: torch.Generator) -> Tensor:
        """`online_ratio` denoising updates on student samples, over all t."""
        for repeat in range(self.section.online_ratio):
            t_B = stratified_timesteps(len(captions), 0, self.diffusion.timesteps, generator)
            noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
            noisy_BCHW = self.diffusion.diffuse(x0_BCHW, noise_BCHW, t_B).contiguous(memory_format=torch.channels_last)
            output_BCHW = self.online(noisy_BCHW, t_B, self.text.encode(captions)).sample
            loss = denoising_loss(output_BCHW, self.diffusion.target(x0_BCHW, noise_BCHW, t_B))
            self.trainables["online"].update(loss, index)
            if repeat + 1 < self.section.online_ratio:
                with torch.no_grad():
                    noise, _, captions = self.context.pairs.draw(self.section.batch, generator)
                    x0_BCHW = self.generate(noise, captions)
        return loss

    @torch.no_grad()
    def _online_x0(self, noisy_BCHW: Tensor, t_B: Tensor, captions: list[str]) -> Tensor:
        output_BCHW = self.online(noisy_BCHW, t_B, self.text.encode(captions)).sample
        return self.diffusion.x0(noisy_BCHW, output_BCHW, t_B)

    def _matching(self, x0_BCHW: Tensor, target_BCHW: Tensor, captions: list[str]) -> Tensor:
        with torch.no_grad():
            target_features = self.features(target_BCHW, captions)
        matching = feature_matching(self.features(x0_BCHW, captions), target_features, self.section.feature_weights)
        return matching + self.section.latent_l2 * F.mse_loss(x0_BCHW, target_BCHW)

    def export(self, folder: Path) -> None:
        self.student.load_state_dict(self.trainables["unet"].averaged())
        self.student.save_pretrained(folder / "unet")
