"""Which changes of a recipe make which stages run again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxs import bundle
from sdxs.errors import AlreadyExists, InvalidRequest, NotFound
from sdxs.noise import latent_noise
from sdxs.settings import Settings
from tests.controls import control_recipe, tiny_controlnet
from tests.models import tiny_folder, tiny_recipe, tiny_teacher
from trainer import distill as module
from trainer.cluster import Cluster, StageJob
from trainer.distill import Distillation
from trainer.pairs import Pairs
from trainer.plan import controlnet_digest
from trainer.recipe import ControlRecipe, DistillRecipe, RunRecipe, parse
from trainer.sources import teacher_folder
from trainer.specs import TeacherSpec
from trainer.stages.context import StageContext
from trainer.teacher import Decode, InProcessTeacher, Sample, Teacher
from trainer.triplets import BentMaps, SampleImages, pixels
from trainer.worker import build_stage

STAGES = ["decoder", "unet", "warmup", "diff_instruct"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("models") / "teacher")


def plan(data: dict[str, Any], folder: Path) -> dict[str, str]:
    settings = Settings(store_url=f"file://{folder}", cache_dir=folder / "cache")
    recipe = parse(data)
    assert isinstance(recipe, RunRecipe)
    distillation = Distillation(recipe, settings, Cluster(), lambda *_: None)
    return {step.name: step.digest for step in distillation.plan()}


@pytest.mark.parametrize(
    ("section", "again"),
    [
        ("pairs", {"pairs", *STAGES}),
        ("compositions", {"compositions", *STAGES}),
        ("decoder", {"decoder"}),
        ("unet", {"unet", "warmup", "diff_instruct"}),
        ("warmup", {"warmup", "diff_instruct"}),
        ("diff_instruct", {"diff_instruct"}),
        ("evaluation", set()),
    ],
)
def test_a_change_reaches_what_reads_it_and_nothing_else(teacher: Path, tmp_path: Path, section: str, again: set[str]) -> None:
    data = tiny_recipe(teacher)
    field = {"pairs": "count", "compositions": "count", "evaluation": "train_images"}.get(section, "steps")
    changed = {**data, section: {**data[section], field: data[section][field] + 1}}
    before, after = plan(data, tmp_path), plan(changed, tmp_path)
    assert {name for name in before if before[name] != after[name]} == again


def test_what_is_not_a_bundle_is_not_replaced(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "photos").mkdir(parents=True)
    settings = Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")
    distillation = Distillation(DistillRecipe.model_validate(tiny_recipe(teacher)), settings, Cluster(), lambda *_: None)
    with pytest.raises(AlreadyExists, match="not a bundle"):  # before any stage, and so before Ray
        distillation.run(output)
    assert (output / "photos").is_dir()


def test_only_a_bare_name_is_an_embedded_teacher(tmp_path: Path) -> None:
    own = tiny_teacher(tmp_path / "my-teacher")
    assert teacher_folder(str(own)) == own.resolve()
    assert teacher_folder("scenes-teacher").parts[-3:] == ("assets", "scenes", "teacher")
    with pytest.raises(NotFound, match="photos-teacher"):
        teacher_folder("photos-teacher")


def test_a_recipe_without_compositions_draws_none(teacher: Path, tmp_path: Path) -> None:
    data = tiny_recipe(teacher)
    without = {name: value for name, value in data.items() if name != "compositions"}
    before, after = plan(data, tmp_path), plan(without, tmp_path)
    assert "compositions" not in after
    assert before["pairs"] == after["pairs"] and before["unet"] != after["unet"]


def test_other_weights_of_the_teacher_make_everything_again(teacher: Path, tmp_path: Path) -> None:
    before = plan(tiny_recipe(teacher), tmp_path)
    other = tiny_teacher(tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text("{}")
    after = plan(tiny_recipe(other), tmp_path)
    assert all(before[name] != after[name] for name in before)


def test_a_card_makes_nothing_again(teacher: Path, tmp_path: Path) -> None:
    other = tiny_teacher(tmp_path / "other")
    before = plan(tiny_recipe(other), tmp_path)
    (other / "README.md").write_text("a card")
    assert plan(tiny_recipe(other), tmp_path) == before


CONTROL = ["control_shrink", "control_warmup", "control_diff_instruct"]


@pytest.fixture(scope="module")
def control(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A ControlNet's recipe, with a base that has none yet."""
    folder = tmp_path_factory.mktemp("control")
    base = tiny_folder(folder / "base")
    bundle.seal(base, "base")
    return control_recipe(teacher, tiny_controlnet(teacher / "unet", folder / "controlnet"), str(base))


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("section", "change", "again"),
    [
        ("pairs", {"count": 17}, {"pairs", "images", "unet", *CONTROL}),
        ("images", {"format": "jpeg"}, {"images", *CONTROL}),
        ("unet", {"steps": 9}, {"unet", *CONTROL}),
        ("shrink", {"steps": 9}, set(CONTROL)),
        ("warmup", {"steps": 9}, set(CONTROL[1:])),
        ("warmup", {"fresh_noise": 0.5}, set(CONTROL[1:])),
        ("diff_instruct", {"steps": 9}, set(CONTROL[2:])),
        ("student", {"blocks": "cross-attention"}, {"pairs", "images", "unet", *CONTROL}),
        ("evaluation", {"train_images": 9}, set()),
    ],
)
def test_a_change_of_a_control_recipe_reaches_what_reads_it(
    control: dict[str, Any], tmp_path: Path, section: str, change: dict[str, Any], again: set[str]
) -> None:
    changed = {**control, section: {**control.get(section, {}), **change}}
    assert moved(plan(control, tmp_path), plan(changed, tmp_path)) == again


