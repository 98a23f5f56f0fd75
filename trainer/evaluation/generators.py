"""The ways to make an image from a caption and a seed that are compared: teacher, student after each stage, finished bundle; and how long
each takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from sdxs.bundle import Manifest, read_config
from sdxs.noise import latent_noise
from trainer.diffusion import sample
from trainer.evaluation.metrics.flops import gflop
from trainer.models.conditioning import concatenate
from trainer.models.controlnets import Controlled, load_controlnet
from trainer.models.judge import to_tensor
from trainer.models.text import TextEncoder
from trainer.sections import EvaluationSection
from trainer.sources import load_frozen
from trainer.stages.context import OneStep, told
from trainer.teacher import Teacher, control_of

Images = np.ndarray
Generate = Callable[[list[str], list[int]], Images]


class Controllable(Protocol):
    """A `Generate` that also takes control images, uint8 maps of shape (N, H, W, 3)."""

    def __call__(self, captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images: ...


class Captioned(Protocol):
    """A world, or prompts of one's own."""

    def captions(self, split: str) -> Sequence[str]: ...


BATCH = 32
ROUNDS, TURN_S, REPEATS = 3, 0.5, 12  # of timing; a turn is as many images as fit its seconds, one at least
SEED = 20_000_000  # far from the seeds of any pair


