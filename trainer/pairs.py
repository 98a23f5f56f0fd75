"""(noise, teacher sample) pairs: drawn once from the teacher pool, used by every later stage. Data-free: prompts only."""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxs.errors import InvalidRequest
from sdxs.noise import latent_noise
from trainer.artifacts import Artifacts
from trainer.data.order import Order
from trainer.data.source import Captions
from trainer.joined import Joined
from trainer.sections import PairsSection
from trainer.teacher import Pending, Sample, TeacherClient

BATCH, IN_FLIGHT, SHARD = 32, 6, 4096


@dataclass(frozen=True)
class Pairs:
    """latent_NCHW = psi(x_phi(eps)) in float16; the noise of row i is latent_noise(seed_N[i]). Latents that were loaded are mapped into
    memory: the workers of a machine share them."""

    latent_NCHW: Tensor | Joined
    seed_N: Tensor
    captions: Sequence[str]

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """A random batch: (noise_BCHW, latent_BCHW) in float32 and captions."""
        return self.take(self.rows(batch, generator))

    def rows(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random row numbers, shape (batch,)."""
        return torch.randint(len(self.captions), (batch,), generator=generator)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """These rows, as `draw` gives them."""
        shape = tuple(self.latent_NCHW.shape[1:])
        noise = np.stack([latent_noise(int(self.seed_N[i]), shape) for i in rows])
        return torch.from_numpy(noise), self.latent_NCHW[rows].float(), [self.captions[i] for i in rows.tolist()]

    def save(self, path: Path) -> None:
        metadata = {"captions": json.dumps(list(self.captions))}
        save_file({"latent": self.latent_NCHW[:].contiguous(), "seed": self.seed_N}, path, metadata)

    def __add__(self, other: Pairs) -> Pairs:
        return self._joined([self, other])

    @classmethod
    def load(cls, folder: Path) -> Pairs:
        """All shards of a folder, in their order."""
        return cls._joined([cls._shard(path) for path in sorted(folder.glob("*.safetensors"))])

    @classmethod
    def _joined(cls, parts: list[Pairs]) -> Pairs:
        latents, seeds = Joined.of(*(part.latent_NCHW for part in parts)), torch.cat([part.seed_N for part in parts])
        return cls(latents, seeds, [caption for part in parts for caption in part.captions])

    @classmethod
    def _shard(cls, path: Path) -> Pairs:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            text = file.metadata()["captions"]
        return cls(tensors["latent"], tensors["seed"], json.loads(text))

    @classmethod
    def of_prompts(cls, captions: Sequence[str], shape: tuple[int, int, int], seed: int) -> Pairs:
        """Prompts and noise without samples: the targets are zeros that take no memory."""
        seeds = torch.arange(len(captions), dtype=torch.int64) + (seed << 32)
        return cls(torch.zeros(1, 1, 1, 1, dtype=torch.float16).expand(len(captions), *shape), seeds, captions)


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


@dataclass(frozen=True)
class PairsOrder:
    """What to sample: row i is `captions[i]`, which is number `chosen[i]` of those there are, from the noise of `seeds[i]`. Goes round the
    captions in shuffled orders."""

    captions: list[str]
    chosen: list[int]
    seeds: list[int]
    section: PairsSection
    shape: tuple[int, int, int]  # of a latent
    control: Callable[[int, int], np.ndarray] | None = None  # of a caption's number and a row's seed: a map, uint8 (H, W, 3)

    @classmethod
    def of(
        cls,
        captions: Sequence[str],
        section: PairsSection,
        shape: tuple[int, int, int],
        seed: int,
        control: Callable[[int, int], np.ndarray] | None = None,
    ) -> PairsOrder:
        chosen = [int(number) for number in Order(len(captions), seed).take(0, section.count)]
        words = captions.take(chosen) if isinstance(captions, Captions) else [captions[i] for i in chosen]
        return cls(words, chosen, [(seed << 32) + i for i in range(section.count)], section, shape, control)

    def part(self, start: int, count: int) -> PairsOrder:
        """Some rows of it."""
        rows = slice(start, start + count)
        return replace(self, captions=self.captions[rows], chosen=self.chosen[rows], seeds=self.seeds[rows])

    def shards(self) -> list[PairsOrder]:
        """Parts of `SHARD` rows, which are sampled and saved one after the other."""
        return [self.part(start, SHARD) for start in range(0, len(self.captions), SHARD)]

    def requests(self) -> Iterator[Sample]:
        """For all rows, as many in one as go together."""
        return (self.part(start, BATCH)._request() for start in range(0, len(self.captions), BATCH))

    def _request(self) -> Sample:
        section, control = self.section, self.control
        noise = np.stack([latent_noise(seed, self.shape) for seed in self.seeds])
        maps = None if control is None else np.stack([control(*row) for row in zip(self.chosen, self.seeds, strict=True)])
        return Sample(noise, self.captions, section.steps, section.guidance, section.solver, maps)


def in_flight(teacher: TeacherClient) -> int:
    """Requests under way that keep all busy who answer: of each member of a pool, one is computed while the next is on its way."""
    return max(IN_FLIGHT, 2 * len(getattr(teacher, "members", ())))


def draw_pairs(teacher: TeacherClient, order: PairsOrder, progress: Callable[[int], None]) -> Pairs:
    """Sample all rows of an order, with several requests under way.

    Args:
        progress: told how many are done.
    """
    waiting: deque[Pending] = deque()
    latents: list[Tensor] = []
    most = in_flight(teacher)

    def collect() -> None:
        latents.append(torch.from_numpy(waiting.popleft().result()[0].copy()))
        progress(sum(len(part) for part in latents))

    for request in order.requests():
        waiting.append(teacher.submit(request))
        if len(waiting) >= most:
            collect()
    while waiting:
        collect()
    return Pairs(torch.cat(latents), torch.tensor(order.seeds, dtype=torch.int64), order.captions)


def draw_shards(
    teacher: TeacherClient, order: PairsOrder, artifacts: Artifacts, result: tuple[str, str], progress: Callable[[int], None]
) -> None:
    """Sample an order shard by shard into the artifact `result` (name, digest); shards that an interrupted run left are kept."""
    names = []
    for number, shard in enumerate(order.shards()):
        name = f"shard-{number:05}.safetensors"
        if not artifacts.has_part(*result, name):
            pairs = draw_pairs(teacher, shard, lambda done, before=number * SHARD: progress(before + done))  # type: ignore[misc]
            with tempfile.TemporaryDirectory() as scratch:
                pairs.save(Path(scratch) / name)
                artifacts.put_part(*result, name, Path(scratch) / name)
        names.append(name)
    artifacts.finish(*result, names, {"count": len(order.seeds)})
