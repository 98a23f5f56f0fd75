"""A bad recipe of a ControlNet is one sentence with field and file, before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderTiny, UNet2DConditionModel

from sdxs import bundle
from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed, SdxsError
from sdxs.settings import Settings
from tests.controls import tiny_controlnet
from tests.unit.test_preflight import GPU, SIZE, WEIGHTS, change
from trainer.cluster import Cluster
from trainer.models.families import write_teacher
from trainer.models.folders import conditioning_folders, write_model_index, write_one_step_scheduler
from trainer.models.students import decoder_config, shrink
from trainer.preflight.checks import check
from trainer.preflight.given import absent
from trainer.preflight.shapes import controlnet_shapes, teacher_shapes
from trainer.recipe import load, parse
from trainer.worlds import emoji
from trainer.worlds.base import get_world


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD 2.1 in `teacher`, its ControlNet in `controlnet`, a one-step student of it in `base`."""
    folder = tmp_path_factory.mktemp("models")
    teacher, base = write_teacher("sd21", folder / "teacher"), folder / "base"
    tiny_controlnet(teacher / "unet", folder / "controlnet")
    shrink(UNet2DConditionModel.from_pretrained(teacher / "unet")).save_pretrained(base / "unet")
    few = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny.from_config(decoder_config(4) | few).save_pretrained(base / "vae")
    for name in conditioning_folders(teacher):
        shutil.copytree(teacher / name, base / name)
    write_one_step_scheduler(teacher, base)
    write_model_index(base)
    bundle.seal(base, "base")
    return folder


@pytest.fixture
def own(models: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(models, tmp_path / "own"))


