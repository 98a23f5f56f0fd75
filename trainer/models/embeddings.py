"""Text embeddings, each computed once: kept by text encoder and caption, in memory up to a bound and on disk without one.

What a run computes must not depend on what is in the cache. So an embedding is rounded to the kept type before it is first given
away, and captions are encoded in batches of one size: a matrix product of another shape may round otherwise.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxs.errors import InvalidRequest
from trainer.models.conditioning import Conditioning, concatenate

SHARD_ROWS, SHARD_S = 512, 30.0  # a file has so many captions at most, and waits so long for them
PARTS = tuple(field.name for field in fields(Conditioning))
EXACT = "time_ids_B6"  # pixels: above 2048 float16 has not every whole number
Encode = Callable[[list[str]], Conditioning]


@dataclass(eq=False)
class EmbeddingCache:
    """`compute` with a memory. For one thread; several processes may share a folder, each adds files of its own.

    Args:
        compute: captions to their conditioning, rows in order, on `device`.
        key: digest of the text encoder and its tokenizer.
        folder: where embeddings are kept on disk, if they are; `flush` writes those that are not there yet.
        max_bytes: of the embeddings in memory; the least recently used go first.
        batch: captions a `compute` call takes, padded with empty ones.
        kept: the type in which they are kept, and to which all but the SDXL sizes are rounded.
    """

    compute: Encode
    key: str
    folder: Path | None = None
    max_bytes: int = 1 << 30
    batch: int = 16
    kept: torch.dtype = torch.float16
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.hits = self.misses = self.bytes = 0
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        name = hashlib.sha256(f"{self.key}/{self.kept}".encode()).hexdigest()[:16]
        self._disk = _Disk(self.folder / name) if self.folder else None

    def encode(self, captions: list[str]) -> Conditioning:
        """The conditioning of captions, rows in order, float32, on the device."""
        wanted = dict.fromkeys(captions)
        found = {caption: row for caption in wanted if (row := self._find(caption)) is not None}
        missing = [caption for caption in wanted if caption not in found]
        self.misses += len(missing)
        self.hits += len(captions) - len(missing)
        for start in range(0, len(missing), self.batch):
            found |= self._computed(missing[start : start + self.batch])
        if self._disk and self._disk.due():
            self._disk.flush()
        return concatenate([found[caption] for caption in captions]).to(torch.float32)

    def flush(self) -> None:
        """Write to disk what is not there yet."""
        if self._disk:
            self._disk.flush()

    def _find(self, caption: str) -> Conditioning | None:
        if caption in self._rows:
            self._rows.move_to_end(caption)
            return self._rows[caption]
        row = self._disk.get(caption) if self._disk else None
        if row is None:
            return None
        row = row.to(self.device)
        self._remember(caption, row)
        return row

    @torch.no_grad()
    def _computed(self, captions: list[str]) -> dict[str, Conditioning]:
        padded = captions + [""] * (self.batch - len(captions))
        batch = self._rounded(self.compute(padded))
        rows = {caption: _row(batch, i) for i, caption in enumerate(captions)}
        for caption, row in rows.items():
            self._remember(caption, row)
            if self._disk:
                self._disk.add(caption, row.to("cpu"))
        return rows

    def _rounded(self, batch: Conditioning) -> Conditioning:
        rounded = _map(batch, lambda name, part: part if name == EXACT else part.to(self.kept))
        if not all(torch.isfinite(part).all() for part in _parts(rounded).values()):
            raise InvalidRequest(
                "embeddings", float(batch.text_BLD.abs().max()), f"finite values within the range of {self.kept}"
            )
        return rounded

    def _remember(self, caption: str, row: Conditioning) -> None:
        self._rows[caption] = row
        self.bytes += _bytes(row)
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self._rows.popitem(last=False)[1])


class _Disk:
    """safetensors files of SHARD_ROWS captions each, named by what is in them and mapped when one of theirs is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        self._pending: dict[bytes, Conditioning] = {}
        self._since = 0.0
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._index(path, bytes.fromhex(file.metadata()["captions"]))

    def _index(self, path: Path, names: bytes) -> None:
        for row in range(len(names) // 16):
            self._places[names[16 * row : 16 * row + 16]] = path, row

    def get(self, caption: str) -> Conditioning | None:
        name = _name(caption)
        if name in self._pending:
            return self._pending[name]
        if name not in self._places:
            return None
        path, row = self._places[name]
        if path not in self._mapped:
            self._mapped[path] = load_file(path)
        return _row(Conditioning(**self._mapped[path]), row)

    def add(self, caption: str, row: Conditioning) -> None:
        if not self._pending:
            self._since = time.monotonic()
        self._pending[_name(caption)] = row
        if len(self._pending) >= SHARD_ROWS:
            self.flush()

    def due(self) -> bool:
        """Something has waited long enough: a process may end without notice."""
        return bool(self._pending) and time.monotonic() - self._since >= SHARD_S

    def flush(self) -> None:
        if not self._pending:
            return
        names = b"".join(self._pending)
        path = self.folder / f"{hashlib.sha256(names).hexdigest()[:32]}.safetensors"
        part = path.with_suffix(f".{id(self)}.part")
        save_file(_parts(concatenate(list(self._pending.values()))), part, {"captions": names.hex()})
        part.replace(path)
        self._index(path, names)
        self._pending = {}


def _name(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode(), digest_size=16).digest()


def _parts(batch: Conditioning) -> dict[str, Tensor]:
    return {name: part for name in PARTS if (part := getattr(batch, name)) is not None}


def _map(batch: Conditioning, change: Callable[[str, Tensor], Tensor]) -> Conditioning:
    return Conditioning(**{name: change(name, part) for name, part in _parts(batch).items()})


def _row(batch: Conditioning, index: int) -> Conditioning:
    """One row, with memory of its own: a view would keep the whole batch."""
    return _map(batch, lambda _, part: part[index : index + 1].clone())


def _bytes(row: Conditioning) -> int:
    return sum(part.nbytes for part in _parts(row).values())
