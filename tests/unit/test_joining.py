"""Joining and splitting requests, as pure functions and through a real small teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import tiny_teacher
from trainer.pool.joining import images, join, payload_bytes, shareable, split, summary
from trainer.teacher import Array, Decode, Denoise, Request, Sample, Teacher

sizes_of_mixes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def request_of(kind: str, size: int, rng: np.random.Generator, **changes: Any) -> Request:
    noise = rng.standard_normal((size, 8, 4, 4)).astype(np.float16)
    captions = [f"caption {value}" for value in rng.integers(1000, size=size)]
    if kind == "decode":
        return Decode(noise)
    if kind == "sample":
        return Sample(noise, captions, steps=3, guidance=2.0, solver="dpm")
    return Denoise(noise, rng.integers(1000, size=size), captions, **changes)


def equal(one: Request, other: Request) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in vars(one)]
    return type(one) is type(other) and all(np.array_equal(a, b) if isinstance(a, Array) else a == b for a, b in pairs)


@given(st.sampled_from(["denoise", "sample", "decode"]), sizes_of_mixes, st.integers(0, 1000))
def test_rows_of_a_joined_request_are_those_of_its_parts_in_order(kind: str, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [request_of(kind, size, rng) for size in sizes]
    whole: Any = join(parts)
    assert images(whole) == sum(sizes) and len({shareable(part) for part in parts}) == 1
    start = 0
    for part in parts:
        rows = slice(start, start := start + images(part))
        taken: Any = {n: v[rows] if isinstance(v, (list, np.ndarray)) else v for n, v in vars(whole).items()}
        assert equal(type(part)(**taken), part)


@given(sizes_of_mixes, st.integers(0, 1000), st.integers(1, 3))
def test_splitting_undoes_joining_replies(sizes: list[int], seed: int, arrays: int) -> None:
    """The expected parts are made first, the whole from them: plain rows, and rows of two blocks as guided features have."""
    rng = np.random.default_rng(seed)
    plain = [[rng.standard_normal((size, 3, 2)) for _ in range(arrays)] for size in sizes]
    halves = [rng.standard_normal((2, size, 4)) for size in sizes]
    whole = [np.concatenate([part[i] for part in plain]) for i in range(arrays)]
    whole.append(np.concatenate([half[block] for block in (0, 1) for half in halves]))
    for reply, expected, half in zip(split(whole, sizes), plain, halves, strict=True):
        for got, wanted in zip(reply, [*expected, half.reshape(-1, 4)], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_a_reply_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rows to a request with 5"):
        split([np.zeros((7, 2))], [2, 3])


@pytest.mark.parametrize("change", [{"guidance": 2.0}, {"feature_names": ("down_blocks.0",)}, {"t_B": np.zeros(2, np.int32)}])
def test_what_cannot_share_a_forward_is_told_apart(change: dict[str, Any]) -> None:
    plain = Denoise(np.zeros((2, 8, 4, 4), np.float16), np.zeros(2, np.int64), ["a", "b"])
    assert shareable(plain) == shareable(Denoise(np.ones((1, 8, 4, 4), np.float16), np.ones(1, np.int64), ["c"]))
    assert shareable(replace(plain, **change)) != shareable(plain)


def test_shapes_types_and_kinds_are_told_apart() -> None:
    kinds = [
        Decode(np.zeros((2, 8, 4, 4), np.float16)), Decode(np.zeros((2, 8, 4, 5), np.float16)), Decode(np.zeros((2, 8, 4, 4), np.float32)),
        Sample(np.zeros((2, 8, 4, 4), np.float16), ["a", "b"], 3, 2.0), Sample(np.zeros((2, 8, 4, 4), np.float16), ["a", "b"], 4, 2.0),
        Sample(np.zeros((2, 8, 4, 4), np.float16), ["a", "b"], 3, 2.0, "dpm"),
    ]  # fmt: skip
    assert len({shareable(kind) for kind in kinds}) == len(kinds)


def test_payload_and_summary_count_by_hand() -> None:
    request = Denoise(np.zeros((2, 4, 8, 8), np.float16), np.zeros(2, np.int64), ["a", "b"])
    assert payload_bytes(request) == 2 * 4 * 8 * 8 * 2 + 2 * 8
    assert payload_bytes([np.zeros((3, 5), np.float32)]) == 60
    assert summary(request) == "Denoise of 2 images 4x8x8, 2 captions"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(tiny_teacher(tmp_path_factory.mktemp("joining") / "teacher"))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["denoise", "sample", "decode"]), st.lists(st.integers(1, 3), min_size=2, max_size=3), st.integers(0, 99), st.booleans()
)  # fmt: skip
def test_a_real_teacher_answers_joined_as_it_does_one_by_one(
    teacher: Teacher, kind: str, sizes: list[int], seed: int, featured: bool
) -> None:
    rng = np.random.default_rng(seed)
    names: dict[str, Any] = {"feature_names": ("down_blocks.0", "up_blocks.1")} if featured and kind == "denoise" else {}
    guidance: dict[str, Any] = {"guidance": 2.0} if seed % 2 and kind == "denoise" else {}
    parts = [request_of(kind, size, rng, **names, **guidance) for size in sizes]
    for reply, part in zip(split(teacher.answer(join(parts)), sizes), parts, strict=True):
        for got, alone in zip(reply, teacher.answer(part), strict=True):
            assert got.dtype == np.float16
            np.testing.assert_allclose(got, alone, rtol=4e-3, atol=4e-3)