def recipe(models: Path, **changes: Any) -> dict[str, Any]:
    """A sound one with fields changed; a dict changes fields of a section."""
    data: dict[str, Any] = {
        "kind": "control", "name": "mine", "world": "scenes", "base": str(models / "base"), "teacher": str(models / "teacher"),
        "controlnet": str(models / "controlnet"), "conditions": ["edge", "sketch"], "pairs": {"count": 4}, "unet": dict(SIZE),
        "shrink": dict(SIZE), "warmup": SIZE | WEIGHTS, "diff_instruct": SIZE | WEIGHTS | {"online_lr": 1e-4},
        "evaluation": {"train_images": 2, "heldout_images": 2},
    }  # fmt: skip
    return data | {name: {**data[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}


def of_teacher(models: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "controlnet", "name": "mine", "world": "scenes", "teacher": str(models / "teacher"), "conditions": ["edge"],
        "controlnet": dict(SIZE),
    } | changes  # fmt: skip


def passes(data: dict[str, Any], *, fetch: bool = True) -> None:
    check(parse(data), GPU, Settings(), "mine.toml", fetch=fetch)  # type: ignore[arg-type]


def refused(data: dict[str, Any], cluster: Cluster = GPU, *, fetch: bool = True) -> SdxsError:
    with pytest.raises((InvalidRequest, NotFound, PreconditionFailed)) as caught:
        check(parse(data), cluster, Settings(), "mine.toml", fetch=fetch)  # type: ignore[arg-type]
    assert "mine.toml" in str(caught.value)
    return caught.value


def test_sound_recipes_pass(models: Path) -> None:
    passes(recipe(models))
    passes(of_teacher(models))


SPOILT: list[tuple[str, dict[str, Any], str]] = [
    ("controlnet", {"cross_attention_dim": 24}, "cross_attention_dim"),
    ("controlnet", {"in_channels": 8}, "in_channels"),
    ("controlnet", {"block_out_channels": [4, 8, 12, 16], "attention_head_dim": 4}, "block_out_channels"),
    ("controlnet", {"layers_per_block": 1}, "layers_per_block"),
    (
        "controlnet",
        {"conditioning_embedding_out_channels": [16, 16, 16]},
        "by 8, as the teacher's autoencoder does; these do by 4",
    ),
    ("controlnet", {"conditioning_channels": 1}, "3 conditioning_channels"),
    ("controlnet", {"_class_name": "ControlNetUnionModel"}, "ControlNetUnionModel"),
    ("controlnet", {"down_block_types": ["DownBlock2D"] * 4}, "made from the teacher's U-Net"),
    ("base/unet", {"sample_size": 16}, "sample_size, 8"),
    ("base/unet", {"block_out_channels": [4, 8, 16]}, "block_out_channels, (4, 8, 12)"),
    ("base/unet", {"layers_per_block": 2}, "layers_per_block, 1"),
    ("base/unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type, None"),
]


@pytest.mark.parametrize(("place", "values", "allowed"), SPOILT, ids=[f"{p} {next(iter(v))}" for p, v, _ in SPOILT])
def test_what_does_not_fit_the_teacher(own: Path, place: str, values: dict[str, Any], allowed: str) -> None:
    change(own / place / "config.json", **values)
    (own / "base" / "bundle.json").unlink()  # a plain folder: what was sealed may not change
    error = refused(recipe(own))
    assert error.field == place.partition("/")[0]
    assert allowed in str(error)


def test_a_base_of_another_student(models: Path) -> None:
    error = refused(recipe(models) | {"student": {"blocks": "cross-attention"}})
    assert error.field == "base" and "down_block_types" in str(error)


def test_a_base_of_another_text_encoder(own: Path) -> None:
    change(own / "base" / "unet" / "config.json", cross_attention_dim=24)
    change(own / "base" / "text_encoder" / "config.json", hidden_size=24)
    (own / "base" / "bundle.json").unlink()
    error = refused(recipe(own))
    assert error.field == "base" and "cross_attention_dim, 16" in str(error)


def test_a_base_of_other_noise(own: Path) -> None:
    change(own / "base" / "scheduler" / "scheduler_config.json", beta_end=0.02)
    (own / "base" / "bundle.json").unlink()
    error = refused(recipe(own))
    assert error.field == "base" and "beta_end, 0.012" in str(error)


def test_a_controlnet_that_is_not_there_or_has_no_weights(own: Path, tmp_path: Path) -> None:
    assert "controlnet: controlnet 'nobody'" in str(refused(recipe(own, controlnet="nobody")))
    (tmp_path / "empty").mkdir()
    error = refused(recipe(own, controlnet=str(tmp_path / "empty")))
    assert error.field == "controlnet" and "no config.json" in str(error)
    (own / "controlnet" / "diffusion_pytorch_model.safetensors").rename(own / "controlnet" / "diffusion_pytorch_model.bin")
    error = refused(recipe(own))
    assert error.field == "controlnet" and "no .safetensors" in str(error)


def test_conditions_that_the_teachers_controlnet_never_saw(own: Path) -> None:
    (own / "controlnet" / "control_types.json").write_text(json.dumps(["edge", "depth"]))
    error = refused(recipe(own))
    assert error.field == "conditions" and "sketch" in str(error) and "edge, depth" in str(error)
    passes(recipe(own, conditions=["edge"]))


def test_an_older_file_that_does_not_name_its_mid_stage_has_one(own: Path) -> None:
    path = own / "controlnet" / "config.json"
    config = json.loads(path.read_text())
    del config["mid_block_type"]
    path.write_text(json.dumps(config))
    passes(recipe(own))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"warmup": {"feature_weights": (1.0,)}}, "warmup.feature_weights"),
        ({"diff_instruct": {"feature_weights": (1.0,)}}, "diff_instruct.feature_weights"),
        ({"pairs": {"teacher": "nobody"}}, "pairs.teacher"),
        ({"world": "photos"}, "world"),
        ({"unet": {"images": {"images": "nowhere", "size": 64}}}, "unet.images.images"),
        ({"unet": {"images": {"images": "nowhere", "size": 65}}}, "unet.images.size"),
        ({"shrink": {"batch": 5}}, "shrink.batch"),
        ({"compute": {"precision": "bf16"}}, "compute.precision"),
    ],
)
def test_everything_else_is_checked_as_in_a_distillation(models: Path, changes: dict[str, Any], field: str) -> None:
    cluster = Cluster(workers=2) if field in ("shrink.batch", "compute.precision") else GPU
    data = recipe(models) | {"compute": {}}
    data |= {name: {**data[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}
    assert refused(data, cluster).field == field


def test_an_encoder_of_images_needs_the_bases_small_decoder(own: Path, tmp_path: Path) -> None:
    shutil.rmtree(own / "base" / "vae")
    shutil.copytree(own / "teacher" / "vae", own / "base" / "vae")
    (own / "base" / "bundle.json").unlink()
    passes(recipe(own))
    vgg = {"encoder": "vgg", "encoder_source": str(tmp_path), "feature_weights": (1.0,) * 5}
    error = refused(recipe(own, warmup=vgg))
    assert error.field == "warmup.encoder" and "AutoencoderTiny" in str(error)


def test_a_teachers_controlnet_is_checked_too(models: Path) -> None:
    assert refused(of_teacher(models, world="photos")).field == "world"
    images = {**SIZE, "images": {"images": "nowhere", "size": 64}}
    assert refused(of_teacher(models, world=None, controlnet=images)).field == "controlnet.images.images"
    images = {**SIZE, "images": {"images": "nowhere", "size": 100}}
    error = refused(of_teacher(models, world=None, controlnet=images))
    assert error.field == "controlnet.images.size" and "multiple of 64" in str(error)


def test_a_font_that_is_missing_is_said_before_a_run_and_told_in_a_rehearsal(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(emoji, "FONT", tmp_path / "NotoColorEmoji.ttf")
    data = of_teacher(models, world="emoji")
    error = refused(data)
    assert isinstance(error, PreconditionFailed) and "fonts-noto-color-emoji" in str(error)
    passes(data, fetch=False)
    assert absent(parse(data)) == [("world", "the Debian package fonts-noto-color-emoji")]  # type: ignore[arg-type]
    with pytest.raises(PreconditionFailed, match="fonts-noto-color-emoji"):  # which no further start of a worker changes
        get_world("emoji").training_images(1, np.random.default_rng(0))
    (tmp_path / "NotoColorEmoji.ttf").touch()
    passes(data)
    passes(recipe(models))  # whose samples are the teacher's


def test_before_a_download_what_is_not_here_is_told_and_judged_by_published_shapes(models: Path) -> None:
    data = recipe(models, base="mine@prod", controlnet="someone/controlnet")
    passes(data, fetch=False)
    assert absent(parse(data)) == [("base", "mine@prod"), ("controlnet", "someone/controlnet")]  # type: ignore[arg-type]
    assert absent(parse(recipe(models))) == []  # type: ignore[arg-type]
    error = refused(recipe(models, controlnet="thibaud/controlnet-sd21-canny-diffusers"), fetch=False)
    assert error.field == "controlnet" and "cross_attention_dim, 16" in str(error)
    large = teacher_shapes("stabilityai/stable-diffusion-2-1-base")
    found = controlnet_shapes("thibaud/controlnet-sd21-canny-diffusers@main", large)
    assert (found.folder, found.factor, found.config["cross_attention_dim"]) == (None, 8, 1024)
    assert found.config == controlnet_shapes("someone/controlnet", large).config
    assert controlnet_shapes("lllyasviel/control_v11p_sd15_canny", large).config["cross_attention_dim"] == 768


@pytest.mark.parametrize("name", ["sdxs-512-control", "sdxs-512-controlnet"])
def test_the_large_recipes_pass_before_anything_is_downloaded(name: str) -> None:
    made = load(name)
    cluster = Cluster(workers=8, gpus_per_worker=1, gpus_per_teacher=1)
    assert check(made, cluster, Settings(), name, fetch=False).folder is None  # type: ignore[arg-type]


def test_the_large_recipe_takes_the_bases_samples_and_unet() -> None:
    """Its first steps are those of sdxs-512, word for word."""
    base, control = load("sdxs-512").model_dump(), load("sdxs-512-control").model_dump()
    for field in ("teacher", "data", "seed", "compute", "student", "pairs", "compositions", "unet"):
        assert control[field] == base[field], field
