"""Protocols: files that are wrong say where; a whole run on a toy folder, resumed, against the metrics themselves."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxs.bundle import read
from sdxs.errors import InvalidRequest, NotFound
from sdxs.pipeline import OneStepPipeline
from tests.networks import tiny_clip
from trainer.evaluation import protocol as protocols
from trainer.evaluation.metrics.clip import ClipFeatures
from trainer.evaluation.metrics.frechet import Gaussian, frechet_distance
from trainer.evaluation.metrics.kernel import squared_mmd
from trainer.evaluation.metrics.manifold import precision_recall
from trainer.evaluation.protocol_run import read_prompts, run_protocol, square
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import embedded_judge
from trainer.worlds.base import get_world

PROMPTS = ["red circle", "blue square", "a cat", "two dogs", "green sky", "rain"]


def quiet(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture
def toy(tmp_path: Path) -> dict[str, Any]:
    """A protocol in the eyes of a random CLIP model, with real images of several sizes."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\nnever read\n")
    (tmp_path / "real").mkdir()
    for number, image in enumerate(get_world("scenes").reference_images(get_world("scenes").captions("heldout")[:8])):
        Image.fromarray(image).resize((40 + number, 36), Image.Resampling.BICUBIC).save(tmp_path / "real" / f"{number}.png")
    tiny_clip(tmp_path / "clip", seed=3)
    return {
        "kind": "evaluation", "name": "toy", "images": 6, "size": 32, "seed": 11, "features": "clip",
        "metrics": ["fid", "kid", "precision_recall", "clip_score"], "prompts": {"path": str(tmp_path / "prompts.txt")},
        "reference": {"images": str(tmp_path / "real")}, "networks": {"clip": str(tmp_path / "clip")},
    }  # fmt: skip


def run(data: dict[str, Any], bundle: Path, output: Path) -> Row:
    return run_protocol(protocols.parse(data), bundle, read(bundle), output, quiet)


def test_a_whole_protocol(toy: dict[str, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    row = run(toy, tiny_bundle, tmp_path / "out")
    pipeline = OneStepPipeline.from_bundle(tiny_bundle)
    made = np.stack([pipeline.generate(prompt, 11 + i) for i, prompt in enumerate(PROMPTS)])
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), made)
    clip = ClipFeatures(toy["networks"]["clip"])
    real = clip.features(np.stack([square(file, 32) for file in sorted((tmp_path / "real").iterdir())]))
    features = clip.features(made)
    precision, recall = precision_recall(real, features)
    assert row.scores == pytest.approx(
        {
            "frechet_clip": frechet_distance(real, features), "kid_clip": squared_mmd(real, features),
            "precision_clip": precision, "recall_clip": recall, "clip_score": clip.score(made, PROMPTS),
        },
        abs=1e-5,
    )  # fmt: skip
    assert row.latency_ms and row.gflop and (row.split, row.row, row.images) == ("toy", "tiny", 6)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["row"] == asdict(row) and result["model"] == read(tiny_bundle).digest
    fid = {**toy, "metrics": ["fid"], "reference": {"statistics": str(tmp_path / "out" / "reference.npz")}}
    assert run(fid, tiny_bundle, tmp_path / "out").scores == {"frechet_clip": row.scores["frechet_clip"]}


