"""Tensors one after the other, read as one: shards stay where they are, mapped into memory, and no process has a copy of them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Joined:
    """Parts of shape (n_i, ...), all of one type, as (N, ...). Rows are copied when they are taken."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])

    @classmethod
    def of(cls, *values: Tensor | Joined) -> Joined:
        """All rows of these."""
        return cls([part for value in values for part in (value.parts if isinstance(value, Joined) else (value,))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def __getitem__(self, rows: Tensor | Sequence[int] | slice | int) -> Tensor:
        """As of a tensor: rows by their numbers, from 0 on, a slice of them, or one."""
        if isinstance(rows, int):
            return self[[rows]][0]
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        found = torch.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        holder = np.searchsorted(self._starts, wanted, side="right") - 1
        for part in np.unique(holder):
            place = np.flatnonzero(holder == part)
            found[torch.from_numpy(place)] = self.parts[part][torch.from_numpy(wanted[place] - self._starts[part])]
        return found
