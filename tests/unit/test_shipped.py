"""What ships: sizes, cards, and judges as good as they say."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import sdxs
import trainer
from sdxs import Control, OneStepPipeline, bundle
from sdxs.control import map_of
from trainer import recipe as recipes
from trainer.evaluation.card import read_rows
from trainer.evaluation.metrics.edges import mean_edge_f1
from trainer.evaluation.scoring import embedded_judge
from trainer.recipe import ControlNetRecipe

BUNDLE = Path(sdxs.__file__).parent / "bundles" / "emoji"
ASSETS = Path(trainer.__file__).parent / "assets"
MB = 1_000_000


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_sizes() -> None:
    assert weights_bytes(ASSETS / "emoji" / "teacher") <= 16 * MB
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    controlnet = [path for path in files if BUNDLE / "controlnet" in path.parents]
    assert sum(path.stat().st_size for path in set(files) - set(controlnet)) <= 8 * MB
    assert weights_bytes(ASSETS / "emoji" / "controlnet") + sum(path.stat().st_size for path in controlnet) <= 8 * MB


@pytest.mark.parametrize("world", ["emoji", "scenes"])
def test_a_teacher_ships_with_recipe_log_and_card(world: str) -> None:
    folder = ASSETS / world / "teacher"
    assert json.loads((folder / "recipe.json").read_text())["name"] == f"{world}-teacher"
    stages = {json.loads(line)["stage"] for line in (folder / "training.jsonl").read_text().splitlines()}
    assert stages == {"judge", "autoencoder", "denoiser"}
    assert (folder / "README.md").read_text().startswith(f"# {world}-teacher")


def test_the_bundle_ships_with_all_rows_of_its_evaluation() -> None:
    rows = read_rows(BUNDLE)
    expected = [(split, row) for split in ("train", "heldout") for row in ("vae", "teacher", "kd", "naive", "warmup", "final")]
    assert [(row.split, row.row) for row in rows] == expected
    metrics = bundle.read(BUNDLE).metrics
    for row in rows:
        if row.row == "final":
            assert (metrics[f"{row.split}_top1"], metrics[f"{row.split}_frechet"]) == (row.top1, row.frechet)


@pytest.mark.parametrize("world", ["emoji", "scenes"])
def test_a_teachers_controlnet_ships_with_recipe_log_and_card(world: str) -> None:
    folder = ASSETS / world / "controlnet"
    recipe = recipes.load(f"{world}-teacher-controlnet")
    assert isinstance(recipe, ControlNetRecipe)
    assert json.loads((folder / "recipe.json").read_text()) == recipe.model_dump(mode="json")
    assert json.loads((folder / "control_types.json").read_text()) == list(recipe.conditions)
    assert f'{{"step": {recipe.controlnet.steps}, ' in (folder / "training.txt").read_text()
    assert (folder / "README.md").read_text().startswith(f"# {world}-teacher-controlnet")


def test_the_bundles_controlnet_is_that_of_its_recipe_and_as_good_as_its_teachers() -> None:
    own = BUNDLE / "controlnet" / "union"
    assert json.loads((own / "recipe.json").read_text()) == recipes.load("emoji-control").model_dump(mode="json")
    rows = {(row.split, row.condition, row.row): row for row in read_rows(own)}
    for split, kind in product(("train", "heldout", "heldout-bent"), ("edge", "sketch", "colour")):
        theirs, ours = rows[split, kind, "teacher+control"], rows[split, kind, "final+control"]
        assert theirs.top5 and ours.top5 and ours.top5 >= 0.85 * theirs.top5
        assert ours.scores["times_faster"] >= 30
        if kind != "colour":
            assert ours.scores["edge_f1"] >= 0.95 * theirs.scores["edge_f1"]
    metrics = bundle.read(BUNDLE).metrics
    assert metrics["controlnet/union/heldout_edge_edge_f1"] == rows["heldout", "edge", "final+control"].scores["edge_f1"]


def test_the_bundle_follows_drawings_by_hand() -> None:
    """Lines of the drawing against edges of the image, of every drawing in examples/sketches; without it the usual emoji are drawn."""
    pipeline, folder = OneStepPipeline.from_bundle(BUNDLE), Path(__file__).parents[2] / "examples" / "sketches"
    scores = {"with": list[float](), "without": list[float]()}
    for drawing in json.loads((folder / "strokes.json").read_text()):
        sketch = Control((folder / f"{drawing['name']}.png").read_bytes(), "sketch")
        lines = map_of(sketch, pipeline.manifest.image_size, "control")
        for name, controls in (("with", [sketch]), ("without", [])):
            image = np.asarray(pipeline(drawing["prompt"], seed=0, controls=controls)[0])
            scores[name].append(mean_edge_f1(image[None], [lines]))
    assert len(scores["with"]) == 18 and min(scores["with"]) > 0.5
    assert np.mean(scores["with"]) > 0.8 and np.mean(scores["without"]) < 0.5


@pytest.mark.parametrize("world", ["emoji", "scenes"])
def test_a_judge_is_as_good_on_real_renders_as_it_says(world: str) -> None:
    judge = embedded_judge(world)
    images, labels = judge.world.judge_images(400, np.random.default_rng(12345))
    logits = judge.logits(images)
    right = np.stack([logits[head].argmax(-1) == labels[:, i] for i, head in enumerate(judge.world.heads)]).all(0).mean()
    assert judge.accuracy > 0.99
    assert right >= judge.accuracy - 3 * (judge.accuracy * (1 - judge.accuracy) / 400) ** 0.5 - 1 / 400
