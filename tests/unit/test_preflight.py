"""A bad recipe is one sentence with field and file, before anything starts."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from sdxs.errors import InvalidRequest, NotFound, PermissionDenied, SdxsError
from sdxs.settings import Settings
from tests.models import tiny_recipe, tiny_teacher
from trainer.cluster import Cluster
from trainer.data.prompts import look
from trainer.models.families import write_teacher
from trainer.models.lora import merge_lora
from trainer.preflight.checks import check
from trainer.preflight.shapes import teacher_shapes
from trainer.preflight.small import small_bundle
from trainer.recipe import load, parse
from trainer.runs import run_recipe
from trainer.sections import DataSection, LoraSection

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
    with pytest.raises(SdxsError) as caught:
        check(parse(data), cluster, Settings(), "mine.toml")  # type: ignore[arg-type]
    assert "mine.toml" in str(caught.value)
    assert caught.value.field and caught.value.field in str(caught.value)
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


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FITS: dict[str, tuple[int, ...]] = {f"{LAYER}.lora_A.weight": (2, 16), f"{LAYER}.lora_B.weight": (4, 2)}
"""Of `sd21`: its text is 16 wide, its first level 4."""


def write_lora(folder: Path, shapes: Mapping[str, tuple[int, ...]] = FITS) -> str:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "style.safetensors")
    return str(folder / "style.safetensors")


def test_a_lora_for_this_model_passes_and_is_one_that_loads(teachers: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path)
    check(parse(recipe(teachers, offline__lora={"path": path})), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]
    unet = UNet2DConditionModel.from_pretrained(teachers / "sd21" / "unet")
    merge_lora(unet, [], LoraSection(path=path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_A": (2, 999)}, "takes 999, the U-Net has 16 inputs"),
        ({"lora_B": (999, 2)}, "gives 999, the U-Net has 4 outputs"),
        ({"lora_B": (4, 3)}, "of rank 2 and 3"),
        ({"lora_B": None}, "has one matrix"),
        ({"other": (2, 16)}, "no_such takes 16, the U-Net has no such layer"),
    ],
)
def test_a_lora_for_another_model(teachers: Path, tmp_path: Path, change: dict[str, tuple[int, ...] | None], said: str) -> None:
    ((part, shape),) = change.items()
    names = {
        "lora_A": f"{LAYER}.lora_A.weight",
        "lora_B": f"{LAYER}.lora_B.weight",
        "other": "unet.mid_block.no_such.lora_A.weight",
    }
    changed = FITS | {names[part]: shape} | ({names[part].replace("_A", "_B"): (4, 2)} if part == "other" else {})
    shapes = {name: value for name, value in changed.items() if value is not None}
    error = refused(recipe(teachers, offline__lora={"path": write_lora(tmp_path, shapes)}))
    assert error.field == "offline.lora.path" and said in str(error) and "style.safetensors" in str(error)


def test_a_lora_that_is_not_there_or_broken_off(teachers: Path, base: Path, tmp_path: Path) -> None:
    for cut in (None, 20):
        path = tmp_path / "style.safetensors"
        if cut is not None:
            path.write_bytes(Path(write_lora(tmp_path)).read_bytes()[:cut])
        for changed in ({"offline__lora": {"path": str(path)}}, None):
            data = recipe(teachers, **changed) if changed else style_recipe(teachers, style={"path": str(path)})
            assert refused(data).field == ("offline.lora.path" if changed else "style.path")


@pytest.fixture(scope="module")
def base(teachers: Path) -> Path:
    """A one-step bundle of `sd21`."""
    return small_bundle(teachers / "sd21", teachers / "base")


def style_recipe(teachers: Path, **changes: Any) -> dict[str, Any]:
    """A sound one, given the fixture `base` and a LoRA in `style.path`."""
    learn = SIZE | {"online_lr": 1e-4, "lambda_fm": (0.0, 0.0), "feature_weights": WEIGHTS["feature_weights"]}
    return {
        "kind": "style", "name": "mine", "world": "scenes", "teacher": str(teachers / "sd21"), "base": str(teachers / "base"),
        "style": {"path": "none"}, "lora": learn, "evaluation": {"train_images": 2, "heldout_images": 2},
    } | changes  # fmt: skip


def test_a_style_and_its_base(teachers: Path, base: Path, tmp_path: Path) -> None:
    style = {"path": write_lora(tmp_path)}
    check(parse(style_recipe(teachers, style=style)), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]
    (tmp_path / "wide").mkdir()
    wide = write_lora(tmp_path / "wide", FITS | {f"{LAYER}.lora_B.weight": (999, 2)})
    error = refused(style_recipe(teachers, style={"path": wide}))
    assert error.field == "style.path" and "gives 999" in str(error)


@pytest.mark.parametrize(
    ("name", "said"),
    [("sd21", "single step begins at the last timestep"), ("whole", "fewer blocks"),
     ("narrow", "cross_attention_dim, 16"), ("noisy", "beta_end"), ("cut", "whole weights"),
     ("nowhere", "no folder"), ("bare", "unet/config.json is missing"), ("changed", "unet")],
)  # fmt: skip
def test_a_base_that_is_no_student_of_the_teacher(teachers: Path, base: Path, tmp_path: Path, name: str, said: str) -> None:
    folder = teachers / "sd21" if name == "sd21" else tmp_path / name
    if name in ("narrow", "noisy", "cut", "changed"):
        shutil.copytree(base, folder)
        if name != "changed":
            (folder / "bundle.json").unlink()
    if name == "whole":
        shutil.copytree(teachers / "sd21", folder)
        change(folder / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    if name in ("narrow", "changed"):
        change(folder / "unet" / "config.json", cross_attention_dim=24)
        change(folder / "text_encoder" / "config.json", hidden_size=24)
    if name == "noisy":
        change(folder / "scheduler" / "scheduler_config.json", beta_end=0.5)
    if name == "cut":
        cut(folder / "vae" / "diffusion_pytorch_model.safetensors")
    if name == "bare":
        folder.mkdir()
    error = refused(style_recipe(teachers, base=str(folder), style={"path": write_lora(tmp_path)}))
    assert error.field == "base" and said in str(error)


def cut(path: Path, left: int = -10) -> None:
    path.write_bytes(path.read_bytes()[:left])


@pytest.mark.parametrize("left", [-10, 100, 4, 0])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_break_off(teachers: Path, tmp_path: Path, part: str, left: int) -> None:
    shutil.copytree(teachers / "sd21", tmp_path / "sd")
    [path] = (tmp_path / "sd" / part).glob("*.safetensors")
    cut(path, left)
    error = refused(recipe(teachers, teacher=str(tmp_path / "sd")))
    assert error.field == "teacher" and str(path) in str(error) and f"has {path.stat().st_size} bytes" in str(error)
    error = refused(recipe(teachers, offline__teacher=str(tmp_path / "sd")))
    assert error.field == "offline.teacher"


def test_a_shard_that_is_missing(teachers: Path, tmp_path: Path) -> None:
    shutil.copytree(teachers / "sd21", tmp_path / "sd")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet")
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(tmp_path / "sd" / "unet", max_shard_size="20KB")
    data = recipe(teachers, teacher=str(tmp_path / "sd"))
    check(parse(data), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]
    first = min((tmp_path / "sd" / "unet").glob("*.safetensors"))
    first.unlink()
    error = refused(data)
    assert error.field == "teacher" and first.name in str(error)


class Hub(BaseHTTPRequestHandler):
    """Knows `owner/closed`, which it gives to nobody, and nothing else."""

    def do_GET(self) -> None:
        closed = "owner/closed" in self.path
        self.send_response(403 if closed else 404)
        self.send_header("X-Error-Code", "GatedRepo" if closed else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine."""
    import huggingface_hub.constants as constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("owner/none", NotFound, "hub has none"),
        ("owner/closed", PermissionDenied, "HF_TOKEN"),
        ("models/my sd", NotFound, "neither a folder"),
        ("my--org/x", NotFound, "neither a folder"),
    ],
)
def test_a_teacher_that_the_hub_does_not_give(teachers: Path, hub: None, source: str, kind: type[SdxsError], said: str) -> None:
    for field in ("teacher", "offline__teacher"):
        error = refused(recipe(teachers, **{field: source}))
        assert type(error) is kind and error.field == field.replace("__", ".")
        assert said in str(error) and repr(source) in str(error)


