"""What training needs to know of where prompts come from: a world and a data set of one's own answer the same three questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from trainer.recipe import digest
from trainer.worlds.base import World

Split = Literal["train", "heldout"]
Rows = Sequence[int] | npt.NDArray[np.int64]


class PromptSource(Protocol):
    """Prompts in two splits that share none."""

    @property
    def digest(self) -> str:
        """Of all prompts, their order and their split."""
        ...

    def count(self, split: Split) -> int:
        """How many prompts the split has."""
        ...

    def take(self, split: Split, indices: Rows) -> list[str]:
        """The prompts at these indices of the split, in their order. Raises IndexError when there is no such index."""
        ...


class WorldPrompts:
    """The captions of a world."""

    def __init__(self, world: World) -> None:
        self._captions: dict[Split, list[str]] = {"train": world.captions("train"), "heldout": world.captions("heldout")}
        self.digest = digest(self._captions)

    def count(self, split: Split) -> int:
        return len(self._captions[split])

    def take(self, split: Split, indices: Rows) -> list[str]:
        captions = self._captions[split]
        return [captions[checked(int(i), len(captions))] for i in indices]


class NoPrompts:
    """Of a run whose captions come with its images."""

    digest = "none"

    def count(self, split: Split) -> int:
        return 0

    def take(self, split: Split, indices: Rows) -> list[str]:
        return [[""][checked(int(i), 0)] for i in indices]


class Captions(Sequence[str]):
    """A split as a sequence that reads what is asked for: `Captions(source, "train")[5:9]`, `len`, iteration."""

    CHUNK = 4096

    def __init__(self, source: PromptSource, split: Split) -> None:
        self.source, self.split, self._count = source, split, source.count(split)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.source.take(self.split, range(*index.indices(self._count)))
        return self.source.take(self.split, [index + self._count if index < 0 else index])[0]

    def take(self, indices: Rows) -> list[str]:
        """The prompts at these indices, looked up together."""
        return self.source.take(self.split, indices)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._count, self.CHUNK):
            yield from self.source.take(self.split, range(start, min(start + self.CHUNK, self._count)))


def checked(index: int, count: int) -> int:
    """An index that is there; negative ones are not. Raises IndexError."""
    if not 0 <= index < count:
        raise IndexError(f"index {index}: there are {count} prompts")
    return index
