"""What every distillation stage is given, and the helpers more than one of them uses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer.conditions import condition_maps
from trainer.data.latent_cache import EncodedImages
from trainer.diffusion import Diffusion
from trainer.loop import step_generator
from trainer.models.controlnets import Controlled, as_condition, kind_of
from trainer.models.text import TextEncoder
from trainer.pairs import Pairs
from trainer.placement import Deal, Placement, Turn, worker_rank
from trainer.recipe import ControlRecipe, RunRecipe
from trainer.sections import MatchingSection
from trainer.sources import embeddings_folder
from trainer.teacher import Pending, Request, TeacherClient, image_size
from trainer.triplets import SampleImages

LAST_TIMESTEP = 999  # the single step starts here (paper: one step at t = 999, guidance 0)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of pairs on the worker's device, and the generator that drew it, for what else the turn draws. `control_BHWC`: maps
    extracted from the pairs' images, uint8, where the recipe is of a ControlNet."""

    noise_BCHW: Tensor
    target_BCHW: Tensor
    captions: list[str]
    generator: torch.Generator
    control_BHWC: np.ndarray | None = None


@dataclass(frozen=True)
class StageContext:
    """Inputs of one stage on one worker. `inputs` maps upstream stage names to folders with their exported results."""

    recipe: RunRecipe
    teacher_folder: Path
    teacher: TeacherClient
    pairs: Pairs
    inputs: dict[str, Path]
    placement: Placement = field(default_factory=Placement)
    images: EncodedImages | None = None  # real ones, where the recipe has them for this stage
    sample_images: SampleImages | None = None  # of the pairs, for control images

    def draw(self, turn: Turn, size: int) -> Batch:
        """The pairs of a turn: a function of seed, step and micro-batch alone, not of worker or device."""
        return self.draw_from(step_generator(self.recipe.seed, turn.index, turn.micro), size)

    def draw_from(self, generator: torch.Generator, size: int) -> Batch:
        """The next pairs that a generator draws."""
        rows = self.pairs.rows(size, generator)
        noise_BCHW, target_BCHW, captions = self.pairs.take(rows)
        device = self.placement.device
        return Batch(noise_BCHW.to(device), target_BCHW.to(device), captions, generator, self._control(rows, generator))

    def _control(self, rows: Tensor, generator: torch.Generator) -> np.ndarray | None:
        """Control images of pairs, each of a kind that is drawn."""
        if self.sample_images is None:
            return None
        assert isinstance(self.recipe, ControlRecipe)
        return condition_maps(self.sample_images.take(rows), self.recipe.conditions, generator)

    def draw_latents(self, turn: Turn, size: int) -> Batch:
        """Latents to diffuse: of real images where there are some, else the teacher's samples."""
        if self.images is None:
            return self.draw(turn, size)
        generator = step_generator(self.recipe.seed, turn.index, turn.micro)
        latent_BCHW, captions = self.images.draw(size, generator)
        return Batch(torch.empty(0), latent_BCHW.to(self.placement.device), captions, generator)

    def text_encoder(self) -> TextEncoder:
        """The teacher's, on this worker's device."""
        unet = UNet2DConditionModel.load_config(self.teacher_folder / "unet")
        vae = UNet2DConditionModel.load_config(self.teacher_folder / "vae")
        kept = embeddings_folder() if self.recipe.compute.embeddings == "disk" else None
        return TextEncoder(self.teacher_folder, self.placement.device, image_size(unet, vae), kept)


T = TypeVar("T")


class Ahead(Generic[T]):
    """Keeps `depth` requests of future micro-batches in flight, so that the teacher works while the worker does.

    `draw` must be a function of the number alone: a resumed run then asks for exactly what an unbroken one would.
    """

    def __init__(self, client: TeacherClient, draw: Callable[[int], tuple[T, Request]], count: int, depth: int = 3) -> None:
        self.client, self.draw, self.count, self.depth = client, draw, count, depth
        self._waiting: deque[tuple[int, T, Pending]] = deque()

    def get(self, number: int) -> tuple[T, list[Tensor]]:
        """What `draw` kept for micro-batch `number`, and the teacher's reply as float32 tensors."""
        following = self._waiting[-1][0] + 1 if self._waiting else number
        for one in range(following, min(self.count, number + self.depth + 1)):
            kept, request = self.draw(one)
            self._waiting.append((one, kept, self.client.submit(request)))
        first, kept, pending = self._waiting.popleft()
        if first != number:
            raise RuntimeError(f"micro-batches must be asked for in order: expected {first}, got {number}")
        return kept, received(pending)


