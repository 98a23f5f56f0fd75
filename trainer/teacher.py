"""The frozen multi-step teacher: what it can be asked, in this process (`Teacher`) or through a pool of actors (`trainer.pool`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.diffusion import Diffusion, sample
from trainer.students import FeatureTap
from trainer.tokenizer import tokenize

Array = np.ndarray


@dataclass(frozen=True)
class Denoise:
    """Ask for the network's output at x_t: shapes (B, C, H, W) and (B,); `guidance` 1 means conditional only."""

    noisy_BCHW: Array
    t_B: Array
    captions: list[str]
    guidance: float = 1.0
    feature_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Ask for multi-step samples psi(x_phi(eps)) of the given noise."""

    noise_BCHW: Array
    captions: list[str]
    steps: int
    guidance: float
    solver: str = "ddim"


@dataclass(frozen=True)
class Decode:
    """Ask for the teacher decoder's images of latents."""

    latent_BCHW: Array


Request = Denoise | Sample | Decode


class Pending(Protocol):
    """A reply on its way."""

    def result(self) -> list[Array]:
        """Block until the reply is there. Denoise: [output, *features]; Sample: [latent]; Decode: [image in [-1, 1]]."""
        ...


class TeacherClient(Protocol):
    """Whoever answers requests: one process or a pool."""

    def submit(self, request: Request) -> Pending:
        """Send a request without waiting."""
        ...


def hush() -> None:
    """No bars for loading weights that take milliseconds, no advice on configurations that diffusers wrote itself."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_frozen(kind: Any, folder: Path) -> Any:
    """A network of a diffusers or transformers folder in float32, in eval mode, without gradients."""
    return kind.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def compact(value: Tensor) -> Array:
    """float16 on the wire: half the bytes; the rounding is far below the noise of a training batch."""
    return value.detach().to(torch.float16).numpy()


class Teacher:
    """A diffusers text-to-image folder (unet, vae, text_encoder, tokenizer, scheduler), loaded once, answering requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet")
        self.unet.to(memory_format=torch.channels_last)
        self.vae: AutoencoderKL = load_frozen(AutoencoderKL, folder / "vae")
        self.text = TextEncoder(folder)
        self.scheduler_config = DDIMScheduler.from_pretrained(folder / "scheduler").config
        self.diffusion = Diffusion(self.scheduler_config)
        self._taps: dict[tuple[str, ...], FeatureTap] = {}

    def guided(self, captions: list[str], guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Network output with classifier-free guidance: out = uncond + guidance (cond - uncond); conditional only when it is 1."""
        text_BLD = self.text.encode(captions)
        if guidance == 1.0:
            return lambda x, t: self.unet(x, t, text_BLD).sample
        both_2BLD = torch.cat([self.text.encode([""] * len(captions)), text_BLD])

        def predict(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            uncond, cond = self.unet(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), both_2BLD).sample.chunk(2)
            guided: Tensor = uncond + guidance * (cond - uncond)
            return guided

        return predict

    @torch.no_grad()
    def answer(self, request: Request) -> list[Array]:
        """Compute a reply; see `Pending.result`."""
        if isinstance(request, Decode):
            return [compact(self.decode(torch.from_numpy(request.latent_BCHW).float()))]
        if isinstance(request, Sample):
            noise_BCHW = torch.from_numpy(request.noise_BCHW).float()
            predict = self.guided(request.captions, request.guidance)
            return [compact(sample(predict, noise_BCHW, self.scheduler_config, request.steps, request.solver))]
        tap = self._tap(request.feature_names)
        predict = self.guided(request.captions, request.guidance)
        output = predict(torch.from_numpy(request.noisy_BCHW).float(), torch.from_numpy(request.t_B))
        return [compact(output), *(compact(feature) for feature in tap.take())]

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] of latents in the diffusion model's scale."""
        image: Tensor = self.vae.decode(latent_BCHW / self.vae.config.scaling_factor).sample
        return image

    def _tap(self, names: tuple[str, ...]) -> FeatureTap:
        if names not in self._taps:
            self._taps[names] = FeatureTap(self.unet, list(names))
        return self._taps[names]


class TextEncoder:
    """The frozen text encoder that teacher and student share; embeddings are kept by caption."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.network: CLIPTextModel = load_frozen(CLIPTextModel, folder / "text_encoder")
        self._cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Last hidden states, shape (B, L, D)."""
        missing = [c for c in dict.fromkeys(captions) if c not in self._cache]
        if missing:
            states = self.network(tokenize(self.tokenizer, missing)).last_hidden_state
            self._cache.update(zip(missing, states.unbind(0), strict=True))
        return torch.stack([self._cache[c] for c in captions])


@dataclass(frozen=True)
class _Done:
    value: list[Array]

    def result(self) -> list[Array]:
        return self.value


class InProcessTeacher:
    """Answers at once in the caller's process: for one-machine runs without Ray and as the pool's reference in tests."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def submit(self, request: Request) -> Pending:
        return _Done(self.teacher.answer(request))
