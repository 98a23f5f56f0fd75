"""Prompts of one's own: read once into a table that is addressed by its content, then looked up by number.

A table is a folder of Arrow IPC files, uncompressed, so that it is mapped into memory rather than read: a million prompts cost pages
of the file, not Python strings. It lies in the store of data sets under prompts/<digest>; sources/ remembers which listing of
files gave which table.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from sdxs.store import open_store
from trainer.artifacts import Artifacts
from trainer.data.files import Files, find
from trainer.data.kinds import refusal
from trainer.data.rows import Row, choose_format, read_file, read_rows
from trainer.data.source import Rows, Split, checked
from trainer.recipe import digest
from trainer.sections import DataSection

FIELD = "data.prompts"
SHARD_ROWS = 1 << 20
LOOK_BYTES, LOOK_ROWS = 1 << 28, 1 << 20  # seconds
LAYOUT = 1  # raised when tables are laid out or chosen in another way
_SCHEMA = pa.schema([("caption", pa.string())])
_SPLITS: tuple[Split, Split] = ("train", "heldout")


class Datasets(Artifacts):
    """Artifacts outside of any stage, in the store of data sets."""

    @staticmethod
    def prefix(stage: str, digest: str) -> str:
        return f"{stage}/{digest}"


class PromptTable:
    """Distinct captions in the order of their source, in two splits; a `PromptSource`. Opened from its folder, by any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "table.json").read_text(encoding="utf8"))
        self.digest: str = self.facts["digest"]
        self._splits = {split: _Mapped(sorted(folder.glob(f"{split}-*.arrow"))) for split in _SPLITS}

    def __reduce__(self) -> tuple[type[PromptTable], tuple[Path]]:
        return type(self), (self.folder,)

    def count(self, split: Split) -> int:
        return self._splits[split].count

    def take(self, split: Split, indices: Rows) -> list[str]:
        return self._splits[split].take(indices)


class _Mapped:
    """The captions of some Arrow files, mapped."""

    def __init__(self, paths: list[Path]) -> None:
        readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in paths]
        self.batches = [reader.get_batch(i).column(0) for reader in readers for i in range(reader.num_record_batches)]
        self.ends = np.cumsum([len(batch) for batch in self.batches], dtype=np.int64).tolist()
        self.count: int = self.ends[-1] if self.ends else 0

    def take(self, indices: Rows) -> list[str]:
        wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for place, index in enumerate(indices):
            batch = bisect_right(self.ends, checked(int(index), self.count))
            wanted[batch].append((place, int(index) - self.ends[batch] + len(self.batches[batch])))
        captions = [""] * len(indices)
        for batch, found in wanted.items():
            places, rows = zip(*found, strict=True)
            for place, caption in zip(places, self.batches[batch].take(pa.array(rows)).to_pylist(), strict=True):
                captions[place] = caption
        return captions


def open_prompts(section: DataSection, settings: Settings) -> PromptTable:
    """The table of a data section: fetched if these files have been read before, else read now (through Ray Data where it runs).

    Raises:
        NotFound: no such file, folder or bucket.
        InvalidRequest: the format is not clear, a row is wrong (names file and row), or there are too few prompts.
    """
    files = find(section.prompts, settings, FIELD)
    datasets = Datasets(open_store(settings, "datasets"), settings.cache_dir / "artifacts")
    known = f"sources/{digest([LAYOUT, section.format, section.column, section.heldout, files.listing()])}.json"
    if datasets.store.exists(known):
        return PromptTable(datasets.fetch("prompts", json.loads(datasets.store.get_bytes(known))["digest"]))
    datasets.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=datasets.cache, prefix=".prompts-") as scratch:
        facts = build(section, files, Path(scratch))
        if datasets.facts("prompts", facts["digest"]) is None:
            datasets.save("prompts", facts["digest"], Path(scratch), facts)
    datasets.store.put_bytes(known, json.dumps({"digest": facts["digest"], "source": section.prompts}).encode())
    return PromptTable(datasets.fetch("prompts", facts["digest"]))


def look(section: DataSection, settings: Settings) -> None:
    """Read the first rows, in this process, and keep none: what is wrong with them is said before a run starts.

    Raises:
        NotFound, InvalidRequest: as `open_prompts`, of LOOK_BYTES of files, at least one, and of LOOK_ROWS.
    """
    files = find(section.prompts, settings, FIELD)
    kind, entries = choose_format(files, section.format, "data.format")
    ends = accumulate(entry.size for entry in entries)
    first = [entry for entry, end in zip(entries, ends, strict=True) if end - entry.size < LOOK_BYTES]
    hash_N, rows = np.empty(0, np.uint64), 0
    for block in (block for entry in first for block in read_file(entry, files.filesystem, kind, section.column)):
        _refuse_faults(block, section)
        hash_N = np.union1d(hash_N, caption_hashes(block.column("caption").to_pylist()))
        rows += len(block)
        if rows >= LOOK_ROWS:
            return
    if len(first) == len(entries):
        _refuse_few(len(hash_N), section)


