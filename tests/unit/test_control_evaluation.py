"""ControlNets in a bundle beside the teacher's: who sees which control images, what is measured against what, and where it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import nn

from sdxs import bundle
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from sdxs.store import FileStore
from tests.models import tiny_folder, tiny_recipe, tiny_teacher
from trainer import recipe as recipes
from trainer.artifacts import Artifacts
from trainer.evaluation.card import read_rows
from trainer.evaluation.control import (
    Way,
    compare_controls,
    maps_of,
    shares,
)
from trainer.evaluation.control_card import add_control_card
from trainer.evaluation.generators import SEED, Images, choose_captions, served
from trainer.evaluation.metrics.edges import colour_error
from trainer.evaluation.rows import Row, markdown
from trainer.evaluation.run import Request, evaluate_request
from trainer.models.controlnets import from_unet
from trainer.recipe import ControlRecipe
from trainer.worlds.base import get_world

WORLD = get_world("scenes")
ROWS = ["teacher", "teacher+control", "final", "warmup+control", "final+control"]


def random_controlnet(unet: Path, folder: Path, seed: int) -> Path:
    """One whose residuals are not zero."""
    torch.manual_seed(seed)
    made = from_unet(UNet2DConditionModel.from_pretrained(unet), 8)
    for name, weight in made.named_parameters():
        if "controlnet_" in name and weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    made.save_pretrained(folder)
    return folder


def recipe_data(teacher: Path, controlnet: Path) -> dict[str, Any]:
    base = tiny_recipe(teacher)
    return {
        "kind": "control", "name": "tiny", "world": "scenes", "base": "unused", "teacher": str(teacher), "controlnet": str(controlnet),
        "conditions": ["edge", "sketch", "colour"], "pairs": base["pairs"], "unet": base["unet"],
        "shrink": {"steps": 2, "batch": 4, "lr": 1e-3},
        "evaluation": {"train_images": 4, "heldout_images": 5, "teacher_steps": 2},
    }  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SDXS_STORE_URL", f"file://{tmp_path}/store")
    return Settings()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_teacher(tmp_path_factory.mktemp("teacher"))
    random_controlnet(folder / "unet", folder / "controlnet", 1)
    return folder


@pytest.fixture
def made(teacher: Path, tmp_path: Path) -> Path:
    """A bundle with a ControlNet, its warm-up in the store."""
    folder = tiny_folder(tmp_path / "bundle")
    own = random_controlnet(folder / "unet", folder / "controlnet" / "union", 2)
    (own / "control_types.json").write_text('["edge", "sketch", "colour"]')
    (own / "recipe.json").write_text(json.dumps(recipe_data(teacher, teacher / "controlnet")))
    lineage = {"unet": "u", "controlnet/union/control_warmup": "w", "controlnet/union/control_diff_instruct": "d"}
    bundle.seal(folder, "tiny", lineage=lineage, metrics={"heldout_top1": 0.5})
    warmed = tmp_path / "warmed"
    random_controlnet(folder / "unet", warmed / "controlnet", 3)
    Artifacts(FileStore(tmp_path / "store" / "checkpoints"), tmp_path / "cache" / "artifacts").save(
        "control_warmup", "w", warmed, {}
    )
    return folder


def opened(folder: Path) -> ControlRecipe:
    return recipes.of_controlnet(folder / "controlnet" / "union")


def test_rows_of_a_bundle(made: Path, settings: Settings) -> None:
    comparison = compare_controls(made, bundle.read(made), "union", opened(made), settings)
    assert list(comparison.ways) == ROWS and comparison.notes() == []
    told: list[str] = []
    rows = comparison.scores(told.append)
    kinds = ("edge", "sketch", "colour")
    assert [(row.split, row.condition, row.row) for row in rows] == [
        (split, kind, name) for split in ("train", "heldout") for kind in kinds for name in ROWS
    ]
    assert len(told) == len(set(told)) == 2 * (2 + 3 * 3)
    assert {row.images for row in rows if row.split == "heldout"} == {5}
    for row in rows:
        assert set(row.scores) == ({"colour_error"} if row.condition == "colour" else {"edge_f1"})
        assert row.top1 is not None and row.frechet is not None
    free = {row.condition: row for row in rows if row.split == "heldout" and row.row == "final"}
    assert len({(row.top1, row.frechet) for row in free.values()}) == 1
    controlled = [row for row in rows if row.split == "heldout" and row.row == "final+control"]
    assert len({row.frechet for row in controlled}) == 3


def test_everybody_is_measured_against_the_same_maps(made: Path, settings: Settings) -> None:
    """Real images keep to the edges and colours that were extracted from them, blank ones to nothing, a drawn map to itself."""
    comparison = compare_controls(made, bundle.read(made), "union", opened(made), settings)

    def real(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        return WORLD.reference_images(captions)

    def shown(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        assert map_NHWC is not None
        return map_NHWC

    def blank(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        return np.zeros((len(captions), 32, 32, 3), np.uint8)

    ways = {"real": Way(real, False), "shown": Way(shown, True), "blank": Way(blank, True)}
    rows = replace(comparison, ways=ways).scores(lambda _: None)
    found = {(row.condition, row.row): row for row in rows if row.split == "heldout"}
    assert found["edge", "real"].scores == {"edge_f1": 1.0} and found["edge", "blank"].scores == {"edge_f1": 0.0}
    assert 0.2 < found["sketch", "real"].scores["edge_f1"] < 1
    assert found["colour", "real"].scores["colour_error"] < 0.5 > found["colour", "shown"].scores["colour_error"]
    assert found["colour", "blank"].scores["colour_error"] > 20
    assert found["edge", "real"].frechet == pytest.approx(0, abs=1e-3) and found["edge", "real"].top1 == 1.0


def test_bent_images_are_a_split_of_their_own(made: Path, settings: Settings) -> None:
    """Of held-out captions; who keeps to the map scores there, who draws the usual picture does not."""
    recipe = opened(made)
    bent = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"warp": 1.0})})
    comparison = compare_controls(made, bundle.read(made), "union", bent, settings)

    def usual(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        return WORLD.reference_images(captions)

    def shown(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        assert map_NHWC is not None
        return map_NHWC

    ways = {"teacher+control": Way(shown, True), "final": Way(usual, False)}
    rows = replace(comparison, ways=ways).scores(lambda _: None)
    found = {(row.split, row.condition, row.row): row for row in rows}
    assert list(dict.fromkeys(row.split for row in rows)) == ["train", "heldout", "heldout-bent"]
    names = [row.row for row in rows if (row.split, row.condition) == ("heldout-bent", "edge")]
    assert names == ["bent images", "teacher+control", "final"]
    best = found["heldout-bent", "edge", "bent images"]
    assert (best.scores, best.frechet) == ({"edge_f1": 1.0}, pytest.approx(0, abs=1e-3))
    assert found["heldout", "edge", "final"].scores["edge_f1"] == 1.0
    assert found["heldout-bent", "edge", "final"].scores["edge_f1"] < 0.8
    assert found["heldout-bent", "colour", "final"].scores["colour_error"] > 3
    assert found["heldout-bent", "colour", "teacher+control"].scores["colour_error"] < 0.5
    captions = choose_captions(WORLD, "heldout", 5)
    again = replace(comparison, ways=ways).scores(lambda _: None)
    assert again == rows and len(captions) == best.images
    [untimed] = replace(comparison, ways=ways).timed([best])
    assert untimed == best and untimed.latency_ms is None
    assert comparison.sheet(3, seeds=(0,)).height > 3 * 64


def test_images_are_those_of_the_maps(made: Path, settings: Settings) -> None:
    """The last row made again by hand: one image at a time, each map from its real image."""
    comparison = compare_controls(made, bundle.read(made), "union", opened(made), settings)
    captions = choose_captions(WORLD, "heldout", 5)
    maps = maps_of(WORLD.reference_images(captions), captions, "colour")
    generate = served(made, bundle.read(made), controlnet=made / "controlnet" / "union")
    images = np.concatenate([generate([caption], [SEED + i], maps[i : i + 1]) for i, caption in enumerate(captions)])
    rows = {(row.split, row.condition, row.row): row for row in comparison.scores(lambda _: None)}
    expected = colour_error(images, maps)
    assert rows["heldout", "colour", "final+control"].scores["colour_error"] == pytest.approx(expected, abs=0.1)
    without = generate(captions, list(range(SEED, SEED + 5)))
    assert not np.array_equal(images, without)
    assert rows["heldout", "colour", "final"].scores["colour_error"] == pytest.approx(colour_error(without, maps), abs=0.01)


def test_a_caption_has_one_sketch() -> None:
    captions = WORLD.captions("train")[:3]
    real = WORLD.reference_images(captions)
    together = maps_of(real, captions, "sketch")
    assert np.array_equal(maps_of(real[2:], captions[2:], "sketch")[0], together[2])
    assert together.shape == real.shape and set(np.unique(together)) == {0, 255}


def test_ways_are_shown_their_own_maps() -> None:
    seen: list[tuple[str, int, int | None]] = []

    def generate(captions: list[str], seeds: list[int], map_NHWC: Images | None = None, /) -> Images:
        values = [None] * len(captions) if map_NHWC is None else map_NHWC[:, 0, 0, 0].tolist()
        seen.extend(zip(captions, seeds, values, strict=True))
        return np.zeros((len(captions), 8, 8, 3), np.uint8)

    captions = [str(i) for i in range(70)]
    maps = np.stack([np.full((8, 8, 3), i, np.uint8) for i in range(70)])
    assert Way(generate, True).images(captions, maps).shape == (70, 8, 8, 3)
    assert seen == [(str(i), SEED + i, i) for i in range(70)]
    seen.clear()
    Way(generate, False).images(captions, maps)
    assert seen == [(str(i), SEED + i, None) for i in range(70)]


def test_times_and_card(made: Path, settings: Settings) -> None:
    recipe = opened(made)
    comparison = compare_controls(made, bundle.read(made), "union", recipe, settings)
    rows = comparison.timed(comparison.scores(lambda _: None))
    one = {row.row: row for row in rows if (row.split, row.condition) == ("heldout", "edge")}
    theirs, ours = one["teacher+control"], one["final+control"]
    assert theirs.latency_ms and ours.latency_ms and ours.scores["ms_with_map"] > ours.latency_ms
    assert ours.scores["times_faster"] == pytest.approx(theirs.latency_ms / ours.latency_ms, abs=0.01)
    assert theirs.scores["times_faster"] == 1.0 and "ms_with_map" not in one["final"].scores
    assert theirs.gflop and one["teacher"].gflop and theirs.gflop > one["teacher"].gflop
    manifest = add_control_card(made, "union", recipe, rows, 0.875, ["something was not measured"])
    own = made / "controlnet" / "union"
    assert read_rows(own) == rows
    text = (own / "README.md").read_text()
    assert markdown(rows) in text and "**Note**: something was not measured." in text and "87.5%" in text
    assert all(line in text for line in shares(rows))
    assert manifest == bundle.read(made) and manifest.metrics["heldout_top1"] == 0.5
    assert manifest.metrics["controlnet/union/heldout_edge_edge_f1"] == ours.scores["edge_f1"]
    assert not any("faster" in name or "ms_" in name for name in manifest.metrics)
    assert manifest.lineage["controlnet/union/control_warmup"] == "w"


def test_what_the_store_lost_is_said_and_taken_from_the_record(made: Path, settings: Settings, tmp_path: Path) -> None:
    manifest = bundle.read(made)
    lost = manifest.model_copy(update={"lineage": manifest.lineage | {"controlnet/union/control_warmup": "gone"}})
    comparison = compare_controls(made, lost, "union", opened(made), settings)
    assert list(comparison.ways) == [name for name in ROWS if name != "warmup+control"]
    assert any("warmup+control was not measured" in note for note in comparison.notes())


def test_the_command(made: Path, settings: Settings, tmp_path: Path) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    request = Request([str(made)], images=4, controls=True, output=sheet)
    report = evaluate_request(request, settings, Console(quiet=True))
    assert len(report.rows) == 2 * 3 * len(ROWS) and sheet.is_file()
    assert any("edge F1" in note for note in report.notes)
    with pytest.raises(InvalidRequest, match=r"^output: .*\.png"):
        evaluate_request(Request([str(made)], controls=True, output=tmp_path / "page.html"), settings, Console(quiet=True))
    without = tiny_folder(tmp_path / "without")
    bundle.seal(without, "without")
    with pytest.raises(InvalidRequest, match="a ControlNet that carries"):
        evaluate_request(Request([str(without)], controls=True), settings, Console(quiet=True))


def test_a_sheet_has_control_images_and_results(made: Path, settings: Settings) -> None:
    comparison = compare_controls(made, bundle.read(made), "union", opened(made), settings)
    picture = comparison.sheet(3, seeds=(0, 1))
    assert picture.width > picture.height > 3 * 64  # image, map, two of the teacher, two of the student, one without


def test_shares_are_of_the_teacher() -> None:
    rows = [
        Row("emoji", "heldout", "teacher+control", 0.5, 0.8, 1.0, 90.0, 4, scores={"edge_f1": 0.9}, condition="edge"),
        Row("emoji", "heldout", "final+control", 0.4, 0.72, 1.0, 3.0, 4, scores={"edge_f1": 0.864, "times_faster": 30.0}, condition="edge"),
        Row("emoji", "heldout", "final", 0.4, 0.72, 1.0, 3.0, 4, condition="sketch"),
    ]  # fmt: skip
    [line] = shares(rows)
    assert line.startswith("heldout, edge") and "96.0% of its edge F1, 90.0% of its top-5, 30.0 times as fast" in line
    scenes = [Row("scenes", row.split, row.row, row.top1, None, 1.0, None, 4, condition=row.condition) for row in rows]
    assert "80.0% of its top-1" in shares(scenes)[0]