CONTROLLED = {"controlled", "controlled_images"}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"controlled": {"count": 6, "steps": 3, "warp": 0.5}}, {*CONTROLLED, *CONTROL}),
        ({"conditions": ["edge"]}, {*CONTROLLED, *CONTROL}),
        ({"images": {"format": "jpeg"}}, {"images", *CONTROLLED, *CONTROL}),
        ({"unet": {"steps": 9, "batch": 4, "lr": 1e-3}}, {"unet", *CONTROL}),
        ({"pairs": {"count": 17}}, {"pairs", "images", "unet", *CONTROLLED, *CONTROL}),
    ],
)
def test_controlled_samples_are_made_again_with_what_they_are_drawn_from(
    control: dict[str, Any], tmp_path: Path, change: dict[str, Any], again: set[str]
) -> None:
    before = {**control, "controlled": {"count": 6, "steps": 3}}
    assert moved(plan(before, tmp_path), plan({**before, **change}, tmp_path)) == again
    plain, more = plan(control, tmp_path), plan(before, tmp_path)
    assert {name for name in plain if plain[name] == more[name]} == {"pairs", "images", "unet"}


def test_another_teacher_cannot_draw_under_the_controlnet(control: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"controlled.*the ControlNet's own teacher draws these") as caught:
        parse({**control, "controlled": {"count": 6, "teacher": "scenes-teacher"}})
    assert caught.value.field.startswith("recipe.controlled")


def test_controlled_samples_are_the_teachers_under_bent_maps_and_the_stages_learn_from_them_alone(
    control: dict[str, Any], tmp_path: Path
) -> None:
    """Drawn without Ray; then a stage as a worker builds it."""
    recipe = parse(
        {
            **control,
            "pairs": {"count": 4, "steps": 2},
            "conditions": ["edge"],
            "controlled": {"count": 3, "steps": 3, "guidance": 2.0},
        }
    )
    assert isinstance(recipe, ControlRecipe)
    settings = Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")
    run = Distillation(recipe, settings, Cluster(teachers=0), lambda *_: None)
    steps = {step.name: step for step in run.plan()}
    for name in ("pairs", "images", "controlled", "controlled_images"):
        spec = steps[name].teacher
        assert spec is not None
        run.draw(steps[name], InProcessTeacher(Teacher.load(spec)))
    plain, drawn = (Pairs.load(run.artifacts.fetch(name, steps[name].digest)) for name in ("pairs", "controlled"))
    images = SampleImages.load(run.artifacts.fetch("images", steps["images"].digest))
    teacher = Teacher(Path(recipe.teacher))
    teacher.attach(Path(recipe.controlnet))
    followed = list[bool]()
    for row, (caption, seed) in enumerate(zip(drawn.captions, drawn.seed_N.tolist(), strict=True)):
        noise = latent_noise(seed, tuple(drawn.latent_NCHW.shape[1:]))[None]
        maps = [BentMaps(images, ["edge"], 1.0)(n, seed) for n, other in enumerate(plain.captions) if other == caption]
        asked = [Sample(noise, [caption], 3, 2.0, "ddim", one[None]) for one in maps] + [Sample(noise, [caption], 3, 2.0)]
        *under, free = (np.abs(teacher.answer(one)[0] - drawn.latent_NCHW[[row]].numpy()).max() for one in asked)
        followed.append(min(under) < 4e-3 < free)
    assert followed == [True] * 3
    job = StageJob(
        stage="control_shrink", digest="", recipe=recipe.model_dump(mode="json"), prompts=run.prompts.digest, settings={},
        inputs={n: steps[n].digest for n in ("controlled", "controlled_images")}, teacher=steps["control_shrink"].teacher,
        client=None, board=None, cluster=run.cluster,
    )  # fmt: skip
    contexts = list[StageContext]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.worker.STAGES", {"control_shrink": contexts.append})
        build_stage(job, run.artifacts, torch.device("cpu"))
    [context] = contexts
    assert context.pairs.captions == drawn.captions and context.sample_images is not None
    shown = context.sample_images.take(torch.arange(3))
    [decoded] = teacher.answer(Decode(drawn.latent_NCHW[:].numpy()))
    np.testing.assert_array_equal(shown, pixels(decoded))


