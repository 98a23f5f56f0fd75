"""Requests of several workers as one forward, and its reply as theirs again. Pure functions; knows no teacher, queue or network.

Of a request, arrays and lists have one row per image and are joined; everything else (guidance, steps, solver, feature names) has to be
equal, as have the arrays' types and the shapes of their rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray
R = TypeVar("R")  # a request: a dataclass of trainer.teacher


def images(request: Any) -> int:
    """Rows of a request: its first array's length."""
    return next(len(value) for _, value in _fields(request) if isinstance(value, np.ndarray))


def payload_bytes(values: Any) -> int:
    """Bytes of the arrays of a request or of a reply."""
    parts = values if isinstance(values, list) else [value for _, value in _fields(values)]
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def shareable(request: Any) -> Hashable:
    """Equal for requests that one forward can answer."""
    return (type(request), *(_kind(value) for _, value in _fields(request)))


def join(requests: Sequence[R]) -> R:
    """One request with the rows of all, in order. They must be `shareable` with each other."""
    first = requests[0]
    if len(requests) == 1:
        return first
    columns = {name: [getattr(request, name) for request in requests] for name, _ in _fields(first)}
    return type(first)(**{name: _concatenate(parts) for name, parts in columns.items()})


def split(reply: Sequence[Array], sizes: Sequence[int]) -> list[list[Array]]:
    """The reply to a joined request, cut into those of its parts with `sizes` rows.

    An array may have several rows an image: with guidance the features of all unconditional rows come before those of the
    conditional ones, and a part gets its own of both.

    Raises:
        ValueError: an array's length is not a multiple of the rows asked for.
    """
    if len(sizes) == 1:
        return [list(reply)]
    bounds = list(pairwise(accumulate(sizes, initial=0)))
    cut = [_cut(array, bounds) for array in reply]
    return [[pieces[part] for pieces in cut] for part in range(len(sizes))]


def _cut(array: Array, bounds: list[tuple[int, int]]) -> list[Array]:
    rows = bounds[-1][1]
    if len(array) % rows:
        raise ValueError(f"a reply with {len(array)} rows to a request with {rows}")
    blocks = array.reshape(len(array) // rows, rows, *array.shape[1:])
    return [blocks[:, start:end].reshape(-1, *array.shape[1:]) for start, end in bounds]


def _fields(request: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(request, field.name)) for field in fields(request)]


def _kind(value: Any) -> Hashable:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape[1:]
    return list if isinstance(value, list) else value


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [row for part in parts for row in part] if isinstance(parts[0], list) else parts[0]


def summary(request: Any) -> str:
    """A request in a few words, for messages: kind, images and their shape, captions."""
    rows = next(value for _, value in _fields(request) if isinstance(value, np.ndarray))
    captions = getattr(request, "captions", [])
    return f"{type(request).__name__} of {len(rows)} images {'x'.join(map(str, rows.shape[1:]))}, {len(captions)} captions"