def test_a_world_that_there_is_not(teachers: Path) -> None:
    error = refused(recipe(teachers, world="moon", teacher="nobody"))
    assert error.field == "world" and "one of emoji, scenes" in str(error)


def prompts_of(folder: Path, name: str) -> Path:
    """A file of prompts with something wrong."""
    path, captions = folder / name, [f"a thing {i}" for i in range(20)]
    if name == "few.txt":
        path.write_text("\n".join(captions[:10] * 2))
    if name == "bad.jsonl":
        path.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions) + '{"caption": \n')
    if name == "empty.parquet":
        pq.write_table(pa.table({"caption": pa.array([], pa.string())}), path)
    if name == "junk.parquet":
        path.write_bytes(b"PAR1" + bytes(100))
    if name == "other.parquet":
        pq.write_table(pa.table({"text": captions}), path)
    if name == "prompts.doc":
        path.write_text("a thing")
    return path


@pytest.mark.parametrize(
    ("name", "field", "said"),
    [
        ("few.txt", "data.prompts", "more than 10 different prompts (data.heldout); it has 10"),
        ("bad.jsonl", "data.prompts", "bad.jsonl:21: "),
        ("empty.parquet", "data.prompts", "it has 0"),
        ("junk.parquet", "data.prompts", "a whole file of the format"),
        ("other.parquet", "data.prompts", "columns text"),
        ("prompts.doc", "data.format", "one format"),
    ],
)
def test_prompts_that_cannot_be_trained_on(teachers: Path, tmp_path: Path, name: str, field: str, said: str) -> None:
    path = prompts_of(tmp_path, name)
    error = refused(recipe(teachers, world=None, data={"prompts": str(path), "heldout": 10}))
    assert error.field == field and said in str(error) and str(path) in str(error)
    if name == "few.txt":
        data = recipe(teachers, world=None, data={"prompts": str(path), "heldout": 9})
        check(parse(data), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]


