"""How offline and online scores move the student: the objectives that take each other's place in segmented Diff-Instruct.

Each says what the teacher has to be asked for a draft, ahead of time, and what follows from the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.objectives.decoupled import decoupled_gradient
from trainer.objectives.diff_instruct import diff_instruct, score_gradient
from trainer.objectives.schedules import overlap_gap
from trainer.objectives.sid import sid_loss
from trainer.optimisation import Losses
from trainer.sections import DecoupledSection, DiffInstructSection, SidSection
from trainer.stages.context import Batch, Predictor
from trainer.teacher import Denoise, Request, Teacher, compact, control_of


@dataclass(frozen=True)
class Renoised:
    """A student sample diffused to times t with this noise."""

    noisy_BCHW: Tensor
    t_B: Tensor
    noise_BCHW: Tensor

    def ask(self, batch: Batch, guidance: float = 1.0, captions: list[str] | None = None) -> Denoise:
        """For the teacher's output at it; by default under the batch's own captions."""
        captions = batch.captions if captions is None else captions
        return Denoise(compact(self.noisy_BCHW), self.t_B.cpu().numpy(), captions, guidance, control_BHWC=batch.control_BHWC)


@dataclass(frozen=True)
class Draft:
    """A student sample on its way: drawn batch, x0 (with its graph if it is still wanted), its re-noised form, and a second one."""

    batch: Batch
    x0_BCHW: Tensor
    renoised: Renoised
    augmented: Renoised | None = None
    start_BCHW: Tensor | None = None  # what the sample was generated from


class ScoreObjective(Protocol):
    """One way to turn two scores into a loss of the student's x0."""

    def renoise(self, batch: Batch, x0_BCHW: Tensor, end: int) -> Draft:
        """Draw times below `end` and noise for a student sample."""
        ...

    def ask(self, draft: Draft) -> list[Request]:
        """What the teacher has to answer."""
        ...

    def losses(self, draft: Draft, x0_BCHW: Tensor, replies: Sequence[Tensor]) -> Losses:
        """ "loss", and metrics: "score_gradient" (root mean square) and "gap" (of online and offline x0, relative)."""
        ...


class DiffInstruct:
    """Eqs. 11-12: w (x_on - x_off), both at the same x_t; the offline model with guidance."""

    def __init__(self, section: DiffInstructSection, diffusion: Diffusion, online: Predictor) -> None:
        self.section, self.diffusion, self.online = section, diffusion, online

    def renoise(self, batch: Batch, x0_BCHW: Tensor, end: int) -> Draft:
        low = min(round(self.section.t_min * self.diffusion.timesteps), end - 1)
        return Draft(batch, x0_BCHW, self._renoised(batch, x0_BCHW, low, end))

    def _renoised(self, batch: Batch, x0_BCHW: Tensor, low: int, end: int) -> Renoised:
        device = x0_BCHW.device
        t_B = stratified_timesteps(len(x0_BCHW), low, end, batch.generator).to(device)
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=batch.generator).to(device)
        return Renoised(self.diffusion.diffuse(x0_BCHW.detach(), noise_BCHW, t_B), t_B, noise_BCHW)

    def ask(self, draft: Draft) -> list[Request]:
        return [draft.renoised.ask(draft.batch, self.section.guidance)]

    def losses(self, draft: Draft, x0_BCHW: Tensor, replies: Sequence[Tensor]) -> Losses:
        offline_BCHW = self._x0(draft.renoised, replies[0])
        online_BCHW = self._online_x0(draft)
        gradient_BCHW = score_gradient(x0_BCHW.detach(), offline_BCHW, online_BCHW)
        return self._moved(x0_BCHW, gradient_BCHW, overlap_gap(x0_BCHW.detach(), offline_BCHW, online_BCHW))

    @torch.no_grad()
    def _online_x0(self, draft: Draft) -> Tensor:
        renoised = draft.renoised
        return self._x0(renoised, self._told(draft, renoised.noisy_BCHW))

    def _told(self, draft: Draft, noisy_BCHW: Tensor) -> Tensor:
        """The online model's output at the draft's times."""
        return self.online(noisy_BCHW, draft.renoised.t_B, draft.batch.captions, draft.batch.control_BHWC)

    def _x0(self, renoised: Renoised, output_BCHW: Tensor) -> Tensor:
        return self.diffusion.x0(renoised.noisy_BCHW, output_BCHW, renoised.t_B)

    @staticmethod
    def _moved(x0_BCHW: Tensor, gradient_BCHW: Tensor, gap: Tensor) -> Losses:
        return {
            "loss": diff_instruct(x0_BCHW, gradient_BCHW),
            "score_gradient": gradient_BCHW.square().mean().sqrt(),
            "gap": gap,
        }


