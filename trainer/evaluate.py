"""Scores every stage of a distillation side by side: the teacher, its autoencoder, and the student after each stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from sdxs.noise import latent_noise
from trainer.diffusion import sample
from trainer.judge import Judge, to_tensor
from trainer.recipe import EvaluationSection
from trainer.stages.context import OneStep
from trainer.teacher import Teacher, load_frozen

Images = np.ndarray
Generate = Callable[[list[str], list[int]], Images]
BATCH = 32
ROUNDS, TURN_S, REPEATS = 3, 0.5, 12  # of timing; a turn is as many images as fit its seconds, one at least
SEED = 20_000_000  # far from the seeds of any pair


@dataclass(frozen=True)
class Row:
    """One line of the report. `top1`/`top5` are shares; `latency_ms` is per image at batch 1, None where it makes no sense."""

    world: str
    split: str
    row: str
    top1: float
    top5: float | None
    frechet: float
    latency_ms: float | None
    images: int
    recorded: bool = False  # taken from the bundle, measured when it was made

    def as_dict(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if name != "recorded" or value}

    def cells(self) -> tuple[str, ...]:
        """As text, under `HEADINGS`."""
        top5 = "" if self.top5 is None else f"{self.top5:.1%}"
        latency = "" if self.latency_ms is None else f"{self.latency_ms:.1f}"
        name = f"{self.row} *" if self.recorded else self.row
        return self.split, name, f"{self.top1:.1%}", top5, f"{self.frechet:.3f}", latency, str(self.images)


HEADINGS = ("captions", "row", "top-1", "top-5", "Frechet", "ms per image", "images")


def to_uint8(image_BCHW: Tensor) -> Images:
    """[-1, 1] floats to uint8 (B, H, W, 3), rounding as diffusers does."""
    scaled = (image_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round()
    return scaled.to(torch.uint8).numpy()


class Generators:
    """The ways to make an image from a caption and a seed that are compared; all start from the same noise."""

    def __init__(self, teacher: Teacher, decoder_folder: Path, evaluation: EvaluationSection) -> None:
        self.teacher, self.evaluation = teacher, evaluation
        self.decoder: AutoencoderTiny = load_frozen(AutoencoderTiny, decoder_folder / "vae")
        self.decoder.to(memory_format=torch.channels_last)
        config = teacher.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    def _noise(self, seeds: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([latent_noise(seed, self.shape) for seed in seeds]))

    def multi_step_teacher(self) -> Generate:
        """The teacher with guidance, decoded by its own autoencoder."""

        @torch.inference_mode()
        def generate(captions: list[str], seeds: list[int]) -> Images:
            predict = self.teacher.guided(captions, self.evaluation.teacher_guidance)
            latent = sample(predict, self._noise(seeds), self.teacher.scheduler_config, self.evaluation.teacher_steps)
            return to_uint8(self.teacher.decode(latent))

        return generate

    def multi_step_student(self, folder: Path) -> Generate:
        """The shrunk student sampled as the teacher is, decoded by the tiny decoder."""
        unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet")
        unet.to(memory_format=torch.channels_last)
        scale = self.evaluation.teacher_guidance

        @torch.inference_mode()
        def generate(captions: list[str], seeds: list[int]) -> Images:
            text = torch.cat([self.teacher.text.encode([""] * len(captions)), self.teacher.text.encode(captions)])

            def predict(x: Tensor, t: Tensor) -> Tensor:
                uncond, cond = unet(torch.cat([x, x]), torch.cat([t, t]), text).sample.chunk(2)
                guided: Tensor = uncond + scale * (cond - uncond)
                return guided

            latent = sample(predict, self._noise(seeds), self.teacher.scheduler_config, self.evaluation.teacher_steps)
            return to_uint8(self.decoder.decode(latent).sample)

        return generate

    def one_step(self, folder: Path) -> Generate:
        """One evaluation at t = 999 without guidance, decoded by the tiny decoder."""
        unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, folder / "unet")
        step = OneStep(unet.to(memory_format=torch.channels_last), self.teacher.text, self.teacher.diffusion)

        @torch.inference_mode()
        def generate(captions: list[str], seeds: list[int]) -> Images:
            return to_uint8(self.decoder.decode(step(self._noise(seeds), captions)).sample)

        return generate


def in_batches(generate: Generate, captions: list[str]) -> Images:
    """Images of all captions; image i has seed SEED + i."""
    starts = range(0, len(captions), BATCH)
    parts = [generate(captions[i : i + BATCH], list(range(SEED + i, SEED + min(i + BATCH, len(captions))))) for i in starts]
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


@torch.inference_mode()
def reconstruct(teacher: Teacher, image_BHWC: Images) -> Images:
    """Real images through the teacher's autoencoder: the ceiling of everything made in its latents."""
    parts = [teacher.decode(teacher.vae.encode(part).latent_dist.mean) for part in to_tensor(image_BHWC).split(64)]
    return to_uint8(torch.cat(parts))


def choose_captions(judge: Judge, split: str, count: int) -> list[str]:
    """`count` captions of a split, evenly spread over it; repeated with other seeds where there are too few."""
    captions = judge.world.captions(split)
    if count >= len(captions):
        return (captions * -(-count // len(captions)))[:count]
    return [captions[i * len(captions) // count] for i in range(count)]


def score_rows(
    judge: Judge,
    teacher: Teacher,
    generators: dict[str, Generate],
    evaluation: EvaluationSection,
    progress: Callable[[str], None],
) -> list[Row]:
    """All rows for both splits, the autoencoder's ("vae") first; without latencies."""
    rows: list[Row] = []
    for split, count in (("train", evaluation.train_images), ("heldout", evaluation.heldout_images)):
        captions = choose_captions(judge, split, count)
        for name in ("vae", *generators):
            progress(f"{split} {name}")
            images = (
                reconstruct(teacher, judge.world.reference_images(captions))
                if name == "vae"
                else in_batches(generators[name], captions)
            )
            rows.append(_row(judge, split, name, images, captions))
    return rows


def _row(judge: Judge, split: str, name: str, images: Images, captions: list[str]) -> Row:
    scores = judge.score(images, captions)
    top5 = None if scores.top5 is None else round(scores.top5, 4)
    return Row(judge.world.name, split, name, round(scores.top1, 4), top5, round(scores.frechet, 4), None, len(captions))
