"""One file per training stage. `STAGES` names the distillation stages in their order."""

from __future__ import annotations

from collections.abc import Callable

from trainer.loop import Stage
from trainer.stages.context import StageContext
from trainer.stages.decoder import DecoderStage
from trainer.stages.diff_instruct import DiffInstructStage
from trainer.stages.unet import UNetStage
from trainer.stages.warmup import WarmupStage

STAGES: dict[str, Callable[[StageContext], Stage]] = {
    "decoder": DecoderStage,
    "unet": UNetStage,
    "warmup": WarmupStage,
    "diff_instruct": DiffInstructStage,
}
