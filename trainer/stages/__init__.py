"""One file per training stage; `STAGES` names those of a distillation."""

from __future__ import annotations

from collections.abc import Callable

from trainer.loop import Stage
from trainer.stages.context import StageContext
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
}