def received(pending: Pending) -> list[Tensor]:
    """A reply as float32 tensors."""
    return [torch.from_numpy(np.array(part, dtype=np.float32)) for part in pending.result()]


class Predictor:
    """A U-Net as the stages call it: by captions, and control images if it has a ControlNet, in the worker's precision, float32 out."""

    def __init__(self, module: nn.Module, text: TextEncoder, placement: Placement) -> None:
        self.module, self.text, self.placement = module, text, placement

    def __call__(self, noisy_BCHW: Tensor, t_B: Tensor, captions: list[str], control_BHWC: np.ndarray | None = None) -> Tensor:
        """The network's output, shape (B, C, H, W)."""
        arguments = told(self.text, captions, control_BHWC, noisy_BCHW.device)
        with self.placement.autocast():
            noisy_BCHW = noisy_BCHW.contiguous(memory_format=torch.channels_last)
            output: Tensor = self.module(noisy_BCHW, t_B.to(noisy_BCHW.device), **arguments).sample
        return output.float()


def told(text: TextEncoder, captions: list[str], control_BHWC: np.ndarray | None, device: torch.device) -> dict[str, Any]:
    """What a network is told beside x_t and t: keyword arguments of a U-Net, or of a `Controlled` one."""
    control = {} if control_BHWC is None else {"control_BCHW": as_condition(control_BHWC, device)}
    return {**text.encode(captions).arguments(), **control}


class OneStep:
    """x_theta(eps): the student's one-step generation, differentiable."""

    def __init__(self, student: nn.Module, text: TextEncoder, diffusion: Diffusion, placement: Placement | None = None) -> None:
        self.predict, self.diffusion = Predictor(student, text, placement or Placement()), diffusion

    def __call__(self, noise_BCHW: Tensor, captions: list[str], control_BHWC: np.ndarray | None = None) -> Tensor:
        """Latents from unit noise, shape (B, C, H, W), formed in float32."""
        t_B = torch.full((len(noise_BCHW),), LAST_TIMESTEP, device=noise_BCHW.device)
        return self.diffusion.x0(noise_BCHW, self.predict(noise_BCHW, t_B, captions, control_BHWC), t_B)

    def start(self, batch: Batch, section: MatchingSection) -> Tensor:
        """What the student is fed with in training: the noise, or the teacher's sample diffused to t = 999 with it (paper, figures). Part
        of the noise may be fresh."""
        noise_BCHW, fresh = batch.noise_BCHW, section.fresh_noise
        if fresh:
            drawn_BCHW = torch.randn(noise_BCHW.shape, generator=batch.generator).to(noise_BCHW.device)
            noise_BCHW = (1 - fresh) ** 0.5 * noise_BCHW + fresh**0.5 * drawn_BCHW
        if section.student_input == "noise":
            return noise_BCHW
        t_B = torch.full((len(noise_BCHW),), LAST_TIMESTEP, device=noise_BCHW.device)
        return self.diffusion.diffuse(batch.target_BCHW, noise_BCHW, t_B)


def load_student(folder: Path) -> UNet2DConditionModel:
    """A trainable student U-Net from an upstream stage's result or a bundle."""
    student: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return student


def save_student(student: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """A stage's result: `unet/`, or of a controlled student `controlnet/`, its U-Net being the base's."""
    if isinstance(student, Controlled):
        config: dict[str, Any] = dict(student.controlnet.config)  # type: ignore[arg-type]
        save_network(kind_of(config), config, student.weights(weights), folder / "controlnet")
    else:
        save_network(UNet2DConditionModel, student.config, weights, folder / "unet")


def save_network(kind: type, config: object, weights: dict[str, Tensor], folder: Path) -> None:
    """Write whole weights in diffusers format; on the first worker only."""
    if worker_rank():
        return
    with torch.device("meta"):
        network = kind.from_config(config)  # type: ignore[attr-defined]
    network.load_state_dict(weights, assign=True)
    network.save_pretrained(folder)


__all__ = [
    "Ahead", "Batch", "Deal", "OneStep", "Predictor", "StageContext", "load_student", "received", "save_network", "save_student", "told",
]  # fmt: skip
