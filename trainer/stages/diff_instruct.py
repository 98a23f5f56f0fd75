"""Segmented Diff-Instruct (eqs. 11-12, Alg. 1): the one-step student against an offline and an online score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer.diffusion import Diffusion
from trainer.loop import Stage, average_over_workers
from trainer.objectives.diff_instruct import segment_end
from trainer.objectives.schedules import AdaptiveProgress, interpolate, progress
from trainer.optimisation import Losses, Trainable
from trainer.placement import Deal, Turn, frozen
from trainer.plan import offline_spec
from trainer.recipe import ControlNetRecipe, DistillRecipe
from trainer.sections import DiffInstructSection
from trainer.sources import load_frozen, teacher_folder
from trainer.stages.context import Batch, OneStep, StageContext, load_student, received, save_student
from trainer.stages.encoders import encoder_of
from trainer.stages.online import OnlineModel
from trainer.stages.scores import DecoupledDmd, DiffInstruct, Draft, ScoreIdentity, ScoreObjective
from trainer.stages.warmup import Matching
from trainer.teacher import Pending, Teacher

DEPTH = 4  # micro-batches asked for ahead of the one at work


class DiffInstructStage(Stage):
    """Each step: the student generates; the pool is asked for the offline score of the diffused results; meanwhile the online model
    learns the student's distribution; then the student moves along the difference of both scores plus feature matching."""

    def __init__(self, context: StageContext) -> None:
        section = self.section_of(context)
        torch.manual_seed(context.recipe.seed)  # of new layers: a LoRA, a classifier
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        self.student = self.load(context)
        self.text, self.diffusion = context.text_encoder(), Diffusion.of(context.teacher_folder)
        self.online = OnlineModel(section, context, self.text, self.online_network(context))
        self.objective = self._objective()
        self.matching = Matching(section, encoder_of(section, context, self.text)) if max(section.lambda_fm) > 0 else None
        self.adaptive = AdaptiveProgress(*section.overlap) if section.schedule_shape == "adaptive" else None
        self.trainables = {"unet": self._trainable(), "online": self.online.trainable}
        self.generate = OneStep(self.trainables["unet"].module, self.text, self.diffusion, context.placement)
        self._asked: dict[int, list[Pending]] = {}

    @staticmethod
    def section_of(context: StageContext) -> DiffInstructSection:
        assert isinstance(context.recipe, DistillRecipe)
        assert context.recipe.diff_instruct is not None
        return context.recipe.diff_instruct

    @staticmethod
    def load(context: StageContext) -> nn.Module:
        """The student as the stage before left it."""
        student: nn.Module = load_student(context.inputs.get("warmup") or context.inputs["unet"])
        return student

    @staticmethod
    def online_network(context: StageContext) -> nn.Module:
        """What the online model begins as."""
        network: nn.Module = offline_unet(context)
        return network

    def _trainable(self) -> Trainable:
        network: nn.Module = self.context.placement.place(self.student)
        section = self.section
        return Trainable(
            network, section.schedule(), betas=section.betas, clip=10.0, ema_decay=section.ema, placement=self.context.placement
        )

    def _objective(self) -> ScoreObjective:
        section = self.section
        if section.decoupled is not None:
            return DecoupledDmd(section, self.diffusion, self.online.predict, section.decoupled)
        if section.sid is not None:
            assert not isinstance(self.context.recipe, ControlNetRecipe)
            offline = Teacher.load(offline_spec(self.context.recipe), self.context.placement.device)
            return ScoreIdentity(section, self.diffusion, self.online.predict, section.sid, offline)
        return DiffInstruct(section, self.diffusion, self.online.predict)

    def step(self, index: int) -> Losses:
        moved = self._progress(index)
        alpha, lambda_fm = (interpolate(*bounds, moved) for bounds in (self.section.alpha, self.section.lambda_fm))
        turns = self.deal.turns(index)
        drafts = self._drafts(turns, segment_end(alpha, self.diffusion.timesteps))
        online = self._train_online(turns, drafts)
        metrics = self.trainables["unet"].learn(turns, lambda turn: self._losses(turn, drafts, lambda_fm))
        if self.adaptive is not None:
            self.adaptive.note(average_over_workers({"gap": float(metrics["gap"])})["gap"])
        extra = {"classifier": online["classifier"]} if "classifier" in online else {}
        return {**metrics, "online": online["loss"], **extra, "alpha": alpha, "lambda_fm": lambda_fm}

    def _progress(self, index: int) -> float:
        """How far alpha and lambda_FM have moved from their first values to their last, 0 to 1."""
        if self.adaptive is not None:
            return self.adaptive.value
        return progress(self.section.schedule_shape, index, self.steps)

    def _drafts(self, turns: list[Turn], end: int) -> dict[int, Draft]:
        """This step's student samples. A single one keeps its graph; of several it would not fit, so they are generated again later."""
        drafts = {}
        for turn in turns:
            batch = self.context.draw(turn, self.deal.size)
            start_BCHW = self.generate.start(batch, self.section)
            with torch.set_grad_enabled(len(turns) == 1):
                x0_BCHW = self.generate(start_BCHW, batch.captions, batch.control_BHWC)
            drafts[turn.sequence] = replace(self.objective.renoise(batch, x0_BCHW, end), start_BCHW=start_BCHW)
            if len(self._asked) < DEPTH:
                self._ask(turn.sequence, drafts)
        return drafts

    def _ask(self, sequence: int, drafts: dict[int, Draft]) -> None:
        requests = self.objective.ask(drafts[sequence])
        self._asked[sequence] = [self.context.teacher.submit(request) for request in requests]

    def _train_online(self, turns: list[Turn], drafts: dict[int, Draft]) -> Losses:
        """`online_ratio` updates on student samples, over all t; the first on this step's, the others on fresh ones."""
        learn = self.online.trainable.learn
        found = learn(
            turns, lambda turn: self.online.losses(drafts[turn.sequence].batch, drafts[turn.sequence].x0_BCHW.detach())
        )
        for _ in range(1, self.section.online_ratio):
            found = learn(turns, lambda turn: self.online.losses(*self._sampled(drafts[turn.sequence].batch.generator)))
        return found

    @torch.no_grad()
    def _sampled(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """The next batch, and the student's samples for it."""
        batch = self.context.draw_from(generator, self.deal.size)
        return batch, self.generate(self.generate.start(batch, self.section), batch.captions, batch.control_BHWC)

    def _losses(self, turn: Turn, drafts: dict[int, Draft], lambda_fm: float) -> Losses:
        draft = drafts[turn.sequence]
        ahead = turn.sequence + DEPTH
        if ahead in drafts:
            self._ask(ahead, drafts)
        x0_BCHW = draft.x0_BCHW
        if not x0_BCHW.requires_grad:
            assert draft.start_BCHW is not None
            x0_BCHW = self.generate(draft.start_BCHW, draft.batch.captions, draft.batch.control_BHWC)
        matched = self._matched(draft, x0_BCHW)  # before the replies are waited for
        replies = [received(pending)[0].to(x0_BCHW.device) for pending in self._asked.pop(turn.sequence)]
        with frozen(self.online.network):
            losses = self.objective.losses(draft, x0_BCHW, replies)
        losses |= self._realism(draft, x0_BCHW)
        total = losses["loss"]
        if "realism" in losses and self.section.latent_gan is not None:
            total = total + self.section.latent_gan.weight * losses["realism"]
        if matched is not None:
            losses["feature_matching"] = matched
            total = total + lambda_fm * matched
        return {**losses, "loss": total}

    def _matched(self, draft: Draft, x0_BCHW: Tensor) -> Tensor | None:
        """Eq. 10 with its L2, if lambda_FM is ever above 0."""
        if self.matching is None:
            return None
        loss = self.matching(x0_BCHW, draft.batch.target_BCHW, draft.batch.captions)["loss"]
        assert isinstance(loss, Tensor)
        return loss

    def _realism(self, draft: Draft, x0_BCHW: Tensor) -> Losses:
        if self.section.latent_gan is None:
            return {}
        renoised = draft.renoised
        noisy_BCHW = self.diffusion.diffuse(x0_BCHW, renoised.noise_BCHW, renoised.t_B)  # with the student's graph
        return {"realism": self.online.realism(noisy_BCHW, renoised.t_B, draft.batch)}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | ({"adaptive": self.adaptive.state_dict()} if self.adaptive is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.adaptive is not None:
            self.adaptive.load_state_dict(state["adaptive"])

    def export(self, folder: Path) -> None:
        save_student(self.student, self.trainables["unet"].averaged(), folder)


def offline_unet(context: StageContext) -> UNet2DConditionModel:
    """The online model's first weights: the offline model's, without the style's LoRA, which is never in the online model."""
    assert not isinstance(context.recipe, ControlNetRecipe)
    folder = teacher_folder(offline_spec(context.recipe).source)
    network: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet")
    return network.train().requires_grad_(True)
