"""(noise, teacher sample) pairs: drawn once from the teacher pool, used by every later stage. Data-free: prompts only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxs.noise import latent_noise
from trainer.recipe import PairsSection
from trainer.teacher import Pending, Sample, TeacherClient

BATCH, IN_FLIGHT = 32, 6


@dataclass(frozen=True)
class Pairs:
    """latent_NCHW = psi(x_phi(eps)) in float16; the noise of row i is latent_noise(seed_N[i])."""

    latent_NCHW: Tensor
    seed_N: Tensor
    captions: list[str]

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """A random batch: (noise_BCHW, latent_BCHW) in float32 and captions."""
        rows = torch.randint(len(self.captions), (batch,), generator=generator)
        shape = tuple(self.latent_NCHW.shape[1:])
        noise = np.stack([latent_noise(int(self.seed_N[i]), shape) for i in rows])
        return torch.from_numpy(noise), self.latent_NCHW[rows].float(), [self.captions[i] for i in rows.tolist()]

    def save(self, path: Path) -> None:
        metadata = {"captions": "\n".join(self.captions)}
        save_file({"latent": self.latent_NCHW.contiguous(), "seed": self.seed_N}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> Pairs:
        from safetensors import safe_open

        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            captions = file.metadata()["captions"].split("\n")
        return cls(tensors["latent"], tensors["seed"], captions)


def draw_pairs(
    teacher: TeacherClient,
    captions: list[str],
    section: PairsSection,
    shape: tuple[int, int, int],
    seed: int,
    progress: Callable[[int], None],
) -> Pairs:
    """Sample `section.count` pairs, going round the captions in a shuffled order, with several requests under way.

    Args:
        shape: (C, H, W) of a latent.
        progress: told how many are done.
    """
    count = section.count
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-count // len(captions)))])[:count]
    texts = [captions[i] for i in order]
    seeds = [(seed << 32) + i for i in range(count)]
    waiting: deque[Pending] = deque()
    latents: list[Tensor] = []

    def collect() -> None:
        latents.append(torch.from_numpy(waiting.popleft().result()[0].copy()))
        progress(sum(len(part) for part in latents))

    for start in range(0, count, BATCH):
        noise = np.stack([latent_noise(s, shape) for s in seeds[start : start + BATCH]])
        waiting.append(
            teacher.submit(Sample(noise, texts[start : start + BATCH], section.steps, section.guidance, section.solver))
        )
        if len(waiting) >= IN_FLIGHT:
            collect()
    while waiting:
        collect()
    return Pairs(torch.cat(latents), torch.tensor(seeds, dtype=torch.int64), texts)
