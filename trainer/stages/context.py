"""What every distillation stage is given, and the helpers more than one of them uses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.diffusion import Diffusion
from trainer.loop import step_generator
from trainer.pairs import Pairs
from trainer.recipe import DistillRecipe
from trainer.teacher import Pending, Request, TeacherClient, TextEncoder, load_frozen

LAST_TIMESTEP = 999  # the single step starts here (paper: one step at t = 999, guidance 0)


@dataclass(frozen=True)
class StageContext:
    """Inputs of one stage on one worker. `inputs` maps upstream stage names to folders with their exported results."""

    recipe: DistillRecipe
    teacher_folder: Path
    teacher: TeacherClient
    pairs: Pairs
    inputs: dict[str, Path]
    rank: int = 0

    def generator(self, index: int) -> torch.Generator:
        """The step's source of randomness on this worker."""
        return step_generator(self.recipe.seed, index, self.rank)


T = TypeVar("T")


class Ahead(Generic[T]):
    """Keeps `depth` requests of future steps in flight, so that the teacher works while the worker does.

    `draw` must be a function of the step index alone: a resumed run then asks for exactly what an unbroken one would.
    """

    def __init__(self, client: TeacherClient, draw: Callable[[int], tuple[T, Request]], steps: int, depth: int = 3) -> None:
        self.client, self.draw, self.steps, self.depth = client, draw, steps, depth
        self._waiting: deque[tuple[int, T, Pending]] = deque()

    def get(self, index: int) -> tuple[T, list[Tensor]]:
        """What `draw` kept for step `index`, and the teacher's reply as float32 tensors."""
        following = self._waiting[-1][0] + 1 if self._waiting else index
        for step in range(following, min(self.steps, index + self.depth + 1)):
            kept, request = self.draw(step)
            self._waiting.append((step, kept, self.client.submit(request)))
        step, kept, pending = self._waiting.popleft()
        if step != index:
            raise RuntimeError(f"steps must be asked for in order: expected {step}, got {index}")
        return kept, [torch.from_numpy(np.array(part, dtype=np.float32)) for part in pending.result()]


class OneStep:
    """x_theta(eps): the student's one-step generation, differentiable."""

    def __init__(self, student: UNet2DConditionModel, text: TextEncoder, diffusion: Diffusion) -> None:
        self.student, self.text, self.diffusion = student, text, diffusion

    def __call__(self, noise_BCHW: Tensor, captions: list[str]) -> Tensor:
        """Latents from unit noise, shape (B, C, H, W), formed in float32."""
        t_B = torch.full((len(noise_BCHW),), LAST_TIMESTEP)
        noise_BCHW = noise_BCHW.contiguous(memory_format=torch.channels_last)
        output_BCHW = self.student(noise_BCHW, t_B, self.text.encode(captions)).sample
        return self.diffusion.x0(noise_BCHW, output_BCHW, t_B)


class EncoderFeatures:
    """f^l of eq. 10 on latents: the latent itself, then the output of each down block of the teacher's U-Net at t = 0.

    Lives in the worker, not the pool, because gradients pass through it to the student.
    """

    def __init__(self, teacher_folder: Path, text: TextEncoder) -> None:
        unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, teacher_folder / "unet")
        unet.up_blocks, unet.mid_block = torch.nn.ModuleList(), None
        self.unet, self.text = unet.to(memory_format=torch.channels_last), text

    def __call__(self, latent_BCHW: Tensor, captions: list[str]) -> list[Tensor]:
        unet, text_BLD = self.unet, self.text.encode(captions)
        t_B = torch.zeros(len(latent_BCHW), dtype=torch.long)
        emb = unet.time_embedding(unet.get_time_embed(latent_BCHW, t_B))
        added = unet.get_aug_embed(emb, text_BLD, {})
        emb = emb if added is None else emb + added
        hidden_BCHW = unet.conv_in(latent_BCHW.contiguous(memory_format=torch.channels_last))
        features = [latent_BCHW]
        for block in unet.down_blocks:
            extra = {"encoder_hidden_states": text_BLD} if getattr(block, "has_cross_attention", False) else {}
            hidden_BCHW, _ = block(hidden_states=hidden_BCHW, temb=emb, **extra)
            features.append(hidden_BCHW)
        return features


def load_student(folder: Path) -> UNet2DConditionModel:
    """A trainable student U-Net from an upstream stage's result."""
    student: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return student.to(memory_format=torch.channels_last)
