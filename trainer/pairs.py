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

from sdxs.errors import InvalidRequest
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

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(
            torch.cat([self.latent_NCHW, other.latent_NCHW]),
            torch.cat([self.seed_N, other.seed_N]),
            self.captions + other.captions,
        )

    @classmethod
    def load(cls, path: Path) -> Pairs:
        from safetensors import safe_open

        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            captions = file.metadata()["captions"].split("\n")
        return cls(tensors["latent"], tensors["seed"], captions)


def recombine(captions: list[str], avoid: set[str], count: int, seed: int) -> list[str]:
    """Up to `count` new prompts: the beginning of one caption and the end of another that shares a word with it, no longer than the longer
    of the two ("thumbs up dark skin tone" and "woman pilot light skin tone" give "thumbs pilot light skin tone"). None of `captions` or
    `avoid`, none twice. A student that has seen only whole captions composes their words worse than its teacher does; the
    teacher answers anything.

    Raises:
        InvalidRequest: no two captions can be recombined.
    """
    rng, words = np.random.default_rng(seed), [caption.split() for caption in captions]
    known, made = avoid | set(captions), dict[str, None]()
    for i, j in rng.integers(len(words), size=(200 * count, 2)):
        first, second = words[i], words[j]
        if i == j or set(first).isdisjoint(second):
            continue
        mixed = first[: rng.integers(1, len(first) + 1)] + second[rng.integers(len(second)) :]
        prompt = " ".join(mixed)
        if len(mixed) <= max(len(first), len(second)) and prompt not in known:
            made[prompt] = None
        if len(made) == count:
            break
    if not made:
        raise InvalidRequest("compositions", len(captions), "a list with captions that share words")
    return list(made)


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