def test_an_interrupted_run_keeps_its_images(toy: dict[str, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    toy = {**toy, "metrics": ["clip_score"], "reference": None}
    run({**toy, "images": 4}, tiny_bundle, tmp_path / "out")
    folder = tmp_path / "out" / "images"
    first, second, *_ = sorted(folder.iterdir())
    marked = np.zeros((32, 32, 3), np.uint8)
    Image.fromarray(marked).save(first)
    second.rename(second.with_suffix(".part"))  # cut off while it was written
    told: list[tuple[str, int, int]] = []
    run_protocol(protocols.parse(toy), tiny_bundle, read(tiny_bundle), tmp_path / "out", lambda *note: told.append(note[:3]))
    assert told[:2] == [("images", 3, 6), ("images", 6, 6)]
    files = sorted(folder.iterdir())
    assert len(files) == 6 and np.array_equal(np.asarray(Image.open(first)), marked)
    assert np.array_equal(np.asarray(Image.open(second)), OneStepPipeline.from_bundle(tiny_bundle).generate(PROMPTS[1], 12))
    with pytest.raises(InvalidRequest, match=r"output: .*images of another seed"):
        run({**toy, "seed": 12}, tiny_bundle, tmp_path / "out")


def test_a_judge_of_a_world_can_be_the_network(toy: dict[str, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    data = {**toy, "metrics": ["kid"], "features": "judge", "networks": {"judge": "scenes"}}
    judge, real = embedded_judge("scenes"), sorted((tmp_path / "real").iterdir())
    row = run(data, tiny_bundle, tmp_path / "out")
    made = np.stack([square(file, 32) for file in sorted((tmp_path / "out" / "images").iterdir())])
    expected = squared_mmd(judge.features(np.stack([square(file, 32) for file in real])), judge.features(made))
    assert row.scores == {"kid_judge": pytest.approx(expected, abs=1e-5)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"colour": 1}, InvalidRequest, r"^protocol\.colour: got 1"),
        ({"images": "many"}, InvalidRequest, r"^protocol\.images: got 'many'"),
        ({"kind": "distill"}, InvalidRequest, r"^protocol\.kind: got 'distill'"),
        ({"metrics": ["fod"]}, InvalidRequest, r"^protocol\.metrics\.0: got 'fod'"),
        ({"reference": {"images": "a", "statistics": "b"}}, InvalidRequest, r"^protocol\.reference: .*one of the two"),
        ({"reference": None}, InvalidRequest, r"^protocol: got 'toy'.*reference: fid, kid, precision_recall"),
        ({"reference": {"statistics": "b.npz"}}, InvalidRequest, "statistics serves fid alone"),
        ({"reference": {"images": "absent"}}, NotFound, "protocol.reference.images: there is no folder 'absent'"),
        ({"images": 9}, InvalidRequest, r"^protocol\.images: got 9, allowed: at most 7: .*prompts.txt"),
        ({"prompts": {"path": "absent.txt"}}, NotFound, "protocol.prompts.path: there is no file 'absent.txt'"),
        ({"features": "inception"}, InvalidRequest, r"^protocol\.networks\.inception: got None.*downloaded from https://"),
        ({"features": "judge"}, InvalidRequest, r"^protocol\.networks\.judge: got None"),
        ({"networks": {}}, InvalidRequest, r"^protocol\.networks\.clip: got None.*openai/clip-vit-base-patch16"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_any_image_is_made(
    toy: dict[str, Any], tiny_bundle: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run({**toy, **change}, tiny_bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_network_are_refused(toy: dict[str, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    Gaussian(np.zeros(5), np.eye(5)).save(tmp_path / "other.npz")
    data = {**toy, "metrics": ["fid"], "reference": {"statistics": str(tmp_path / "other.npz")}}
    with pytest.raises(InvalidRequest, match="of 5 features', allowed: statistics of 16 features, as clip has"):
        run(data, tiny_bundle, tmp_path / "out")


def test_prompts_of_coco_are_the_first_caption_of_each_image(tmp_path: Path) -> None:
    captions = [(7, 3, "A dog. "), (2, 9, "late"), (7, 1, "first\nof seven"), (2, 4, "early")]
    entries = [{"image_id": image, "id": number, "caption": text} for image, number, text in captions]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": entries}))
    section = protocols.CaptionsSection(path=str(path), format="coco")
    assert read_prompts(section, 2) == ["early", "first of seven"]
    (tmp_path / "captions.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    jsonl = protocols.CaptionsSection(path=str(tmp_path / "captions.jsonl"), format="jsonl", column="text")
    assert read_prompts(jsonl, 2) == ["one", "two"]
    for wrong in (section.model_copy(update={"path": jsonl.path}), jsonl.model_copy(update={"column": "caption"})):
        with pytest.raises(InvalidRequest, match=r"captions.jsonl.*a file of format"):
            read_prompts(wrong, 1)


def test_images_are_cut_to_their_middle_square(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(square(tmp_path / "wide.png", 20), wide[:, 20:40])
    assert square(tmp_path / "wide.png", 10)[5, 5].tolist() == [10, 200, 30]
    assert square(tmp_path / "wide.png", 33).shape == (33, 33, 3)


def test_the_protocols_that_ship_are_whole() -> None:
    assert protocols.built_in() == ["coco-5k"]
    coco = protocols.load("coco-5k")
    assert (coco.name, coco.images, coco.size) == ("coco-5k", 5000, 512)
    named = coco.with_networks("mine.pth", None)
    assert (named.networks.inception, named.networks.clip) == ("mine.pth", coco.networks.clip)
    with pytest.raises(NotFound, match="protocol 'coco-50k': no such file, and not one of coco-5k"):
        protocols.load("coco-50k")


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("kind = ")
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads("kind = ")
    with pytest.raises(InvalidRequest, match=r"^protocol: .*bad.toml"):
        protocols.load(str(tmp_path / "bad.toml"))
