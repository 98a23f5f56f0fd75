"""The report's rows: what is right scores as right, what is wrong does not, and latencies go to the row they were taken from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdxs.bundle import read, seal
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.store import FileStore
from tests.models import tiny_folder, tiny_recipe, tiny_teacher
from tests.networks import tiny_clip
from trainer.artifacts import Artifacts
from trainer.evaluation import scoring
from trainer.evaluation.generators import (
    SEED,
    Generate,
    Images,
    choose_captions,
    gflops,
    in_batches,
    multi_step,
    served,
    to_uint8,
)
from trainer.evaluation.metrics.clip import ClipFeatures
from trainer.evaluation.metrics.flops import gflop
from trainer.evaluation.metrics.networks import Networks, distribution_scores
from trainer.evaluation.scoring import DIVERSITY_SEED, REFERENCE_SEED, Comparison, compare, compare_recipe, embedded_judge
from trainer.recipe import DistillRecipe
from trainer.sections import EvaluationSection
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
        right = {name: row.top1 or 0.0 for name, row in scored.items()}
        assert right["misread"] < 0.1 and right["blank"] < 0.1 and right["vae"] < 0.5  # random weights reconstruct nothing
        distance = {name: row.frechet or 0.0 for name, row in scored.items()}
        assert distance["misread"] < 0.05 * distance["blank"]  # the same images in another order
        assert scored["misread"].scores["kid_judge"] < 0 < scored["blank"].scores["kid_judge"]
        assert scored["misread"].scores["precision_judge"] == scored["misread"].scores["recall_judge"] == 1.0
        assert scored["blank"].scores["recall_judge"] == 0.0
        assert scored["real"].scores["diversity_judge"] == pytest.approx(0, abs=1e-6)
        assert "diversity_judge" not in scored["vae"].scores
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


@dataclass(frozen=True)
class OwnPrompts:
    """Prompts without a world, and none held out."""

    words: tuple[str, ...] = ("a red cat", "a blue dog", "green sky", "two cats", "rain")

    def captions(self, split: str) -> list[str]:
        return list(self.words) if split == "train" else []


def own(teacher: Path, generators: dict[str, Generate], networks: Networks | None = None) -> Comparison:
    evaluation = EvaluationSection(
        train_images=6, heldout_images=6, teacher_steps=2, teacher_guidance=2.0, diversity_prompts=2, diversity_images=3
    )
    loaded = Teacher(teacher)
    made = {"teacher": multi_step(loaded, evaluation), **generators}
    return Comparison(None, loaded, made, evaluation, networks or Networks(), OwnPrompts())


def test_flops_of_a_row_are_those_of_its_networks(teacher: Path) -> None:
    """Guidance doubles the U-Net, each step repeats it; the decoder runs once, the text encoder not at all. Counted on the meta device."""
    loaded = Teacher(teacher)
    evaluation = DistillRecipe.model_validate(tiny_recipe(teacher)).evaluation
    found = gflops({"teacher": multi_step(loaded, evaluation)}, "red circle")["teacher"]
    with torch.device("meta"), torch.no_grad():
        latent, t, text = torch.empty(1, 8, 4, 4), torch.empty(1, dtype=torch.long), torch.empty(1, 16, 32)
        unet, vae = UNet2DConditionModel.from_config(loaded.unet.config), AutoencoderKL.from_config(loaded.vae.config)
        once, decode = gflop(lambda: unet(latent, t, text)), gflop(lambda: vae.decode(latent))
    assert found == pytest.approx(evaluation.teacher_steps * 2 * once + decode, rel=1e-5)


def test_prompts_without_a_judge_are_measured_against_the_teacher(teacher: Path, tmp_path: Path) -> None:
    clip = ClipFeatures(str(tiny_clip(tmp_path / "clip", seed=3)))
    comparison = own(teacher, {"blank": blank}, Networks(clip=clip))
    told: list[str] = []
    rows = {row.row: row for row in comparison.scores(told.append)}
    assert told == ["train reference", "train teacher", "train blank"]
    assert {(row.world, row.top1, row.top5, row.frechet) for row in rows.values()} == {(None, None, None, None)}
    assert rows["blank"].scores["diversity_clip"] == pytest.approx(0, abs=1e-6)
    assert rows["teacher"].scores["diversity_clip"] > 0.001
    captions = choose_captions(OwnPrompts(), "train", 6)
    made = comparison.generators["teacher"]
    real, again = in_batches(made, captions, REFERENCE_SEED), in_batches(made, captions)
    assert not np.array_equal(real, again)
    for name, images in (("teacher", again), ("blank", blank(captions, []))):
        expected = distribution_scores(clip, clip.features(real), clip.features(images))
        assert {key: rows[name].scores[key] for key in expected} == expected
        assert rows[name].scores["clip_score"] == pytest.approx(clip.score(images, captions), abs=1e-3)
    assert any("heldout" in note for note in comparison.notes()) and any(
        "teacher's images" in note for note in comparison.notes()
    )


def test_without_any_network_what_cannot_be_measured_is_said(teacher: Path) -> None:
    comparison = own(teacher, {"blank": blank})
    rows = comparison.timed(comparison.scores(lambda _: None))
    assert [set(row.scores) for row in rows] == [{"diversity_latents"}] * 2
    assert all(row.latency_ms is not None and row.gflop is not None for row in rows)
    assert rows[1].scores["diversity_latents"] == pytest.approx(0, abs=1e-6) and rows[0].scores["diversity_latents"] > 0
    notes = " ".join(comparison.notes())
    assert "not measured" in notes and "--inception" in notes and "--clip" in notes and "latents" in notes


def test_a_bundle_of_own_prompts_is_measured_beside_its_teacher(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "prompt_source", lambda *_: OwnPrompts())
    data = {**tiny_recipe(teacher), "world": None, "data": {"prompts": "mine.txt"}}
    folder = tiny_folder(tmp_path / "bundle")
    manifest = seal(folder, "tiny", lineage={"teacher": str(teacher)})
    comparison = compare_recipe(folder, manifest, DistillRecipe.model_validate(data), Settings())
    assert comparison.judge is None and comparison.networks.all() == []
    assert [(row.split, row.row) for row in comparison.scores(lambda _: None)] == [("train", "teacher"), ("train", "final")]
    expected = OneStepPipeline.from_bundle(folder).generate("rain", 5)
    assert np.array_equal(comparison.generators["final"](["rain"], [5])[0], expected)


def test_diversity_is_taken_under_the_same_prompts_and_noise(teacher: Path) -> None:
    asked: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}

    def noting(name: str) -> Generate:
        def generate(captions: list[str], seeds: list[int]) -> Images:
            asked[name] += [pair for pair in zip(captions, seeds, strict=True) if pair[1] >= DIVERSITY_SEED]
            return blank(captions, seeds)

        return generate

    own(teacher, {"a": noting("a"), "b": noting("b")}).scores(lambda _: None)
    words = OwnPrompts().words
    assert asked["a"] == asked["b"] == [(words[i // 3 * 2], DIVERSITY_SEED + i) for i in range(6)]


def test_a_bundle_alone_makes_what_is_served(tiny_bundle: Path) -> None:
    expected = OneStepPipeline.from_bundle(tiny_bundle).generate("red circle", 5)
    assert np.array_equal(served(tiny_bundle, read(tiny_bundle))(["red circle"], [5])[0], expected)


def test_seeds_follow_the_caption_and_not_the_batch() -> None:
    asked: list[tuple[str, int]] = []

    def note(captions: list[str], seeds: list[int]) -> Images:
        asked.extend(zip(captions, seeds, strict=True))
        return blank(captions, seeds)

    captions = [str(i) for i in range(70)]
    assert in_batches(note, captions).shape == (70, 32, 32, 3)
    assert asked == [(str(i), SEED + i) for i in range(70)]


def test_captions_are_spread_over_the_split_and_repeated_when_too_few() -> None:
    everything = SCENES.captions("heldout")
    assert choose_captions(SCENES, "heldout", 9) == everything[::8]
    assert choose_captions(SCENES, "heldout", len(everything) + 2) == everything + everything[:2]


def test_pixels_round_as_in_diffusers() -> None:
    values = torch.tensor([-1.2, -1.0, -0.5, 0.0, 0.502, 1.0, 3.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 192, 255, 255]