def test_the_look_at_prompts_ends_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three files of one size, room for less than two: the third is not opened, and too few prompts are no fault."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"caption": "a thing"}\n' if name != "c" else '{"caption": missing}..\n')
    section = DataSection(prompts=str(tmp_path), heldout=10)
    with pytest.raises(InvalidRequest, match=r"c\.jsonl:1"):
        look(section, Settings())
    monkeypatch.setattr("trainer.data.prompts.LOOK_BYTES", 30)
    look(section, Settings())


def test_what_only_the_run_finds_names_the_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that change after the check; the run ends before any worker."""
    path, file = tmp_path / "prompts.txt", tmp_path / "mine.toml"
    path.write_text("".join(f"a thing {i}\n" for i in range(300)))
    monkeypatch.setenv("SDXS_STORE_URL", f"file://{tmp_path}/store")
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer.runs.ray_session", lambda: contextlib.nullcontext(path.write_text("one\n")))
    data = tiny_recipe(tiny_teacher(tmp_path / "teacher")) | {"world": None, "data": {"prompts": str(path)}}
    with pytest.raises(InvalidRequest, match=r"it has 1 \(recipe .*mine\.toml\)"):
        run_recipe(parse(data), tmp_path / "out", Cluster(), str(file))


@pytest.mark.parametrize(("text", "allowed"), [("", "empty"), (" \n\n", "empty"), (None, "that is there")])
def test_prompts_that_are_not_there(teachers: Path, tmp_path: Path, text: str | None, allowed: str) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    error = refused(recipe(teachers, world=None, data={"prompts": str(path)}))
    assert error.field == "data.prompts" and allowed in str(error) and "prompts.txt" in str(error)
    path.write_text("a red circle\n")
    data = recipe(teachers, world=None, data={"prompts": f"{tmp_path}/*.txt", "heldout": 0})
    check(parse(data), GPU, Settings(), "mine.toml")  # type: ignore[arg-type]


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
