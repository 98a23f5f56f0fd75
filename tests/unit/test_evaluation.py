"""The report's rows: what is right scores as right, what is wrong does not, and latencies go to the row they were taken from."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxs.bundle import seal
from sdxs.store import FileStore
from tests.models import tiny_folder, tiny_recipe, tiny_teacher
from trainer.artifacts import Artifacts
from trainer.evaluate import SEED, Images, choose_captions, in_batches, to_uint8
from trainer.recipe import DistillRecipe
from trainer.scoring import Comparison, compare, embedded_judge
from trainer.teacher import Teacher
from trainer.worlds.base import get_world

SCENES = get_world("scenes")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def real(captions: list[str], seeds: list[int]) -> Images:
    """A generator that cannot be beaten."""
    return SCENES.reference_images(captions)


def misread(captions: list[str], seeds: list[int]) -> Images:
    """Flawless images, of other captions."""
    return SCENES.reference_images(captions[1:] + captions[:1])


def blank(captions: list[str], seeds: list[int]) -> Images:
    return np.full((len(captions), 32, 32, 3), 128, np.uint8)


def test_scores_tell_right_from_wrong(teacher: Path) -> None:
    evaluation = DistillRecipe.model_validate(tiny_recipe(teacher)).evaluation.model_copy(
        update={"train_images": 96, "heldout_images": 72}
    )
    comparison = Comparison(
        embedded_judge("scenes"), Teacher(teacher), {"real": real, "misread": misread, "blank": blank}, evaluation
    )
    told: list[str] = []
    rows = comparison.scores(told.append)
    assert told == [f"{split} {name}" for split in ("train", "heldout") for name in ("vae", "real", "misread", "blank")]
    for split, count in (("train", 96), ("heldout", 72)):
        scored = {row.row: row for row in rows if row.split == split}
        assert {row.images for row in scored.values()} == {count}
        assert (scored["real"].top1, scored["real"].frechet) == (1.0, pytest.approx(0, abs=1e-3))
        assert scored["misread"].top1 < 0.1
        assert scored["misread"].frechet < 0.05 * scored["blank"].frechet  # the same images in another order
        assert scored["blank"].top1 < 0.1
        assert scored["vae"].top1 < 0.5  # random weights reconstruct nothing
        assert {row.top5 for row in scored.values()} == {None}
        assert {row.latency_ms for row in scored.values()} == {None}


def test_latencies_go_to_their_rows(teacher: Path) -> None:
    def slow(captions: list[str], seeds: list[int]) -> Images:
        time.sleep(0.05)
        return real(captions, seeds)

    evaluation = DistillRecipe.model_validate(tiny_recipe(teacher)).evaluation
    comparison = Comparison(embedded_judge("scenes"), Teacher(teacher), {"teacher": slow, "final": real}, evaluation)
    rows = comparison.scores(lambda _: None)
    timed = comparison.timed(rows)
    assert [(row.split, row.row, row.top1, row.frechet) for row in timed] == [
        (row.split, row.row, row.top1, row.frechet) for row in rows
    ]
    latency = {row.row: row.latency_ms for row in timed}
    assert latency["vae"] is None
    assert latency["teacher"] is not None and latency["teacher"] >= 50
    assert latency["final"] is not None and latency["final"] < latency["teacher"]


def test_a_bundle_is_compared_with_what_the_store_still_has(teacher: Path, tmp_path: Path) -> None:
    recipe = DistillRecipe.model_validate(tiny_recipe(teacher))
    # Same shapes for teacher, student and bundle here; only the rows are looked at.
    bundle = tmp_path / "bundle"
    manifest = seal(tiny_folder(bundle), "tiny", lineage={"teacher": str(teacher), "unet": "u", "warmup": "gone"})
    artifacts = Artifacts(FileStore(tmp_path / "store"), tmp_path / "cache")
    artifacts.save("unet", "u", bundle, {})
    comparison = compare(bundle, manifest, "scenes", recipe.evaluation, artifacts)
    assert list(comparison.generators) == ["teacher", "kd", "naive", "final"]
    [naive], [final] = (comparison.generators[name](["red circle"], [5]) for name in ("naive", "final"))
    assert np.array_equal(naive, final)
    assert final.shape == (32, 32, 3) and final.dtype == np.uint8


def test_seeds_follow_the_caption_and_not_the_batch() -> None:
    asked: list[tuple[str, int]] = []

    def note(captions: list[str], seeds: list[int]) -> Images:
        asked.extend(zip(captions, seeds, strict=True))
        return blank(captions, seeds)

    captions = [str(i) for i in range(70)]
    assert in_batches(note, captions).shape == (70, 32, 32, 3)
    assert asked == [(str(i), SEED + i) for i in range(70)]


def test_captions_are_spread_over_the_split_and_repeated_when_too_few() -> None:
    judge = embedded_judge("scenes")
    everything = SCENES.captions("heldout")
    assert choose_captions(judge, "heldout", 9) == everything[::8]
    assert choose_captions(judge, "heldout", len(everything) + 2) == everything + everything[:2]


def test_pixels_round_as_in_diffusers() -> None:
    values = torch.tensor([-1.2, -1.0, -0.5, 0.0, 0.502, 1.0, 3.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 192, 255, 255]
