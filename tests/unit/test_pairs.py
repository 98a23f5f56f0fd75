"""Pairs: every row can be made again from its seed and caption alone, however the requests were batched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxs.errors import InvalidRequest
from sdxs.noise import latent_noise
from tests.models import tiny_teacher
from trainer import pairs as module
from trainer.diffusion import sample
from trainer.pairs import Pairs, PairsOrder, draw_pairs, recombine
from trainer.sections import PairsSection
from trainer.teacher import InProcessTeacher, Teacher

SHAPE = (8, 4, 4)
CAPTIONS = ["a red circle", "blue star", "green square"]
SECTION = PairsSection(count=11, steps=3, guidance=2.0, solver="dpm")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(tiny_teacher(tmp_path_factory.mktemp("models") / "teacher"))


def drawn(teacher: Teacher, section: PairsSection = SECTION, seed: int = 3) -> Pairs:
    return draw_pairs(InProcessTeacher(teacher), PairsOrder.of(CAPTIONS, section, SHAPE, seed), lambda _done: None)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_a_row_is_the_teachers_sample_of_its_seeds_noise(teacher: Teacher, solver: str) -> None:
    section = SECTION.model_copy(update={"solver": solver})
    pairs = drawn(teacher, section)
    for i in (0, 5, 10):
        noise = torch.from_numpy(latent_noise(int(pairs.seed_N[i]), SHAPE))[None]
        with torch.no_grad():
            predict = teacher.guided([pairs.captions[i]], 2.0)
            alone = sample(predict, noise, teacher.scheduler_config, 3, solver)[0]
        torch.testing.assert_close(pairs.latent_NCHW[i].float(), alone, rtol=2e-3, atol=2e-3)
        assert (alone - noise[0]).abs().max() > 0.1


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (4, 2), (11, 6)])
def test_rows_do_not_depend_on_how_they_were_asked_for(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, batch: int, in_flight: int
) -> None:
    expected = drawn(teacher)
    monkeypatch.setattr(module, "BATCH", batch)
    monkeypatch.setattr(module, "IN_FLIGHT", in_flight)
    found = drawn(teacher)
    assert (found.captions, found.seed_N.tolist()) == (expected.captions, expected.seed_N.tolist())
    torch.testing.assert_close(found.latent_NCHW[:].float(), expected.latent_NCHW[:].float(), rtol=2e-3, atol=2e-3)


def test_captions_go_round_and_seeds_never_meet(teacher: Teacher) -> None:
    pairs, other = drawn(teacher), drawn(teacher, seed=4)
    assert sorted(Counter(pairs.captions).values()) == [3, 4, 4]
    for start in range(0, 9, 3):
        assert set(pairs.captions[start : start + 3]) == set(CAPTIONS)
    assert pairs.seed_N.tolist() == [3 * 2**32 + i for i in range(11)]
    assert not set(pairs.seed_N.tolist()) & set(other.seed_N.tolist())
    assert pairs.latent_NCHW.dtype == torch.float16


def test_each_row_is_drawn_under_the_map_of_its_own_caption_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "SHARD", 8)
    order = PairsOrder.of(CAPTIONS, SECTION, SHAPE, 3, lambda number, seed: np.array([number, seed - (3 << 32)]))
    asked = [request for shard in order.shards() for request in shard.requests()]
    assert [len(request.captions) for request in asked] == [4, 4, 3]
    maps, captions = np.concatenate([r.control_BHWC for r in asked]), [c for r in asked for c in r.captions]
    assert maps[:, 1].tolist() == list(range(11))
    assert [CAPTIONS[number] for number in maps[:, 0]] == captions == order.captions
    plain = PairsOrder.of(CAPTIONS, SECTION, SHAPE, 3)
    assert plain.captions == captions and all(request.control_BHWC is None for request in plain.requests())


def test_progress_counts_up_to_all(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    told: list[int] = []
    draw_pairs(InProcessTeacher(teacher), PairsOrder.of(CAPTIONS, SECTION, SHAPE, 3), told.append)
    assert told == [4, 8, 11]


def test_a_saved_file_is_read_back(teacher: Teacher, tmp_path: Path) -> None:
    pairs = drawn(teacher)
    pairs.save(tmp_path / "pairs.safetensors")
    read = Pairs.load(tmp_path)
    assert read.captions == pairs.captions
    assert torch.equal(read.latent_NCHW[:], pairs.latent_NCHW[:])
    assert torch.equal(read.seed_N, pairs.seed_N)


def test_a_batch_hands_out_each_rows_own_noise_latent_and_caption(teacher: Teacher) -> None:
    pairs = drawn(teacher)
    noise, latent, captions = pairs.draw(64, torch.Generator().manual_seed(0))
    again = pairs.draw(64, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again[0]) and captions == again[2]
    assert noise.dtype == latent.dtype == torch.float32
    seen = set()
    for one_noise, one_latent, text in zip(noise, latent, captions, strict=True):
        [row] = [i for i in range(11) if torch.equal(pairs.latent_NCHW[i].float(), one_latent)]
        seen.add(row)
        assert pairs.captions[row] == text
        np.testing.assert_array_equal(one_noise.numpy(), latent_noise(int(pairs.seed_N[row]), SHAPE))
    assert seen == set(range(11))


def test_added_pairs_keep_their_rows(teacher: Teacher) -> None:
    first, second = drawn(teacher), drawn(teacher, seed=4)
    both = first + second
    assert both.captions == [*first.captions, *second.captions]
    assert torch.equal(both.seed_N[11:], second.seed_N)
    assert torch.equal(both.latent_NCHW[:11], first.latent_NCHW[:])


WORDS = st.sampled_from(["red", "blue", "heart", "apple", "pie"])
CAPTION_LISTS = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), min_size=2, max_size=12, unique=True)


@given(captions=CAPTION_LISTS, held_out=CAPTION_LISTS, seed=st.integers(0, 99))
def test_recombined_prompts_are_new_and_made_of_two_captions(captions: list[str], held_out: list[str], seed: int) -> None:
    try:
        prompts = recombine(captions, set(held_out), 20, seed)
    except InvalidRequest:
        return
    assert prompts == recombine(captions, set(held_out), 20, seed)
    assert len(set(prompts)) == len(prompts) <= 20
    assert not set(prompts) & (set(captions) | set(held_out))
    begins = {tuple(c.split()[:k]) for c in captions for k in range(1, 5)}
    ends = {tuple(c.split()[k:]) for c in captions for k in range(4)}
    for words in (tuple(prompt.split()) for prompt in prompts):
        assert any(words[:k] in begins and words[k:] in ends for k in range(1, len(words)))
        assert len(words) <= max(len(c.split()) for c in captions)


def test_captions_without_a_word_in_common_cannot_be_recombined() -> None:
    with pytest.raises(InvalidRequest, match="share words"):
        recombine(["red apple", "blue heart"], set(), 4, 0)
