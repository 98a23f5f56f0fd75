"""Who answers each step: the few-step model draws, the straightened one in its place, and the offline one gives the score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from tests.models import tiny_recipe, tiny_teacher
from trainer.artifacts import open_artifacts
from trainer.pairs import Pairs
from trainer.plan import Step, dated, steps
from trainer.recipe import DistillRecipe, StyleRecipe, parse
from trainer.sources import load_frozen
from trainer.specs import TeacherSpec
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import Denoise, NobodyToAsk, Teacher

SHAPE, CAPTIONS = (8, 4, 4), ["a red circle", "blue star"]
FEW = {"count": 4, "steps": 2, "guidance": 1.0}
SIZE = {"steps": 1, "batch": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three teachers that differ in their weights."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: str(tiny_teacher(folder / name, seed)) for seed, name in enumerate(("slow", "fast", "other"), start=1)}


def recipe(folders: dict[str, str], **changes: Any) -> DistillRecipe:
    return DistillRecipe.model_validate(tiny_recipe(Path(folders["slow"])) | changes)


def asked(plan: list[Step]) -> dict[str, str | None]:
    """Whom each step asks, by name."""
    return {step.name: Path(step.teacher.source).name if step.teacher else None for step in plan}


def test_each_model_is_asked_for_what_the_recipe_names_it_for(folders: dict[str, str]) -> None:
    few = {name: {**FEW, "teacher": folders["fast"]} for name in ("pairs", "compositions")}
    made = recipe(folders, **few, offline={"teacher": folders["other"]})
    assert asked(steps(made)) == {
        "pairs": "fast", "compositions": "fast", "decoder": "slow", "unet": "slow", "warmup": None, "diff_instruct": "other",
    }  # fmt: skip
    plain = asked(steps(recipe(folders)))
    assert set(plain.values()) == {"slow", None} and plain["diff_instruct"] == "slow"


def test_samples_to_straighten_on_and_to_learn_a_style_from_may_be_another_models(folders: dict[str, str]) -> None:
    few = {**FEW, "teacher": folders["fast"]}
    straight = asked(steps(recipe(folders, straighten={**SIZE, "samples": few})))
    assert (straight["samples"], straight["straighten"], straight["pairs"]) == ("fast", "slow", "slow")
    style = StyleRecipe.model_validate(
        {
            "kind": "style", "name": "painted", "world": "scenes", "base": "emoji", "teacher": folders["slow"], "pairs": few,
            "style": {"path": "style.safetensors"}, "lora": {**SIZE, "online_lr": 1e-4, "feature_weights": (1.0,)},
            "evaluation": {"train_images": 1, "heldout_images": 1},
        }
    )  # fmt: skip
    assert asked(steps(style)) == {"pairs": "fast", "style": "slow"}


def planned(made: DistillRecipe) -> dict[str, Step]:
    return {step.name: step for step in dated(steps(made), lambda _: {}, lambda _: None)}


def test_the_straightened_weights_draw_what_is_drawn_after_them_and_nothing_else(folders: dict[str, str]) -> None:
    plan = planned(recipe(folders, straighten={**SIZE, "samples": FEW}))
    found = {name: step.teacher.straightened for name, step in plan.items() if step.teacher is not None}
    assert found == {
        "samples": None, "straighten": None, "pairs": plan["straighten"].digest, "compositions": plan["straighten"].digest,
        "decoder": None, "unet": None, "diff_instruct": None,
    }  # fmt: skip


def test_another_model_makes_its_steps_again_and_those_that_read_them(folders: dict[str, str]) -> None:
    before = planned(recipe(folders))
    changes = {
        "pairs": {"pairs": {**tiny_recipe(Path(folders["slow"]))["pairs"], "teacher": folders["fast"]}},
        "diff_instruct": {"offline": {"teacher": folders["other"]}},
    }
    again = {
        name: {step for step, found in planned(recipe(folders, **change)).items() if found.digest != before[step].digest}
        for name, change in changes.items()
    }
    assert again == {
        "pairs": {"pairs", "decoder", "unet", "warmup", "diff_instruct"},
        "diff_instruct": {"diff_instruct"},
    }


@pytest.mark.parametrize("name", ["pairs", "compositions"])
def test_two_models_cannot_both_draw(folders: dict[str, str], name: str) -> None:
    data = tiny_recipe(Path(folders["slow"])) | {"straighten": {**SIZE, "samples": FEW}}
    assert isinstance(parse(data), DistillRecipe)
    with pytest.raises(InvalidRequest, match=rf"{name}\.teacher: with \[straighten\] the straightened teacher draws"):
        parse(data | {name: {**FEW, "teacher": folders["fast"]}})


def test_a_straightened_teacher_answers_with_the_straightened_unet(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the result that the digest names; everything else is the teacher's."""
    for name, value in {"SDXS_STORE_URL": f"file://{tmp_path}/store", "SDXS_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    load_frozen(UNet2DConditionModel, Path(folders["fast"]) / "unet").save_pretrained(tmp_path / "result" / "unet")
    open_artifacts(Settings()).save("straighten", "abc", tmp_path / "result", {})

    request = Denoise(np.ones((2, *SHAPE), np.float32), np.array([10, 900]), CAPTIONS, 2.0)
    spec = TeacherSpec(folders["slow"])
    slow, straightened = Teacher.load(spec), Teacher.load(replace(spec, straightened="abc"))
    [plain], [found] = slow.answer(request), straightened.answer(request)
    slow.unet = load_frozen(UNet2DConditionModel, Path(folders["fast"]) / "unet")
    np.testing.assert_allclose(found.astype(float), slow.answer(request)[0].astype(float), rtol=2e-3, atol=2e-3)
    assert np.abs(found.astype(float) - plain).max() > 0.05


def test_the_online_model_begins_as_the_other_offline_model(folders: dict[str, str], tmp_path: Path) -> None:
    made = recipe(folders, offline={"teacher": folders["other"]})
    pairs = Pairs(torch.zeros(2, *SHAPE).half(), torch.arange(2), CAPTIONS)
    unet = STAGES["unet"](StageContext(made, Path(folders["slow"]), NobodyToAsk(), pairs, {}))
    unet.export(tmp_path)
    stage = STAGES["diff_instruct"](StageContext(made, Path(folders["slow"]), NobodyToAsk(), pairs, {"warmup": tmp_path}))
    online = stage.trainables["online"].network.state_dict()
    for folder, same in (("other", True), ("slow", False)):
        weights = load_frozen(UNet2DConditionModel, Path(folders[folder]) / "unet").state_dict()
        assert all(torch.equal(online[name], value) for name, value in weights.items()) == same