def to_uint8(image_BCHW: Tensor) -> Images:
    """[-1, 1] floats to uint8 (B, H, W, 3), rounding as diffusers does."""
    scaled = (image_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round()
    return scaled.to(torch.uint8).cpu().numpy()


def noise_of(seeds: list[int], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The noise of images, shape (B, C, H, W)."""
    return torch.from_numpy(np.stack([latent_noise(seed, shape) for seed in seeds])).to(device)


def multi_step(teacher: Teacher, evaluation: EvaluationSection) -> Controllable:
    """A teacher with guidance, decoded by its own autoencoder; with control images only if a ControlNet is attached to it."""
    size = teacher.unet.config.sample_size

    @torch.inference_mode()
    def generate(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        noise = noise_of(seeds, (teacher.unet.config.in_channels, size, size), teacher.device)
        predict = teacher.guided(captions, evaluation.teacher_guidance, control_of(map_NHWC, teacher.device))
        return to_uint8(teacher.decode(sample(predict, noise, teacher.scheduler_config, evaluation.teacher_steps)))

    return generate


class Generators:
    """Those of a distillation: all start from the same noise and read the teacher's text embeddings, on the teacher's device."""

    def __init__(self, teacher: Teacher, decoder_folder: Path, evaluation: EvaluationSection) -> None:
        self.teacher, self.evaluation = teacher, evaluation
        self.decoder: AutoencoderTiny = load_frozen(AutoencoderTiny, decoder_folder / "vae")
        self.decoder.to(teacher.device, memory_format=torch.channels_last)
        config = teacher.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    def _noise(self, seeds: list[int]) -> Tensor:
        return noise_of(seeds, self.shape, self.teacher.device)

    def multi_step_teacher(self) -> Generate:
        """The teacher with guidance, decoded by its own autoencoder."""
        return multi_step(self.teacher, self.evaluation)

    def multi_step_student(self, folder: Path) -> Generate:
        """The shrunk student sampled as the teacher is, decoded by the tiny decoder."""
        unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet")
        unet.to(self.teacher.device, memory_format=torch.channels_last)
        scale = self.evaluation.teacher_guidance

        @torch.inference_mode()
        def generate(captions: list[str], seeds: list[int]) -> Images:
            encode = self.teacher.text.encode
            text = concatenate([encode([""] * len(captions)), encode(captions)])

            def predict(x: Tensor, t: Tensor) -> Tensor:
                uncond, cond = unet(torch.cat([x, x]), torch.cat([t, t]), **text.arguments()).sample.chunk(2)
                guided: Tensor = uncond + scale * (cond - uncond)
                return guided

            latent = sample(predict, self._noise(seeds), self.teacher.scheduler_config, self.evaluation.teacher_steps)
            return to_uint8(self.decoder.decode(latent).sample)

        return generate

    def one_step(self, folder: Path) -> Generate:
        """One evaluation at t = 999 without guidance, decoded by the tiny decoder."""
        unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet")
        unet.to(self.teacher.device, memory_format=torch.channels_last)
        step = OneStep(unet, self.teacher.text, self.teacher.diffusion)

        @torch.inference_mode()
        def generate(captions: list[str], seeds: list[int]) -> Images:
            return to_uint8(self.decoder.decode(step(self._noise(seeds), captions)).sample)

        return generate


def served(
    folder: Path, manifest: Manifest, device: torch.device | str = "cpu", controlnet: Path | None = None
) -> Controllable:
    """A bundle by itself, as it is served: its own text encoders and decoder, and the step its manifest holds. SDXL's conditioning too.
    With control images only if a ControlNet's folder is named."""
    network: Any = load_frozen(UNet2DConditionModel, folder / "unet")
    if controlnet is not None:
        network = Controlled(network, load_controlnet(controlnet))
    network = network.to(device, memory_format=torch.channels_last)
    kinds: dict[str, Any] = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}
    vae = load_frozen(kinds[read_config(folder, "vae/config.json")["_class_name"]], folder / "vae")
    vae.to(device, memory_format=torch.channels_last)
    text, step = TextEncoder(folder, device, manifest.image_size), manifest.one_step

    @torch.inference_mode()
    def generate(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        noise = noise_of(seeds, manifest.latent_shape, device)
        scaled = (step.input_scale * noise).contiguous(memory_format=torch.channels_last)
        output = network(scaled, step.timestep, **told(text, captions, map_NHWC, torch.device(device))).sample
        latent = step.latent_coefficient * noise + step.output_coefficient * output
        return to_uint8(vae.decode(latent / vae.config.scaling_factor).sample)

    return generate


def in_batches(generate: Generate, captions: list[str], first: int = SEED) -> Images:
    """Images of all captions; image i has seed `first` + i."""
    starts = range(0, len(captions), BATCH)
    parts = [generate(captions[i : i + BATCH], list(range(first + i, first + min(i + BATCH, len(captions))))) for i in starts]
    return np.concatenate(parts)


def latencies_ms(generators: dict[str, Generate], caption: str) -> dict[str, float]:
    """Median milliseconds of one image at batch 1, text encoding cached as in serving.

    All take turns, each for half a second: a machine whose speed drifts slows all alike. A turn's first image is not counted,
    unless it is the only one.
    """

    def milliseconds(generate: Generate, seed: int) -> float:
        start = time.perf_counter()
        generate([caption], [seed])
        return 1000 * (time.perf_counter() - start)

    times: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(ROUNDS):
        for name, generate in generators.items():
            first = milliseconds(generate, SEED)
            repeats = min(REPEATS, int(1000 * TURN_S / first))
            times[name] += [milliseconds(generate, SEED + 1 + i) for i in range(repeats)] or [first]
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def gflops(generators: dict[str, Generate], caption: str) -> dict[str, float]:
    """10^9 FLOPs of the image that `latencies_ms` times: every step and both halves of guidance, text encoding cached."""
    for generate in generators.values():
        generate([caption], [SEED])
    return {name: float(f"{gflop(partial(generate, [caption], [SEED])):.6g}") for name, generate in generators.items()}


@torch.inference_mode()
def reconstruct(teacher: Teacher, image_BHWC: Images) -> Images:
    """Real images through the teacher's autoencoder: the ceiling of everything made in its latents."""
    parts = [
        teacher.decode(teacher.vae.encode(part.to(teacher.device)).latent_dist.mean) for part in to_tensor(image_BHWC).split(64)
    ]
    return to_uint8(torch.cat(parts))


def choose_captions(source: Captioned, split: str, count: int) -> list[str]:
    """`count` captions of a split, evenly spread over it; repeated with other seeds where there are too few. None of an empty split."""
    captions = source.captions(split)
    if count <= len(captions):
        return [captions[i * len(captions) // count] for i in range(count)]
    return [captions[i % len(captions)] for i in range(count)] if captions else []
