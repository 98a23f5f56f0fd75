"""Who answers a stage's requests, as plain data: Ray's own processes unpickle it, and none of them needs a model library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.sections import LoraSection


@dataclass(frozen=True)
class TeacherSpec:
    """A source as `teacher_folder` takes, the type its networks compute in, a style LoRA merged into them, where embeddings are kept, and
    the digest of a straightened U-Net that takes the place of the source's own, and a ControlNet that goes with it."""

    source: str
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    lora: LoraSection | None = None
    embeddings: Literal["memory", "disk"] = "memory"
    straightened: str | None = None
    controlnet: str | None = None
