"""What a ControlNet's recipe leaves: a bundle with one ControlNet more, or the ControlNet's own folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel

from sdxs import bundle, controlnet
from sdxs.bundle import Manifest
from sdxs.controlnet import StudentControlNetModel
from sdxs.errors import AlreadyExists
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.store import FileStore
from tests.controls import control_recipe, tiny_controlnet
from tests.models import tiny_folder, tiny_teacher
from trainer.artifacts import Artifacts
from trainer.assemble import assemble
from trainer.models.controlnets import from_unet
from trainer.plan import Step, dated, steps
from trainer.recipe import ControlNetRecipe, ControlRecipe, of_controlnet

LAST = "control_diff_instruct"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = tiny_teacher(tmp_path / "teacher")
    tiny_controlnet(folder / "unet", tmp_path / "controlnet")
    return folder


def plan_of(recipe: ControlRecipe | ControlNetRecipe) -> list[Step]:
    return dated(steps(recipe), lambda _: {}, lambda _: None)


def finished(recipe: ControlRecipe | ControlNetRecipe, trained: Path, folder: Path) -> Artifacts:
    """A store in which every stage of a recipe has left the same ControlNet."""
    (trained / "log.jsonl").write_text('{"step": 1}\n')
    artifacts = Artifacts(FileStore(folder / "store"), folder / "cache")
    for step in plan_of(recipe):
        if not step.drawn:
            artifacts.save(step.name, step.digest, trained, {})
    return artifacts


def sealed_base(folder: Path, **facts: Any) -> Path:
    tiny_folder(folder)
    bundle.seal(folder, "tiny", recipe_hash="abc", **facts)
    return folder


def add(teacher: Path, base: Path, output: Path, seed: int = 1, **changes: Any) -> Manifest:
    """The bundle that a recipe makes of a base."""
    data = control_recipe(teacher, teacher.parent / "controlnet", str(base)) | changes
    recipe = ControlRecipe.model_validate(data)
    trained = output.with_name(f"{output.name}-trained")
    tiny_controlnet(base / "unet", trained / "controlnet", seed=seed)
    artifacts = finished(recipe, trained, output.with_name(f"{output.name}-store"))
    assemble(recipe, plan_of(recipe), teacher, artifacts, output)
    return bundle.read(output)


def state(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = controlnet.load(folder).state_dict()
    return found


def test_a_bundle_gets_a_second_controlnet_beside_its_first(teacher: Path, tmp_path: Path) -> None:
    base = sealed_base(tmp_path / "base", metrics={"heldout_top1": 0.5}, lineage={"unet": "u"})
    first = add(teacher, base, tmp_path / "one", control_name="lines", conditions=["edge", "sketch"])
    second = add(teacher, tmp_path / "one", tmp_path / "two", seed=2, control_name="tint", conditions=["colour"])
    assert first.controlnets == {"lines": ("edge", "sketch")}
    assert second.controlnets == {"lines": ("edge", "sketch"), "tint": ("colour",)}
    assert (second.recipe_hash, second.metrics) == ("abc", {"heldout_top1": 0.5})
    assert second.lineage["unet"] == "u"
    assert second.lineage["controlnet/lines/base"] == bundle.read(base).digest
    assert second.lineage["controlnet/tint/base"] == first.digest
    assert (
        second.lineage[f"controlnet/tint/{LAST}"] == plan_of(of_controlnet(tmp_path / "two" / "controlnet" / "tint"))[-1].digest
    )
    for name in bundle.read(base).files:
        assert (tmp_path / "two" / name).read_bytes() == (base / name).read_bytes()
    for name in ("lines", "tint"):
        found, trained = (
            state(tmp_path / "two" / "controlnet" / name),
            state(tmp_path / ("one-trained" if name == "lines" else "two-trained") / "controlnet"),
        )
        for key, value in found.items():
            torch.testing.assert_close(value, trained[key].half().float(), rtol=0, atol=0)
    pipeline = OneStepPipeline.from_bundle(tmp_path / "two", Settings())
    assert pipeline.generate("red circle", 0).shape == (32, 32, 3)


def test_a_controlnet_of_the_same_name_makes_room_with_all_that_was_said_of_it(teacher: Path, tmp_path: Path) -> None:
    facts = {
        "metrics": {"controlnet/union/heldout_edge_f1": 0.9, "top1": 0.5},
        "lineage": {"controlnet/union/finish": "x", "unet": "u"},
    }
    base = tiny_folder(tmp_path / "base")
    tiny_controlnet(base / "unet", base / "controlnet" / "union", seed=8)
    (base / "controlnet" / "union" / "README.md").write_text("another")
    bundle.seal(base, "tiny", **facts)
    found = add(teacher, base, tmp_path / "out", conditions=["edge"])
    assert found.controlnets == {"union": ("edge",)}
    assert found.metrics == {"top1": 0.5}
    assert "controlnet/union/finish" not in found.lineage and found.lineage["unet"] == "u"
    assert not (tmp_path / "out" / "controlnet" / "union" / "README.md").exists()
    assert (base / "controlnet" / "union" / "README.md").is_file()


def test_diffusers_own_layout_of_one_controlnet_does_not_hide_the_second(teacher: Path, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    tiny_controlnet(base / "unet", base / "controlnet", seed=8)
    bundle.seal(base, "tiny")
    before = state(base / "controlnet")
    found = add(teacher, base, tmp_path / "out", conditions=["edge"])
    assert found.controlnets == {"controlnet": (), "union": ("edge",)}
    kept = state(tmp_path / "out" / "controlnet" / "controlnet")
    assert all(torch.equal(kept[key], value) for key, value in before.items())


def test_a_base_may_be_replaced_by_what_is_made_of_it(teacher: Path, tmp_path: Path) -> None:
    base = sealed_base(tmp_path / "base")
    assert list(add(teacher, base, base).controlnets) == ["union"]


def test_what_is_no_result_is_not_replaced(teacher: Path, tmp_path: Path) -> None:
    base, foreign = sealed_base(tmp_path / "base"), tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_bytes(b"x")
    with pytest.raises(AlreadyExists, match="not a bundle"):
        add(teacher, base, foreign)
    assert (foreign / "cat.png").read_bytes() == b"x"


def test_a_teachers_controlnet_is_a_folder_that_plain_diffusers_loads(teacher: Path, tmp_path: Path) -> None:
    recipe = ControlNetRecipe.model_validate(
        {
            "kind": "controlnet", "name": "c", "world": "scenes", "teacher": str(teacher), "conditions": ["edge", "sketch"],
            "controlnet": {"steps": 2, "batch": 2, "lr": 1e-3},
        }
    )  # fmt: skip
    trained = tmp_path / "trained"
    shutil.copytree(tmp_path / "controlnet", trained / "controlnet")
    output = tmp_path / "out"
    for _ in range(2):  # its like may be replaced
        assemble(recipe, plan_of(recipe), teacher, finished(recipe, trained, tmp_path), output)
    assert bundle.control_types(output) == ("edge", "sketch")
    assert json.loads((output / "recipe.json").read_text())["name"] == "c"
    plain = ControlNetModel.from_pretrained(output)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(teacher, controlnet=plain, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "red", image=torch.zeros(1, 3, 32, 32), num_inference_steps=2, guidance_scale=1.0, output_type="np"
    ).images[0]
    assert image.shape == (32, 32, 3) and np.isfinite(image).all()


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", None])
def test_diffusers_loads_a_bundles_controlnet_with_a_mid_stage_and_ours_one_without(
    teacher: Path, tmp_path: Path, mid: str | None
) -> None:
    base = tiny_folder(tmp_path / "base")
    if mid is not None:
        torch.manual_seed(0)
        config = dict(UNet2DConditionModel.load_config(base / "unet"))
        UNet2DConditionModel.from_config(config | {"mid_block_type": mid}).save_pretrained(base / "unet")
    bundle.seal(base, "tiny")
    add(teacher, base, tmp_path / "out")
    folder = tmp_path / "out" / "controlnet" / "union"
    found = controlnet.load(folder)
    assert isinstance(found, StudentControlNetModel) == (mid is None)
    x, t, text, image = torch.randn(2, 8, 4, 4), torch.tensor([999, 999]), torch.randn(2, 5, 32), torch.rand(2, 3, 32, 32)
    expected = from_unet(UNet2DConditionModel.from_pretrained(base / "unet"), 8)
    expected.load_state_dict(state(folder))
    with torch.no_grad():
        down, middle = found(x, t, text, image, return_dict=False)
        theirs, theirs_middle = expected.eval()(x, t, text, image, return_dict=False)
        if mid is not None:
            plain = ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
            theirs, theirs_middle = plain(x, t, text, image, return_dict=False)
    for one, other in zip((*down, middle), (*theirs, theirs_middle), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert bool(middle.any()) == (mid is not None)
