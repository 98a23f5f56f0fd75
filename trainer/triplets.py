"""Images of the teacher's samples, from which control images are extracted: with the noise they began with, the triplets that a one-step
ControlNet learns on. Decoded once by the pool, kept as files; the map itself is extracted when a row is drawn, anew each time."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.artifacts import Artifacts
from trainer.conditions import condition_map
from trainer.pairs import BATCH, SHARD, Pairs, in_flight
from trainer.plan import DRAWN, IMAGES
from trainer.teacher import Decode, Pending, TeacherClient, compact
from trainer.warps import warped

QUALITY = {"png": [cv2.IMWRITE_PNG_COMPRESSION, 3], "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 95]}


class SampleImages:
    """The images of pairs, in their order.

    Args:
        parts: of each shard its files one after the other, as uint8, and where each ends. They are mapped into memory, not read.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *(len(end_N) for _, end_N in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @classmethod
    def load(cls, folder: Path) -> SampleImages:
        """All shards of a folder."""
        shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        return cls([(shard["data"], shard["end"]) for shard in shards])

    def take(self, rows: Tensor) -> np.ndarray:
        """Images of these rows, uint8 (B, H, W, 3)."""
        return np.stack([self._image(row) for row in rows.tolist()])

    def _image(self, row: int) -> np.ndarray:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        data, end_N = self.parts[part]
        inside = row - int(self._starts[part])
        start, end = int(end_N[inside - 1]) if inside else 0, int(end_N[inside])
        found = cv2.imdecode(data[start:end].numpy(), cv2.IMREAD_COLOR_RGB)
        assert found is not None
        return found


@dataclass(frozen=True)
class BentMaps:
    """Control images to draw under: of a sample's image, bent, so that they say what its caption does not. By caption number and seed.

    Args:
        images: of the samples, in the order of their captions.
        warp: strength at most, see `trainer.warps`; each image's is drawn evenly from 0 on.
    """

    images: SampleImages
    conditions: Sequence[str]
    warp: float

    def __call__(self, number: int, seed: int) -> np.ndarray:
        """A map, uint8 (H, W, 3), of one of the conditions."""
        rng = np.random.default_rng(seed)
        [image] = self.images.take(torch.tensor([number]))
        bent = warped(image, rng, rng.uniform(0, self.warp))
        return condition_map(bent, self.conditions[int(rng.integers(len(self.conditions)))], rng)


def learnt_from(inputs: Mapping[str, Path]) -> tuple[Pairs | None, SampleImages | None]:
    """Of a stage's inputs, folders by the steps that made them, the pairs, and their images where it has any."""
    pairs = [Pairs.load(inputs[name]) for name in DRAWN if name in inputs]
    images = [SampleImages.load(inputs[name]) for name in IMAGES if name in inputs]
    return reduce(add, pairs) if pairs else None, images[0] if images else None


def pixels(image_BCHW: np.ndarray) -> np.ndarray:
    """A pool's images in [-1, 1] as uint8 (B, H, W, 3)."""
    scaled = np.rint((np.clip(image_BCHW.astype(np.float32), -1, 1) + 1) * 127.5)
    found: np.ndarray = scaled.transpose(0, 2, 3, 1).astype(np.uint8)
    return found


def file_of(image_HWC: np.ndarray, kind: str) -> np.ndarray:
    """A PNG or JPEG file, as uint8."""
    _, data = cv2.imencode(f".{kind}", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), QUALITY[kind])
    return data


def _decoded(
    teacher: TeacherClient, pairs: Pairs, rows: slice, kind: str, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """A shard: the images of some pairs, with several requests under way."""
    waiting: deque[Pending] = deque()
    files: list[np.ndarray] = []
    most = in_flight(teacher)

    def collect() -> None:
        files.extend(file_of(image, kind) for image in pixels(waiting.popleft().result()[0]))
        progress(len(files))

    latent_NCHW = pairs.latent_NCHW[rows]
    for start in range(0, len(latent_NCHW), BATCH):
        waiting.append(teacher.submit(Decode(compact(latent_NCHW[start : start + BATCH]))))
        if len(waiting) >= most:
            collect()
    while waiting:
        collect()
    return {"data": torch.from_numpy(np.concatenate(files)), "end": torch.tensor(np.cumsum([len(file) for file in files]))}


def draw_images(
    teacher: TeacherClient,
    pairs: Pairs,
    kind: str,
    artifacts: Artifacts,
    result: tuple[str, str],
    progress: Callable[[int], None],
) -> None:
    """Decode pairs shard by shard into the artifact `result` (name, digest); shards that an interrupted run left are kept."""
    names = []
    for number, start in enumerate(range(0, len(pairs.captions), SHARD)):
        name = f"shard-{number:05}.safetensors"
        if not artifacts.has_part(*result, name):

            def told(done: int, before: int = start) -> None:
                progress(before + done)

            shard = _decoded(teacher, pairs, slice(start, start + SHARD), kind, told)
            with tempfile.TemporaryDirectory() as scratch:
                save_file(shard, Path(scratch) / name)
                artifacts.put_part(*result, name, Path(scratch) / name)
        names.append(name)
    artifacts.finish(*result, names, {"count": len(pairs.captions)})
