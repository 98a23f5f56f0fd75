"""What is wrong with a data set, row by row. Beside what it lists it needs about 20 bytes of memory a row."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainer.data.files import Files
from trainer.data.images import examine
from trainer.data.kinds import KINDS, OF_FILE
from trainer.data.rows import choose_format, read_rows

CountTokens = Callable[[list[str]], list[int]]


class Fault(NamedTuple):
    """One wrong row: where it is, which kind of fault, in which field, and what is there."""

    place: str
    kind: str
    field: str
    what: str


@dataclass(frozen=True)
class Limits:
    """Faults listed at most; tokens a caption may have, as `count_tokens` counts them, if it does."""

    faults: int = 20
    tokens: int = 77
    count_tokens: CountTokens | None = None


@dataclass
class Report:
    """How many rows there are, how many have no fault, how many each kind of fault, and the first faults in the rows' order."""

    rows: int = 0
    good: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        faults = [{**fault._asdict(), "allowed": KINDS[fault.kind].allowed} for fault in self.faults]
        return {"rows": self.rows, "good": self.good, "kinds": dict(self.kinds), "faults": faults}


def check_prompts(files: Files, kind: str | None, column: str, limits: Limits) -> Report:
    """Every fault of a set of prompts. Raises InvalidRequest when the files are of no one format."""
    kind, entries = choose_format(files, kind, "--format")
    return _Checking(limits).report(read_rows(files, entries, kind, column))


def check_images(files: Files, kind: str | None, column: str, size: int, limits: Limits) -> Report:
    """Every fault of a set of captioned images; each is decoded. Raises InvalidRequest when there are none."""
    return _Checking(limits).report(examine(files, kind, column, size))


class _Checking:
    """Faults of a row alone are noted as it passes, duplicates when all have passed. Rows are numbered over all files, from 0."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.result, self._count = limits, Report(), 0
        self._listed: list[tuple[int, Fault]] = []
        self._wrong, self._indices, self._hashes = array("q"), array("q"), array("Q")
        self._starts, self._places = list[int](), list[pa.Table]()

    def report(self, blocks: Iterator[pa.Table]) -> Report:
        """Look at everything."""
        for block in blocks:
            self._look(block)
        self._duplicates()
        self.result.good = self.result.rows - len(set(self._wrong))
        self.result.faults = [fault for _, fault in sorted(self._listed)[: self.limits.faults]]
        return self.result

    def _look(self, block: pa.Table) -> None:
        start, rows = self._count, block.to_pylist()
        self._starts.append(start)
        self._places.append(_place_columns(block))
        self._count += len(rows)
        self.result.rows += sum(row["kind"] not in OF_FILE for row in rows)
        whole = [i for i, row in enumerate(rows) if not row["kind"]]
        self._indices.extend(start + i for i in whole)
        self._hashes.extend(_hash(rows[i]) for i in whole)
        long = self._too_long(whole, [rows[i]["caption"] for i in whole])
        faults = [(i, row["kind"], row["field"], row["what"]) for i, row in enumerate(rows) if row["kind"]]
        for i, kind, name, what in sorted([*faults, *long]):
            self._note(start + i, kind, name, what)

    def _too_long(self, rows: list[int], captions: list[str]) -> Iterator[tuple[int, str, str, str]]:
        if self.limits.count_tokens and rows:
            for i, tokens in zip(rows, self.limits.count_tokens(captions), strict=True):
                if tokens > self.limits.tokens:
                    yield i, "tokens", "caption", f"{tokens} tokens, of which {self.limits.tokens} are read"

    def _duplicates(self) -> None:
        """Of equal rows all but the first."""
        hash_N, index_N = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._indices, np.int64)
        _, first, which = np.unique(hash_N, return_index=True, return_inverse=True)
        for i in np.flatnonzero(first[which] != np.arange(len(hash_N))).tolist():
            self._note(int(index_N[i]), "duplicate", "caption", int(index_N[first[which[i]]]))

    def _note(self, index: int, kind: str, name: str, what: str | int) -> None:
        """`what` of a duplicate is the number of the first."""
        self.result.kinds[kind] += 1
        if kind not in OF_FILE:
            self._wrong.append(index)
        if sum(listed < index for listed, _ in self._listed) < self.limits.faults:
            said = f"the same as {self._place(what)}" if isinstance(what, int) else what
            self._listed.append((index, Fault(self._place(index), kind, name, said)))

    def _place(self, index: int) -> str:
        block = bisect_right(self._starts, index) - 1
        [found] = self._places[block].slice(index - self._starts[block], 1).to_pylist()
        numbered = f"{found['file']}:{found['row']}" if found["row"] else found["file"]
        return f"{numbered} ({found['key']})" if found["key"] else numbered


def _hash(row: dict[str, Any]) -> int:
    """Of the caption and, where there is one, the image."""
    text = row["caption"].encode() + row.get("sha256", b"")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _place_columns(block: pa.Table) -> pa.Table:
    """Where the rows are; names that repeat are kept once."""
    return pa.table({name: block.column(name).dictionary_encode() for name in ("file", "key")} | {"row": block.column("row")})