def fetch_prompts(table_digest: str, settings: Settings) -> PromptTable:
    """A table that was read before, on any machine. Raises KeyError when there is none of this digest."""
    return PromptTable(
        Datasets(open_store(settings, "datasets"), settings.cache_dir / "artifacts").fetch("prompts", table_digest)
    )


def build(section: DataSection, files: Files, folder: Path) -> dict[str, Any]:
    """Read all rows and write the table into `folder`; returns its facts. Raises InvalidRequest at the first wrong row."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "rows.arrow"
        hash_N, lengths = _collect(section, files, path)
        kept = _choose(hash_N, section)
        with pa.memory_map(str(path)) as mapped:
            facts = _write(pa.ipc.open_file(mapped), kept, folder)
    facts |= {"duplicates": len(hash_N) - len(kept.train) - len(kept.heldout), "rows": len(hash_N), "characters": lengths}
    facts["digest"] = digest([LAYOUT, facts["train"], facts["heldout"]])
    (folder / "table.json").write_text(json.dumps(facts), encoding="utf8")
    return facts


@dataclass(frozen=True)
class _Kept:
    """Row numbers of each split, ascending."""

    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]


def _collect(section: DataSection, files: Files, path: Path) -> tuple[npt.NDArray[np.uint64], int]:
    """All captions as they come into one Arrow file, their hashes, and the number of characters."""
    kind, entries = choose_format(files, section.format, "data.format")
    hashes, characters = [np.empty(0, np.uint64)], 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for block in read_rows(files, entries, kind, section.column):
            _refuse_faults(block, section)
            captions = block.column("caption").combine_chunks()
            hashes.append(caption_hashes(captions.to_pylist()))
            characters += pc.sum(pc.utf8_length(captions)).as_py() or 0
            writer.write_table(pa.table([captions], schema=_SCHEMA))
    return np.concatenate(hashes), characters


def _refuse_faults(block: pa.Table, section: DataSection) -> None:
    wrong = block.filter(pc.is_valid(block.column("kind"))).slice(0, 1).to_pylist()
    for found in wrong:
        file = found.pop("file")
        raise refusal(FIELD, section.prompts, file, Row(**found))


def caption_hashes(captions: list[str]) -> npt.NDArray[np.uint64]:
    """The first 64 bits of each caption's BLAKE2b: among 100 million captions two differing ones agree with probability 0.0003."""
    joined = b"".join(hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions)
    return np.frombuffer(joined, np.uint64)


def _choose(hash_N: npt.NDArray[np.uint64], section: DataSection) -> _Kept:
    """The first row of each caption; held out are the `heldout` smallest hashes. A row that is added may take a held-out one's place,
    which then is trained on; no caption that was trained on is ever held out because rows were added."""
    distinct, first = np.unique(hash_N, return_index=True)  # ascending by hash
    _refuse_few(len(distinct), section)
    heldout, train = first[: section.heldout], first[section.heldout :]
    return _Kept(np.sort(train), np.sort(heldout))


def _refuse_few(distinct: int, section: DataSection) -> None:
    if distinct <= section.heldout:
        raise InvalidRequest(
            FIELD, section.prompts, f"more than {section.heldout} different prompts (data.heldout); it has {distinct}"
        )


def _write(reader: Any, kept: _Kept, folder: Path) -> dict[str, Any]:
    """Both splits as shards of at most SHARD_ROWS rows; returns their counts and digests."""
    facts: dict[str, Any] = {"counts": {}}
    for split, rows in (("train", kept.train), ("heldout", kept.heldout)):
        summed = hashlib.sha256()
        for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
            path = folder / f"{split}-{number:05}.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
                for captions in _picked(reader, rows[start : start + SHARD_ROWS]):
                    writer.write_batch(pa.record_batch([captions], schema=_SCHEMA))
                    summed.update("".join(f"{caption}\n" for caption in captions.to_pylist()).encode())
        facts["counts"][split], facts[split] = len(rows), summed.hexdigest()
    return facts


def _picked(reader: Any, rows: npt.NDArray[np.int64]) -> Iterator[pa.Array]:
    """The captions of ascending row numbers, block by block."""
    start = 0
    for i in range(reader.num_record_batches):
        column = reader.get_batch(i).column(0)
        low, high = np.searchsorted(rows, [start, start + len(column)])
        if high > low:
            yield column.take(pa.array(rows[low:high] - start))
        start += len(column)