def test_only_steps_that_see_control_images_depend_on_conditions_and_controlnet(
    control: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    before = plan(control, tmp_path)
    assert moved(before, plan({**control, "conditions": ["edge"]}, tmp_path)) == set(CONTROL)
    assert moved(before, plan({**control, "control_name": "other"}, tmp_path)) == set()
    other = tiny_controlnet(teacher / "unet", tmp_path / "other", seed=9)
    assert moved(before, plan({**control, "controlnet": str(other)}, tmp_path)) == set(CONTROL)
    same = tiny_controlnet(teacher / "unet", tmp_path / "elsewhere")
    (same / "README.md").write_text("a card")
    assert plan({**control, "controlnet": str(same)}, tmp_path) == before
    controlnet_digest.cache_clear()


def test_a_base_matters_to_one_step_training_and_its_other_controlnets_do_not(control: dict[str, Any], tmp_path: Path) -> None:
    before = plan(control, tmp_path)
    other = tiny_folder(tmp_path / "other", seed=1)
    bundle.seal(other, "base")
    assert moved(before, plan({**control, "base": str(other)}, tmp_path)) == set(CONTROL[1:])
    more = tiny_folder(tmp_path / "more")
    tiny_controlnet(more / "unet", more / "controlnet" / "depth")
    bundle.seal(more, "base")
    assert plan({**control, "base": str(more)}, tmp_path) == before


def test_a_base_and_its_controlnet_share_samples_and_shrunk_unet(
    control: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    """In the same store they are drawn and trained once."""
    distilled = {**tiny_recipe(teacher), "unet": control["unet"]}
    distilled.pop("compositions")
    first, second = plan(distilled, tmp_path), plan(control, tmp_path)
    assert {name for name in first if first[name] == second.get(name)} == {"pairs", "unet"}


def test_a_teachers_controlnet_depends_on_its_conditions(teacher: Path, tmp_path: Path) -> None:
    data = {
        "kind": "controlnet", "name": "c", "world": "scenes", "teacher": str(teacher), "conditions": ["edge"],
        "controlnet": {"steps": 2, "batch": 2, "lr": 1e-3},
    }  # fmt: skip
    before = plan(data, tmp_path)
    assert moved(before, plan({**data, "conditions": ["edge", "sketch"]}, tmp_path)) == {"controlnet"}
    assert moved(before, plan({**data, "world": "emoji"}, tmp_path)) == {"controlnet"}


@pytest.mark.parametrize("conditions", [["edge", "edge"], [], ["depth"]])
def test_conditions_are_known_and_stand_once(control: dict[str, Any], conditions: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse({**control, "conditions": conditions})
    assert caught.value.field.startswith("recipe.conditions")


class WholeTeacher(InProcessTeacher):
    """A pool of one place."""

    def whole(self) -> WholeTeacher:
        return self


@dataclass
class Pool:
    """Stands where actors would be; answers in this process."""

    spec: TeacherSpec
    closed: bool = False

    def client(self) -> WholeTeacher:
        return WholeTeacher(Teacher.load(self.spec))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("teachers", [0, 1])
@pytest.mark.parametrize("kind", ["controlnet", "unet"])
def test_a_pool_that_only_encoded_images_makes_room_before_the_stage_begins(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, teachers: int
) -> None:
    """Its places may be the workers' own, who would wait for them for ever."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    (tmp_path / "red.txt").write_text("red")
    images, size = {"images": str(tmp_path), "size": 32}, {"steps": 2, "batch": 2, "lr": 1e-3}
    data = tiny_recipe(teacher) | {"unet": {**size, "images": images}}
    if kind == "controlnet":
        data = {
            "kind": kind,
            "name": "c",
            "teacher": str(teacher),
            "conditions": ["edge"],
            "controlnet": {**size, "images": images},
        }
    recipe, pools, jobs = parse(data), list[Pool](), list[tuple[StageJob, bool]]()
    assert isinstance(recipe, RunRecipe)

    def opened(spec: TeacherSpec, *_: Any, **__: Any) -> Pool:
        pools.append(Pool(spec))
        return pools[-1]

    monkeypatch.setattr(module, "TeacherPool", opened)
    monkeypatch.setattr(module, "run_stage", lambda job, *_: jobs.append((job, pools[0].closed)))
    settings = Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")
    run = Distillation(recipe, settings, Cluster(teachers=teachers), lambda *_: None)
    run._board = "board"
    run._train(next(step for step in run.plan() if step.name == kind))
    [(job, closed)] = jobs
    asks = kind == "unet"
    assert closed == (not asks or teachers == 0)
    assert (job.teacher is not None, job.client is not None) == (asks, asks and teachers == 1)
