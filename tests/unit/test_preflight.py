"""A bad recipe is one sentence with field and file, before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxs.errors import InvalidRequest, NotFound, SdxsError
from sdxs.settings import Settings
from trainer.cluster import Cluster
from trainer.models.families import write_teacher
from trainer.preflight.checks import check
from trainer.preflight.shapes import teacher_shapes
from trainer.recipe import load, parse

DECODER = {
    "latent_channels": 4, "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4,
}  # fmt: skip
SIZE = {"steps": 2, "batch": 4, "lr": 1e-4}
WEIGHTS = {"feature_weights": (1.0, 0.5, 0.5, 0.5, 0.5)}
GPU = Cluster(gpus_per_worker=1, gpus_per_teacher=1)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd21`, `sd21b`, `sd15`, `sdxl`, `latents16` and `v`, small."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("sd21", "sd15", "sdxl"):
        write_teacher(name, folder / name)
    write_teacher("sd21", folder / "latents16", latent_channels=16)
    write_teacher("sd21", folder / "wide")
    change(folder / "wide" / "unet" / "config.json", cross_attention_dim=24)
    shutil.copytree(folder / "sd21", folder / "v")
    change(folder / "v" / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def recipe(teachers: Path, **changes: Any) -> dict[str, Any]:
    """A sound one with fields changed; a dotted name reaches into a section."""
    data: dict[str, Any] = {
        "kind": "distill", "name": "mine", "world": "scenes", "teacher": str(teachers / "sd21"), "pairs": {"count": 4},
        "decoder": {**SIZE, "config": dict(DECODER)}, "unet": dict(SIZE), "warmup": SIZE | WEIGHTS,
        "diff_instruct": SIZE | WEIGHTS | {"online_lr": 1e-4}, "finish": SIZE | WEIGHTS,
        "evaluation": {"train_images": 2, "heldout_images": 2},
    }  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        section = data
        for part in path:
            section[part] = dict(section.get(part, {}))
            section = section[part]
        section[last] = value
    return data


def refused(data: dict[str, Any], cluster: Cluster = GPU) -> SdxsError:
    with pytest.raises((InvalidRequest, NotFound)) as caught:
        check(parse(data), cluster, Settings(), "mine.toml")  # type: ignore[arg-type]
    assert "mine.toml" in str(caught.value)
    return caught.value


def test_a_sound_recipe_passes(teachers: Path) -> None:
    shapes = check(parse(recipe(teachers)), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]
    assert (shapes.latent, shapes.factor, shapes.tokens, shapes.text_width, shapes.sdxl) == ((4, 8, 8), 8, 77, 16, False)


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"decoder__config__latent_channels": 8}, "decoder.config.latent_channels", "4, as the teacher's latents"),
    ({"decoder__config__decoder_block_out_channels": (8,) * 3}, "decoder.config.decoder_block_out_channels", "4 widths"),
    ({"decoder__config__num_decoder_blocks": (1,) * 3}, "decoder.config.num_decoder_blocks", "4 numbers"),
    ({"decoder__config__colours": 3}, "decoder.config", "colours"),
    ({"decoder__config": {"latent_channels": 4}}, "decoder.config.decoder_block_out_channels", "with this field"),
    ({"warmup__feature_weights": (1.0, 1.0)}, "warmup.feature_weights", "5 numbers"),
    ({"diff_instruct__feature_weights": (1.0,) * 6}, "diff_instruct.feature_weights", "5 numbers"),
    ({"finish__feature_weights": (1.0,)}, "finish.feature_weights", "5 numbers"),
    (
        {"warmup__encoder": "dinov2", "warmup__encoder_source": "/nowhere"},
        "warmup.encoder_source",
        "folder or hub id of DINOv2",
    ),
    ({"student__blocks": "vega"}, "teacher.unet.transformer_layers_per_block", "SDXL"),
]


@pytest.mark.parametrize(("changes", "field", "allowed"), CASES, ids=[case[1] + str(i) for i, case in enumerate(CASES)])
def test_shapes_that_do_not_fit(teachers: Path, changes: dict[str, Any], field: str, allowed: str) -> None:
    error = refused(recipe(teachers, **changes))
    assert error.field == field
    assert allowed in str(error)


@pytest.mark.parametrize(
    ("field", "name", "allowed"),
    [
        ("pairs__teacher", "latents16", "latents of (4, 8, 8)"),
        ("compositions__teacher", "latents16", "latents of (4, 8, 8)"),
        ("offline__teacher", "latents16", "latents of (4, 8, 8)"),
        ("offline__teacher", "wide", "cross_attention_dim 16"),
        ("offline__teacher", "v", "prediction_type, epsilon"),
    ],
)
def test_another_model_must_share_what_it_is_asked_for(teachers: Path, field: str, name: str, allowed: str) -> None:
    more = {"compositions__count": 4} if field.startswith("compositions") else {}
    error = refused(recipe(teachers, **more, **{field: str(teachers / name)}))
    assert error.field == field.replace("__", ".")
    assert allowed in str(error)


def test_pairs_may_come_from_a_model_with_its_own_text_and_prediction(teachers: Path) -> None:
    for name in ("wide", "v"):
        check(parse(recipe(teachers, pairs__teacher=str(teachers / name))), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]


def test_an_incomplete_teacher(teachers: Path, tmp_path: Path) -> None:
    assert "neither a folder" in str(refused(recipe(teachers, teacher="nobody")))
    shutil.copytree(teachers / "sdxl", tmp_path / "xl")
    shutil.rmtree(tmp_path / "xl" / "text_encoder_2")
    error = refused(recipe(teachers, teacher=str(tmp_path / "xl")))
    assert error.field == "teacher" and "no text_encoder_2/" in str(error)
    shutil.copytree(teachers / "sd21", tmp_path / "sd")
    (tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    error = refused(recipe(teachers, teacher=str(tmp_path / "sd")))
    assert error.field == "teacher" and "vae has no .safetensors" in str(error)
    shutil.rmtree(tmp_path / "sd" / "scheduler")
    assert "no scheduler/" in str(refused(recipe(teachers, teacher=str(tmp_path / "sd"))))


def test_a_lora_for_another_model(teachers: Path, tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    save_file({layer: torch.zeros(2, 999), layer.replace("_A", "_B"): torch.zeros(8, 2)}, tmp_path / "style.safetensors")
    error = refused(recipe(teachers, offline__lora={"path": str(tmp_path / "style.safetensors")}))
    assert error.field == "offline.lora.path" and "999" in str(error) and "style.safetensors" in str(error)
    error = refused(recipe(teachers, offline__lora={"path": str(tmp_path / "none.safetensors")}))
    assert error.field == "offline.lora.path"


@pytest.mark.parametrize(("text", "allowed"), [("", "empty"), (" \n\n", "empty"), (None, "that is there")])
def test_prompts_that_are_not_there(teachers: Path, tmp_path: Path, text: str | None, allowed: str) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    error = refused(recipe(teachers, world=None, data={"prompts": str(path)}))
    assert error.field == "data.prompts" and allowed in str(error) and "prompts.txt" in str(error)
    path.write_text("a red circle\n")
    check(parse(recipe(teachers, world=None, data={"prompts": f"{tmp_path}/*.txt"})), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]


def test_real_images_that_are_not_there(teachers: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    data = recipe(teachers, unet__images={"images": str(photos), "size": 64})
    error = refused(data)
    assert error.field == "unet.images.images" and "photos" in str(error)
    photos.mkdir()
    (photos / "1.png").write_bytes(b"not looked at here")
    check(parse(data), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "cluster", "field"),
    [
        ({"compute__precision": "bf16"}, Cluster(), "compute.precision"),
        ({"compute__teacher_precision": "fp16"}, Cluster(gpus_per_worker=1), "compute.teacher_precision"),
        ({"compute__teacher_precision": "fp16"}, Cluster(teachers=0), "compute.teacher_precision"),
        ({}, Cluster(workers=(1, 2)), "decoder.micro_batch"),
        ({"unet__batch": 5}, Cluster(workers=2), "unet.batch"),
        (
            {"decoder__micro_batch": 2, "unet__micro_batch": 2, "warmup__micro_batch": 2}, Cluster(workers=(1, 8)),
            "diff_instruct.micro_batch",
        ),
    ],
)  # fmt: skip
def test_what_the_machines_cannot_do(teachers: Path, changes: dict[str, Any], cluster: Cluster, field: str) -> None:
    assert refused(recipe(teachers, **changes), cluster).field == field


def test_a_recipe_file_with_a_mistake_names_itself_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('kind = "distill"\nname = "mine"\nworld = "scenes"\nteacher = "scenes-teacher"\nspeed = 3\n')
    with pytest.raises(InvalidRequest, match=r"mine\.toml") as caught:
        load(str(path))
    assert caught.value.field == "recipe.pairs"


def test_published_shapes_stand_in_for_a_teacher_that_is_not_here() -> None:
    shapes = teacher_shapes("stabilityai/stable-diffusion-2-1-base@main")
    assert (shapes.folder, shapes.latent, shapes.factor, shapes.text_width) == (None, (4, 64, 64), 8, 1024)
    assert teacher_shapes("stabilityai/stable-diffusion-xl-base-1.0").sdxl
    with pytest.raises(NotFound, match="shapes are unknown"):
        teacher_shapes("someone/else")