class DecoupledDmd(DiffInstruct):
    """Decoupled DMD: matching at one re-noise draw, guidance at another (arXiv:2511.22677)."""

    def __init__(self, section: DiffInstructSection, diffusion: Diffusion, online: Predictor, bounds: DecoupledSection) -> None:
        super().__init__(section, diffusion, online)
        self.bounds = bounds

    def renoise(self, batch: Batch, x0_BCHW: Tensor, end: int) -> Draft:
        draft = super().renoise(batch, x0_BCHW, end)
        low, high = (round(bound * self.diffusion.timesteps) for bound in (self.bounds.t_low, self.bounds.t_high))
        return replace(draft, augmented=self._renoised(batch, x0_BCHW, low, high))

    def ask(self, draft: Draft) -> list[Request]:
        assert draft.augmented is not None
        batch, nothing = draft.batch, [""] * len(draft.batch.captions)
        return [draft.renoised.ask(batch), draft.augmented.ask(batch), draft.augmented.ask(batch, captions=nothing)]

    def losses(self, draft: Draft, x0_BCHW: Tensor, replies: Sequence[Tensor]) -> Losses:
        assert draft.augmented is not None
        offline_BCHW = self._x0(draft.renoised, replies[0])
        cond, uncond = (self._x0(draft.augmented, reply) for reply in replies[1:])
        online_BCHW = self._online_x0(draft)
        gradient_BCHW = decoupled_gradient(x0_BCHW.detach(), offline_BCHW, online_BCHW, (cond, uncond), self.section.guidance)
        return self._moved(x0_BCHW, gradient_BCHW, overlap_gap(x0_BCHW.detach(), offline_BCHW, online_BCHW))


class ScoreIdentity(DiffInstruct):
    """SiD: the gradient passes through both networks, so the offline one is here and not in the pool (arXiv:2404.04057)."""

    def __init__(
        self, section: DiffInstructSection, diffusion: Diffusion, online: Predictor, sid: SidSection, offline: Teacher
    ) -> None:
        super().__init__(section, diffusion, online)
        self.sid, self.offline = sid, offline

    def ask(self, draft: Draft) -> list[Request]:
        return []

    def losses(self, draft: Draft, x0_BCHW: Tensor, replies: Sequence[Tensor]) -> Losses:
        t_B, batch = draft.renoised.t_B, draft.batch
        noisy_BCHW = self.diffusion.diffuse(
            x0_BCHW, draft.renoised.noise_BCHW, t_B
        )  # the same x_t, now a function of the student
        control = control_of(batch.control_BHWC, noisy_BCHW.device)
        guided = self.offline.guided(batch.captions, self.section.guidance, control)
        offline = self.diffusion.x0(noisy_BCHW, guided(noisy_BCHW, t_B), t_B)
        online = self.diffusion.x0(noisy_BCHW, self._told(draft, noisy_BCHW), t_B)
        loss = sid_loss(x0_BCHW, offline, online, self.sid.alpha)
        gap = overlap_gap(x0_BCHW.detach(), offline.detach(), online.detach())
        return {"loss": loss, "score_gradient": (offline - online).detach().square().mean().sqrt(), "gap": gap}
