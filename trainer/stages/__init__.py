"""One file per training stage; `STAGES` names those that run on Ray."""

from __future__ import annotations

from collections.abc import Callable

from trainer.loop import Stage
from trainer.stages.context import StageContext
from trainer.stages.control_one_step import ControlDiffInstructStage, ControlWarmupStage
from trainer.stages.control_shrink import ControlShrinkStage
from trainer.stages.controlnet import ControlNetStage
from trainer.stages.decoder import DecoderStage
from trainer.stages.diff_instruct import DiffInstructStage
from trainer.stages.finish import FinishStage
from trainer.stages.straighten import StraightenStage
from trainer.stages.style import StyleStage
from trainer.stages.unet import UNetStage
from trainer.stages.warmup import WarmupStage

STAGES: dict[str, Callable[[StageContext], Stage]] = {
    "straighten": StraightenStage,
    "decoder": DecoderStage,
    "unet": UNetStage,
    "warmup": WarmupStage,
    "diff_instruct": DiffInstructStage,
    "finish": FinishStage,
    "style": StyleStage,
    "controlnet": ControlNetStage,
    "control_shrink": ControlShrinkStage,
    "control_warmup": ControlWarmupStage,
    "control_diff_instruct": ControlDiffInstructStage,
}
