"""The order in which rows are drawn: a permutation per epoch that is computed, not stored.

A keyed Feistel network over the bits of a row's number, with cycle walking (Black, Rogaway: Ciphers with arbitrary finite domains,
2002), gives the row at any position from (seed, epoch, position) alone. So nothing is read or kept to continue in the middle, every
number of workers sees the same global order, and 100 million rows cost no more memory than ten. A shuffle of shards and then within
them would leave rows of one shard together, and NumPy does not promise the same permutation in its next version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]
_Words = np.ndarray[Any, np.dtype[np.uint64]]
ROUNDS = 12


@dataclass(frozen=True)
class Order:
    """An endless order of `count` rows, epoch after epoch, each row once an epoch. Its only state is the position, from 0."""

    count: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count {self.count}: an order needs at least one row")

    def take(self, start: int, stop: int) -> Indices:
        """The rows at positions start, ..., stop - 1; they may run over the end of an epoch."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permuted(places[here], self.count, self.seed, int(epoch))
        return rows

    def share(self, step: int, batch: int, rank: int, workers: int) -> Indices:
        """What worker `rank` of `workers` takes of step `step`'s batch: the shares of all, joined in order of rank, are
        take(step * batch, (step + 1) * batch), whatever the number of workers."""
        first = step * batch
        return self.take(first + batch * rank // workers, first + batch * (rank + 1) // workers)


def permuted(place_N: Indices, count: int, seed: int, epoch: int) -> Indices:
    """Rows at the given places (0 <= place < count) of an epoch's permutation."""
    keys, bits = _keys(seed, epoch), max(2, (count - 1).bit_length())
    rows = _feistel(place_N.astype(np.uint64), keys, bits)
    while (outside := rows >= count).any():  # less than half of the domain is outside: on average under two walks
        rows[outside] = _feistel(rows[outside], keys, bits)
    return rows.astype(np.int64)


def _keys(seed: int, epoch: int) -> _Words:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    words = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mixed(words ^ np.uint64(int.from_bytes(digest, "little")))


def _feistel(value_N: _Words, keys: _Words, bits: int) -> _Words:
    """A permutation of 0, ..., 2^bits - 1: the halves take turns in changing each other."""
    low = np.uint64(bits // 2)
    left, right = value_N >> low, value_N & np.uint64((1 << (bits // 2)) - 1)
    left_mask, right_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ (_mixed(right ^ first) & left_mask)
        right = right ^ (_mixed(left ^ second) & right_mask)
    return (left << low) | right


def _mixed(word_N: _Words) -> _Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    word_N = (word_N ^ (word_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word_N = (word_N ^ (word_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word_N ^ (word_N >> np.uint64(31))
