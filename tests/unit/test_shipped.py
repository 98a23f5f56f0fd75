"""What ships: sizes, cards, and judges as good as they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sdxs
import trainer
from sdxs import bundle
from trainer.evaluation.card import read_rows
from trainer.evaluation.scoring import embedded_judge

BUNDLE = Path(sdxs.__file__).parent / "bundles" / "emoji"
ASSETS = Path(trainer.__file__).parent / "assets"
MB = 1_000_000


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_sizes() -> None:
    assert weights_bytes(ASSETS / "emoji" / "teacher") <= 16 * MB
    assert sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) <= 8 * MB


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
def test_a_judge_is_as_good_on_real_renders_as_it_says(world: str) -> None:
    judge = embedded_judge(world)
    images, labels = judge.world.judge_images(400, np.random.default_rng(12345))
    logits = judge.logits(images)
    right = np.stack([logits[head].argmax(-1) == labels[:, i] for i, head in enumerate(judge.world.heads)]).all(0).mean()
    assert judge.accuracy > 0.99
    assert right >= judge.accuracy - 3 * (judge.accuracy * (1 - judge.accuracy) / 400) ** 0.5 - 1 / 400
