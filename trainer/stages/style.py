"""Style transfer: a finished student learns a LoRA from an offline model that carries the style's; no warm-up (paper, style LoRA)."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel

from trainer.models import lora
from trainer.recipe import StyleRecipe
from trainer.sections import StyleSection
from trainer.stages.context import StageContext, load_student, save_network
from trainer.stages.diff_instruct import DiffInstructStage


class StyleStage(DiffInstructStage):
    """Diff-Instruct on a LoRA of the student. The style is in the offline model only, so the difference of the scores is the style."""

    section: StyleSection

    @staticmethod
    def section_of(context: StageContext) -> StyleSection:
        assert isinstance(context.recipe, StyleRecipe)
        return context.recipe.lora

    @staticmethod
    def load(context: StageContext) -> UNet2DConditionModel:
        """The base bundle's U-Net, frozen, with a new LoRA."""
        section = StyleStage.section_of(context)
        student = load_student(context.inputs["base"])
        lora.attach(student, section.rank, section.lora_alpha)
        return student

    def export(self, folder: Path) -> None:
        """`lora/`, which diffusers loads on the base's U-Net, and `unet/` with it folded in."""
        weights = self.trainables["unet"].averaged()
        lora.save_adapter(weights, folder / "lora", self.section.rank, self.section.lora_alpha)
        whole = lora.folded(weights, self.section.rank, self.section.lora_alpha)
        save_network(UNet2DConditionModel, self.student.config, whole, folder / "unet")
