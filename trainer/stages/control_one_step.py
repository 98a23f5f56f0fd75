"""One step with a ControlNet: the base bundle's U-Net stays as it is, its ControlNet learns by the warm-up and by Diff-Instruct."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from trainer.models.controlnets import Controlled, load_controlnet
from trainer.recipe import ControlRecipe
from trainer.sections import DiffInstructSection, WarmupSection
from trainer.sources import controlnet_folder
from trainer.stages.context import StageContext, load_student
from trainer.stages.diff_instruct import DiffInstructStage, offline_unet
from trainer.stages.warmup import WarmupStage


def controlled_base(context: StageContext, controlnet: Path) -> Controlled:
    """The base bundle's U-Net, frozen, and a ControlNet that learns."""
    unet = load_student(context.inputs["base"]).requires_grad_(False)
    return Controlled(context.placement.place(unet), load_controlnet(controlnet / "controlnet").train().requires_grad_(True))


class ControlWarmupStage(WarmupStage):
    """Eq. 10 on triplets: noise, the teacher's sample of it, and a control image extracted from that sample."""

    @staticmethod
    def section_of(context: StageContext) -> WarmupSection:
        assert isinstance(context.recipe, ControlRecipe)
        assert context.recipe.warmup is not None
        return context.recipe.warmup

    @staticmethod
    def load(context: StageContext) -> nn.Module:
        return controlled_base(context, context.inputs["control_shrink"])


class ControlDiffInstructStage(DiffInstructStage):
    """Eqs. 11-12 with the teacher's ControlNet, frozen, attached to the offline model, in the pool, and to the online one, here."""

    @staticmethod
    def section_of(context: StageContext) -> DiffInstructSection:
        assert isinstance(context.recipe, ControlRecipe)
        assert context.recipe.diff_instruct is not None
        return context.recipe.diff_instruct

    @staticmethod
    def load(context: StageContext) -> nn.Module:
        return controlled_base(context, context.inputs.get("control_warmup") or context.inputs["control_shrink"])

    @staticmethod
    def online_network(context: StageContext) -> nn.Module:
        assert isinstance(context.recipe, ControlRecipe)
        controlnet = load_controlnet(controlnet_folder(context.recipe.controlnet)).to(context.placement.device)
        return Controlled(offline_unet(context), controlnet)
