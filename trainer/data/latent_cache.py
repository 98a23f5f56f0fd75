"""Latents of captioned images, each encoded once: kept by the sha256 of the image's file under the digest of what encodes it.

In the store of data sets, below encoded/<digest>: shards/<name>.safetensors with up to SHARD_ROWS rows, shards/<name>.sha256 with
their keys, and sets/<listing>.arrow, what a listing of files held, so that an unchanged data set is not even read again.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store
from trainer.data.files import Files, find
from trainer.data.images import FIELD, CaptionedImage, Pixels, decoded_images
from trainer.recipe import digest
from trainer.sections import ImagesSection

SHARD_ROWS = 1024
KEY_BYTES = 32
LAYOUT = 1  # raised when images are cut or latents are kept in another way
Encode = Callable[[Pixels], Tensor]
Rows = Callable[[], Tensor]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Encoder:
    """Encodes elsewhere: `ask` sends image_BHWC and returns at once with what waits for their rows, at most `in_flight` of them."""

    ask: Callable[[Pixels], Rows]
    in_flight: int = 1

    @classmethod
    def here(cls, encode: Encode) -> Encoder:
        """In this process, one batch after the other."""
        return cls(lambda image_BHWC: partial(encode, image_BHWC))


class _Place(NamedTuple):
    shard: str
    row: int


class _Batch(NamedTuple):
    """(sha256, caption) of each image, the keys of those that are new, and what waits for their rows."""

    pairs: list[tuple[bytes, str]]
    new: list[bytes]
    rows: Rows | None


class EncodedImages:
    """Encoded images with their captions, in the order of their source. Shards are mapped into memory, not read.

    Like `trainer.latents.LatentViews`, for sets that need not fit into memory.
    """

    def __init__(self, folder: Path, places: list[_Place], captions: list[str]) -> None:
        names = sorted({place.shard for place in places})
        number = {name: i for i, name in enumerate(names)}
        self._shards = [load_file(folder / f"{name}.safetensors")["row"] for name in names]
        self._places = np.array([(number[place.shard], place.row) for place in places], np.int32)
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, indices: Sequence[int]) -> Tensor:
        """Rows as they are kept: latent_NCHW in float16, or image_NHWC in uint8."""
        return torch.stack([self._shards[shard][row] for shard, row in self._places[list(indices)].tolist()])

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """A random batch, float32, and its captions."""
        rows = torch.randint(len(self.captions), (batch,), generator=generator).tolist()
        return self.take(rows).float(), [self.captions[i] for i in rows]


def cached_latents(
    section: ImagesSection,
    encode: Encode | Encoder,
    key: str,
    settings: Settings,
    batch: int = 32,
    progress: Progress | None = None,
) -> EncodedImages:
    """The latents of a data set's images: those already kept are fetched, the others are encoded and kept.

    Args:
        encode: image_BHWC in uint8 to rows of any shape, here or elsewhere; floats are kept in float16, uint8 as it is.
        key: of what encodes, such as the autoencoder's digest.
        batch: images an `encode` call takes.
        progress: told how many images have been encoded.

    Raises:
        NotFound, InvalidRequest: as `read_images`; InvalidRequest too where there is no image at all.
    """
    files = find(section.images, settings, FIELD)
    with _Cache(open_store(settings, "datasets"), settings.cache_dir, digest([LAYOUT, key, section.size])) as cache:
        listing = digest([files.listing(), section.format, section.column])
        rows = cache.read_set(listing)
        if rows is None:
            encoder = encode if isinstance(encode, Encoder) else Encoder.here(encode)
            rows = list(_encode_new(cache, files, section, encoder, batch, progress))
            cache.write_set(listing, rows)
        if not rows:
            raise InvalidRequest(FIELD, section.images, "at least one captioned image")
        places = cache.fetched(rows)
        return EncodedImages(cache.folder, places, [caption for _, caption in rows])


def cached_pixels(section: ImagesSection, settings: Settings) -> EncodedImages:
    """The images themselves, image_NHWC in uint8, kept in the same way: for what trains on pixels."""
    return cached_latents(section, lambda image_BHWC: torch.from_numpy(image_BHWC.copy()), "pixels", settings)


def _encode_new(
    cache: _Cache, files: Files, section: ImagesSection, encoder: Encoder, batch: int, progress: Progress | None
) -> Iterator[tuple[bytes, str]]:
    """Yields (sha256, caption) of every distinct pair, and sees to it that each image is in the cache."""
    seen: set[tuple[bytes, str]] = set()
    found = decoded_images(files, section.format, section.column, section.size, frozenset(cache.known))
    done = 0
    for pairs, keys, rows in _asked(cache, found, encoder, batch):
        if rows is not None:
            cache.add(keys, _kept(rows))
            done += len(keys)
            if progress:
                progress(done)
        for pair in pairs:
            if pair not in seen:
                seen.add(pair)
                yield pair


def _asked(cache: _Cache, found: Iterator[CaptionedImage], encoder: Encoder, batch: int) -> Iterator[_Batch]:
    """Batches in their order; the next ones are asked for already."""
    waiting: deque[_Batch] = deque()
    under_way: set[bytes] = set()
    while some := list(islice(found, batch)):
        new = {image.sha256: image for image in some if image.sha256 not in cache.known and image.sha256 not in under_way}
        under_way |= set(new)
        pixels = [image.image_HWC for image in new.values() if image.image_HWC is not None]
        pairs = [(image.sha256, image.caption) for image in some]
        waiting.append(_Batch(pairs, list(new), encoder.ask(np.stack(pixels)) if new else None))
        if len(waiting) >= encoder.in_flight:
            yield waiting.popleft()
    yield from waiting


@torch.no_grad()
def _kept(wait: Rows) -> Tensor:
    """Rows as they are kept."""
    rows = wait().cpu()
    if not rows.is_floating_point():
        return rows
    if not torch.isfinite(half := rows.half()).all():
        raise InvalidRequest("encode", float(rows.abs().max()), "finite latents within float16's range")
    return half


class _Cache:
    """Shards of one encoder: those in the store, and the one being filled."""

    def __init__(self, store: ObjectStore, cache_dir: Path, name: str) -> None:
        self.store, self.prefix, self.folder = store, f"encoded/{name}", cache_dir / "encoded" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[bytes, _Place] = {}
        self._keys, self._rows = list[bytes](), list[Tensor]()
        for found in (key for key in store.list(f"{self.prefix}/shards/") if key.endswith(".sha256")):
            self._index(Path(found).stem, store.get_bytes(found))

    def __enter__(self) -> _Cache:
        return self

    def __exit__(self, *_: object) -> None:
        """What was encoded stays, even if the set was not read to its end."""
        self.flush()

    def _index(self, shard: str, keys: bytes) -> None:
        for row in range(len(keys) // KEY_BYTES):
            self.known.setdefault(keys[row * KEY_BYTES : (row + 1) * KEY_BYTES], _Place(shard, row))

    def add(self, keys: list[bytes], rows: Tensor) -> None:
        """Keep new rows; whole shards are written at once."""
        self._keys += keys
        self._rows += rows.unbind(0)
        self.known |= dict.fromkeys(keys, _Place("", -1))
        if len(self._keys) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet as a shard."""
        if not self._keys:
            return
        joined = b"".join(self._keys)
        shard = hashlib.sha256(joined).hexdigest()[:32]
        path = self.folder / f"{shard}.safetensors"
        save_file({"row": torch.stack(self._rows)}, part := path.with_suffix(".part"))
        part.replace(path)
        self.store.put_file(f"{self.prefix}/shards/{path.name}", path)
        self.store.put_bytes(f"{self.prefix}/shards/{shard}.sha256", joined)  # last: whoever sees it finds the rows
        for key in self._keys:
            del self.known[key]
        self._index(shard, joined)
        self._keys, self._rows = [], []

    def fetched(self, rows: list[tuple[bytes, str]]) -> list[_Place]:
        """Where each row lies, after its shard has been fetched into the folder."""
        self.flush()
        places = [self.known[key] for key, _ in rows]
        for shard in {place.shard for place in places}:
            if not (path := self.folder / f"{shard}.safetensors").exists():
                self.store.get_file(f"{self.prefix}/shards/{path.name}", path)
        return places

    def read_set(self, listing: str) -> list[tuple[bytes, str]] | None:
        """What a listing held, if all of it is still kept."""
        key = f"{self.prefix}/sets/{listing}.arrow"
        if not self.store.exists(key):
            return None
        table = pa.ipc.open_file(self.store.get_bytes(key)).read_all()
        rows = list(zip(table["sha256"].to_pylist(), table["caption"].to_pylist(), strict=True))
        return rows if all(sha256 in self.known for sha256, _ in rows) else None

    def write_set(self, listing: str, rows: list[tuple[bytes, str]]) -> None:
        self.flush()
        table = pa.table({"sha256": [sha256 for sha256, _ in rows], "caption": [caption for _, caption in rows]})
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "set.arrow"
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
            self.store.put_file(f"{self.prefix}/sets/{listing}.arrow", path)
