"""The frozen multi-step teacher: what it can be asked, in this process (`Teacher`) or through a pool of actors (`trainer.pool.client`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from trainer.artifacts import stage_folder
from trainer.diffusion import Diffusion, sample
from trainer.models.conditioning import Conditioning, concatenate, guidance_embedding
from trainer.models.controlnets import as_condition, load_controlnet, residuals
from trainer.models.lora import merge_lora
from trainer.models.students import FeatureTap
from trainer.models.text import TextEncoder
from trainer.sources import controlnet_folder, embeddings_folder, load_frozen, teacher_folder
from trainer.specs import TeacherSpec

Array = np.ndarray


@dataclass(frozen=True)
class Denoise:
    """Ask for the network's output at x_t: shapes (B, C, H, W) and (B,); `guidance` 1 means conditional only. With `control_BHWC`, maps in
    uint8, of the U-Net with its ControlNet."""

    noisy_BCHW: Array
    t_B: Array
    captions: list[str]
    guidance: float = 1.0
    feature_names: tuple[str, ...] = ()
    control_BHWC: Array | None = None
    control_scale: float = 1.0


@dataclass(frozen=True)
class Sample:
    """Ask for multi-step samples psi(x_phi(eps)) of the given noise."""

    noise_BCHW: Array
    captions: list[str]
    steps: int
    guidance: float
    solver: str = "ddim"
    control_BHWC: Array | None = None
    control_scale: float = 1.0


@dataclass(frozen=True)
class Decode:
    """Ask for the teacher decoder's images of latents."""

    latent_BCHW: Array


@dataclass(frozen=True)
class Encode:
    """Ask for the latents of images, uint8 (B, H, W, 3): means of the posterior, in the diffusion model's scale."""

    image_BHWC: Array


Request = Denoise | Sample | Decode | Encode


class Pending(Protocol):
    """A reply on its way."""

    def result(self) -> list[Array]:
        """Block until the reply is there. Denoise: [output, *features]; Sample, Encode: [latent]; Decode: [image in [-1, 1]]."""
        ...


class TeacherClient(Protocol):
    """Whoever answers requests: one process or a pool."""

    def submit(self, request: Request) -> Pending:
        """Send a request without waiting."""
        ...


def compact(value: Tensor) -> Array:
    """float16 on the wire: half the bytes; the rounding is far below the noise of a training batch."""
    return value.detach().to(torch.float16).cpu().numpy()


@dataclass(frozen=True)
class Control:
    """Maps in [0, 1], shape (B, 3, H, W), and how strongly they count."""

    map_BCHW: Tensor
    scale: float = 1.0


def control_of(map_BHWC: Array | None, device: torch.device | str, scale: float = 1.0) -> Control | None:
    """Maps in uint8 as networks take them; None of none."""
    return None if map_BHWC is None else Control(as_condition(map_BHWC, device), scale)


DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """A diffusers text-to-image folder (unet, vae, text encoders, tokenizers, scheduler), loaded once, answering requests.

    Networks compute in `dtype`; what is done with their outputs is float32.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        embeddings: Path | None = None,
    ) -> None:
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self.unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet", dtype)
        self.unet.to(self.device, memory_format=torch.channels_last)
        self.vae: AutoencoderKL = load_frozen(AutoencoderKL, folder / "vae").to(self.device)
        self.text = TextEncoder(folder, device, image_size(self.unet.config, self.vae.config), embeddings)
        self.scheduler_config = DDIMScheduler.from_pretrained(folder / "scheduler").config
        self.diffusion = Diffusion(self.scheduler_config)
        self.controlnet: Any = None
        self._taps: dict[tuple[str, ...], FeatureTap] = {}

    @classmethod
    def load(cls, spec: TeacherSpec, device: torch.device | str = "cpu") -> Teacher:
        """The networks of a spec, on a device."""
        kept = (
            embeddings_folder() if spec.embeddings == "disk" and spec.lora is None else None
        )  # a LoRA may change text encoders
        teacher = cls(teacher_folder(spec.source), device, DTYPES[spec.precision], kept)
        if spec.straightened is not None:
            teacher.unet = load_frozen(
                UNet2DConditionModel, stage_folder("straighten", spec.straightened) / "unet", teacher.dtype
            )
            teacher.unet.to(teacher.device, memory_format=torch.channels_last)
        if spec.lora is not None:
            merge_lora(teacher.unet, [network for _, network in teacher.text.parts], spec.lora)
        if spec.controlnet is not None:
            teacher.attach(controlnet_folder(spec.controlnet))
        return teacher

    def attach(self, controlnet: Path) -> None:
        """Take a ControlNet from its folder, for requests with a control image."""
        self.controlnet = load_controlnet(controlnet, self.dtype).to(self.device, memory_format=torch.channels_last)

    @property
    def guidance_width(self) -> int | None:
        """Of the embedding by which the U-Net is told of the guidance, as an LCM's is; None where two outputs make a guided one."""
        width: int | None = self.unet.config.get("time_cond_proj_dim")
        return width

    def predict(
        self, x_BCHW: Tensor, t_B: Tensor, conditioning: Conditioning, control: Control | None = None, guidance: float = 1.0
    ) -> Tensor:
        """The network's output, in float32. Only a U-Net with a `guidance_width` is told of the guidance: of w = guidance - 1, as in
        diffusers, since 1 means none here.

        Raises:
            ValueError: a control without a ControlNet.
        """
        arguments, x_BCHW = conditioning.to(self.dtype).arguments(), x_BCHW.to(self.dtype)
        added: dict[str, Any] = {}
        if control is not None:
            if self.controlnet is None:
                raise ValueError("a control image, and this teacher has no ControlNet")
            added = residuals(self.controlnet, x_BCHW, t_B, arguments, control.map_BCHW.to(self.dtype), control.scale)
        if self.guidance_width is not None:
            told = guidance_embedding(guidance - 1, self.guidance_width, self.device)
            added["timestep_cond"] = told.to(self.dtype).expand(len(x_BCHW), -1)
        output: Tensor = self.unet(x_BCHW, t_B, **arguments, **added).sample
        return output.float()

    def guided(
        self, captions: list[str], guidance: float, control: Control | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Network output with classifier-free guidance: out = uncond + guidance (cond - uncond); conditional only when it is 1. Both are
        controlled, as in diffusers. A U-Net that is told of the guidance gives the guided output itself."""
        text = self.text.encode(captions)
        if guidance == 1.0 or self.guidance_width is not None:
            return lambda x, t: self.predict(x, t, text, control, guidance)
        both = concatenate([self.text.encode([""] * len(captions)), text])
        twice = control and Control(torch.cat([control.map_BCHW] * 2), control.scale)

        def predict(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            uncond, cond = self.predict(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), both, twice).chunk(2)
            return uncond + guidance * (cond - uncond)

        return predict

    @torch.no_grad()
    def answer(self, request: Request) -> list[Array]:
        """Compute a reply; see `Pending.result`."""
        if isinstance(request, Decode):
            return [compact(self.decode(self._tensor(request.latent_BCHW)))]
        if isinstance(request, Encode):
            return [compact(self.encode(self._tensor(request.image_BHWC)))]
        predict = self.guided(
            request.captions, request.guidance, control_of(request.control_BHWC, self.device, request.control_scale)
        )
        if isinstance(request, Sample):
            noise_BCHW = self._tensor(request.noise_BCHW)
            return [compact(sample(predict, noise_BCHW, self.scheduler_config, request.steps, request.solver))]
        tap = self._tap(request.feature_names)
        t_B = torch.from_numpy(request.t_B).to(self.device)
        output = predict(self._tensor(request.noisy_BCHW), t_B)
        return [compact(output), *(compact(feature) for feature in tap.take())]

    def _tensor(self, value: Array) -> Tensor:
        return torch.from_numpy(value).to(self.device).float()

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] of latents in the diffusion model's scale. Always in float32: SDXL's autoencoder overflows in float16."""
        image: Tensor = self.vae.decode(latent_BCHW / self.vae.config.scaling_factor).sample
        return image

    def encode(self, image_BHWC: Tensor) -> Tensor:
        """Latents in the diffusion model's scale of images with values 0 to 255."""
        image_BCHW = image_BHWC.permute(0, 3, 1, 2) / 127.5 - 1
        mean: Tensor = self.vae.encode(image_BCHW).latent_dist.mean
        scale: float = self.vae.config.scaling_factor
        return mean * scale

    def _tap(self, names: tuple[str, ...]) -> FeatureTap:
        if names not in self._taps:
            self._taps[names] = FeatureTap(self.unet, list(names))
        return self._taps[names]


def image_size(unet_config: Any, vae_config: Any) -> int:
    """Pixels of a side of the images that the networks were made for."""
    factor: int = 2 ** (len(vae_config["block_out_channels"]) - 1)
    return int(unet_config["sample_size"]) * factor


@dataclass(frozen=True)
class _Done:
    value: list[Array]

    def result(self) -> list[Array]:
        return self.value


class InProcessTeacher:
    """Answers at once in the caller's process, on its device: a run without a pool, and the pool's reference in tests."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def submit(self, request: Request) -> Pending:
        return _Done(self.teacher.answer(request))


class NobodyToAsk:
    """Stands where a stage has no teacher to ask."""

    def submit(self, request: Request) -> Pending:
        raise RuntimeError("this stage asks no teacher")
