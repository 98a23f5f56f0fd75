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
from trainer.teacher import Pending, Sample, TeacherClient


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
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            captions = file.metadata()["captions"].split("\n")
        return cls(tensors["latent"], tensors["seed"], captions)


def draw_pairs(
    teacher: TeacherClient,
    captions: list[str],
    count: int,
    shape: tuple[int, int, int],
    *,
    seed: int,
    steps: int,
    guidance: float,
    solver: str,
    batch: int = 32,
    in_flight: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> Pairs:
    """Sample `count` pairs, going round the captions in a shuffled order, with `in_flight` requests under way."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-count // len(captions)))])[:count]
    texts = [captions[i] for i in order]
    seeds = [(seed << 32) + i for i in range(count)]
    waiting: deque[Pending] = deque()
    latents: list[Tensor] = []

    def collect() -> None:
        latents.append(torch.from_numpy(waiting.popleft().result()[0].copy()))
        progress(sum(len(part) for part in latents))

    for start in range(0, count, batch):
        noise = np.stack([latent_noise(s, shape) for s in seeds[start : start + batch]])
        waiting.append(teacher.submit(Sample(noise, texts[start : start + batch], steps, guidance, solver)))
        if len(waiting) >= in_flight:
            collect()
    while waiting:
        collect()
    return Pairs(torch.cat(latents), torch.tensor(seeds, dtype=torch.int64), texts)
