"""Images of the teacher's samples, from which control images are extracted: with the noise they began with, the triplets that a one-step
ControlNet learns on. Decoded once by the pool, kept as files; the map itself is extracted when a row is drawn, anew each time."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.artifacts import Artifacts
from trainer.pairs import BATCH, IN_FLIGHT, SHARD, Pairs
from trainer.teacher import Decode, Pending, TeacherClient, compact

QUALITY = {"png": [cv2.IMWRITE_PNG_COMPRESSION, 3], "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 95]}


class SampleImages:
    """The images of pairs, in their order: files one after the other, and where each ends."""

    def __init__(self, data: Tensor, end_N: Tensor) -> None:
        self.data, self.end_N = data, end_N

    def __len__(self) -> int:
        return len(self.end_N)

    @classmethod
    def load(cls, folder: Path) -> SampleImages:
        """All shards of a folder."""
        parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        starts = np.cumsum([0, *(len(part["data"]) for part in parts)])
        ends = [part["end"] + int(start) for part, start in zip(parts, starts, strict=False)]
        return cls(torch.cat([part["data"] for part in parts]), torch.cat(ends))

    def take(self, rows: Tensor) -> np.ndarray:
        """Images of these rows, uint8 (B, H, W, 3)."""
        return np.stack([self._image(row) for row in rows.tolist()])

    def _image(self, row: int) -> np.ndarray:
        start, end = int(self.end_N[row - 1]) if row else 0, int(self.end_N[row])
        found = cv2.imdecode(self.data[start:end].numpy(), cv2.IMREAD_COLOR_RGB)
        assert found is not None
        return found


def pixels(image_BCHW: np.ndarray) -> np.ndarray:
    """A pool's images in [-1, 1] as uint8 (B, H, W, 3)."""
    scaled = np.rint((np.clip(image_BCHW.astype(np.float32), -1, 1) + 1) * 127.5)
    found: np.ndarray = scaled.transpose(0, 2, 3, 1).astype(np.uint8)
    return found


def file_of(image_HWC: np.ndarray, kind: str) -> np.ndarray:
    """A PNG or JPEG file, as uint8."""
    _, data = cv2.imencode(f".{kind}", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), QUALITY[kind])
    return data


def _decoded(teacher: TeacherClient, pairs: Pairs, rows: slice, kind: str, progress: Callable[[int], None]) -> SampleImages:
    """The images of some pairs, with several requests under way."""
    waiting: deque[Pending] = deque()
    files: list[np.ndarray] = []

    def collect() -> None:
        files.extend(file_of(image, kind) for image in pixels(waiting.popleft().result()[0]))
        progress(len(files))

    latent_NCHW = pairs.latent_NCHW[rows]
    for start in range(0, len(latent_NCHW), BATCH):
        waiting.append(teacher.submit(Decode(compact(latent_NCHW[start : start + BATCH]))))
        if len(waiting) >= IN_FLIGHT:
            collect()
    while waiting:
        collect()
    return SampleImages(torch.from_numpy(np.concatenate(files)), torch.tensor(np.cumsum([len(file) for file in files])))


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

            images = _decoded(teacher, pairs, slice(start, start + SHARD), kind, told)
            with tempfile.TemporaryDirectory() as scratch:
                save_file({"data": images.data, "end": images.end_N}, Path(scratch) / name)
                artifacts.put_part(*result, name, Path(scratch) / name)
        names.append(name)
    artifacts.finish(*result, names, {"count": len(pairs.captions)})
