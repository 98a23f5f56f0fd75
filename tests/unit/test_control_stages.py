"""The stages of ControlNets on a tiny teacher: each learns, resumes to the last bit, and leaves a network that serves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxs import controlnet
from sdxs.controlnet import StudentControlNetModel
from tests.controls import CAPTIONS, SHAPE, STEPS, ControlWorld, control_world
from trainer.diffusion import Diffusion
from trainer.loop import Stage, load_state, save_state
from trainer.models.controlnets import Controlled, as_condition
from trainer.models.students import feature_names
from trainer.models.text import TextEncoder
from trainer.pairs import Pairs
from trainer.placement import Placement
from trainer.recipe import ControlNetRecipe
from trainer.sections import WarmupSection
from trainer.stages import STAGES
from trainer.stages.context import Batch, OneStep, StageContext
from trainer.teacher import NobodyToAsk, TeacherClient
from trainer.tracking.samples import sample_grid

NAMES = ("control_shrink", "control_warmup", "control_diff_instruct")
ALL = ("controlnet", *NAMES)
SECTIONS = {"control_shrink": "shrink", "control_warmup": "warmup", "control_diff_instruct": "diff_instruct"}
UNETS = {"controlnet": "teacher", "control_shrink": "student", "control_warmup": "base", "control_diff_instruct": "base"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ControlWorld:
    return control_world(tmp_path_factory.mktemp("controls"))


@pytest.fixture(scope="module")
def client(world: ControlWorld) -> TeacherClient:
    return world.client()


def of_teacher(world: ControlWorld, **section: Any) -> StageContext:
    """The stage that trains the teacher's own ControlNet."""
    recipe = ControlNetRecipe.model_validate(
        {
            "kind": "controlnet", "name": "tiny-controlnet", "world": "scenes", "teacher": str(world.teacher),
            "conditions": ["edge", "sketch"],
            "controlnet": {"steps": STEPS, "batch": 4, "lr": 1e-3, "ema": 0.9, "views": 8, **section},
        }
    )  # fmt: skip
    return StageContext(recipe, world.teacher, NobodyToAsk(), Pairs.of_prompts(CAPTIONS, SHAPE, 1), {})


def stage_of(world: ControlWorld, client: TeacherClient, name: str, **section: Any) -> Any:
    if name == "controlnet":
        return STAGES[name](of_teacher(world, **section))
    return STAGES[name](world.context(client, recipe=world.recipe(STEPS, **{SECTIONS[name]: section})))


def steps_of(stage: Stage, indices: range) -> list[dict[str, float]]:
    return [{name: float(torch.as_tensor(v).detach()) for name, v in stage.step(index).items()} for index in indices]


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ALL)
def test_a_stage_resumes_to_the_last_bit_and_moves_its_controlnet_alone(
    world: ControlWorld, client: TeacherClient, name: str, tmp_path: Path
) -> None:
    whole = stage_of(world, client, name)
    assert isinstance(whole.student, Controlled)
    before = copied(whole.student.controlnet)
    lines = steps_of(whole, range(STEPS))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert not same(before, copied(whole.student.controlnet))
    unet = UNet2DConditionModel.from_pretrained(world.folder / UNETS[name] / "unet")
    assert same(copied(whole.student.unet), copied(unet))
    whole.export(tmp_path / "whole")
    found = controlnet.load(tmp_path / "whole" / "controlnet")
    assert isinstance(found, StudentControlNetModel) == (found.mid_block is None) == (name != "controlnet")

    first = stage_of(world, client, name)
    assert steps_of(first, range(1)) == lines[:1]
    save_state(first, 1, tmp_path / "state.pt")
    resumed = stage_of(world, client, name)
    assert load_state(resumed, tmp_path / "state.pt") == 1
    assert steps_of(resumed, range(1, STEPS)) == lines[1:]
    resumed.export(tmp_path / "resumed")
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} == {"controlnet"}  # a U-Net that has not changed is not written
    for path in files:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "resumed" / path).read_bytes()


@pytest.mark.parametrize("name", ["controlnet", "control_shrink"])
def test_a_stage_leaves_the_moving_average(world: ControlWorld, client: TeacherClient, name: str, tmp_path: Path) -> None:
    stage = stage_of(world, client, name, ema=0.5)
    start = copied(stage.student.controlnet)
    after = []
    for index in range(2):
        stage.step(index)
        after.append(copied(stage.student.controlnet))
    stage.export(tmp_path)
    for key, value in controlnet.load(tmp_path / "controlnet").state_dict().items():
        average = start[key]
        for weights, decay in zip(after, (2 / 11, 3 / 12), strict=True):  # it ramps up as (1 + n) / (10 + n)
            average = decay * average + (1 - decay) * weights[key]
        torch.testing.assert_close(value, average, rtol=1e-4, atol=1e-6)


class Same:
    """The reply to the first request, again and again."""

    def __init__(self, stage: Any) -> None:
        self.found = stage.ahead.get(0)

    def get(self, _number: int) -> Any:
        return self.found


@pytest.mark.parametrize("name", ["controlnet", "control_shrink", "control_warmup"])
def test_a_stage_lowers_its_loss(world: ControlWorld, client: TeacherClient, name: str) -> None:
    """Of one batch, by its ControlNet alone."""
    stage = stage_of(world, client, name, lr=5e-4 if name == "control_shrink" else 3e-3)
    if name == "control_shrink":
        stage.ahead = Same(stage)
    turns = stage.deal.turns(0)
    losses = [float(stage.trainables["unet"].learn(turns, stage._losses)["loss"]) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_first_shrinking_loss_by_hand(world: ControlWorld, client: TeacherClient) -> None:
    """Both sides on the asked x_t and map, in float32: output, and features of the up blocks alone, each relative to its teacher's."""
    stage = stage_of(world, client, "control_shrink")
    asked, _ = stage._draw(0)
    x_BCHW, t_B = torch.from_numpy(asked.noisy_BCHW).float(), torch.from_numpy(asked.t_B)
    assert asked.control_BHWC is not None
    text, map_BCHW = TextEncoder(world.teacher).encode(asked.captions).text_BLD, as_condition(asked.control_BHWC)
    big, unet = controlnet.load(world.controlnet), UNet2DConditionModel.from_pretrained(world.teacher / "unet")
    sides = ((unet, big), (stage.student.unet, stage.student.controlnet))
    outputs, features = [], []
    for network, adds in sides:
        seen: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            for block in list(network.up_blocks)[-len(stage.student.unet.up_blocks) :]
        ]
        with torch.no_grad():
            down, mid = adds(x_BCHW, t_B, text, map_BCHW, return_dict=False)
            outputs.append(
                network(x_BCHW, t_B, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
            )
        features.append(seen)
        for hook in hooks:
            hook.remove()
    output = (outputs[0] - outputs[1]).square().mean()
    relative = [(a - b).square().mean() / a.square().mean() for a, b in zip(*features, strict=True)]
    assert len(relative) == 2
    line = steps_of(stage, range(1))[0]
    assert line["output"] == pytest.approx(float(output), rel=5e-3)
    assert line["features"] == pytest.approx(float(sum(relative)), rel=5e-3)
    assert line["loss"] == pytest.approx(line["output"] + line["features"], rel=1e-5)
    assert list(stage.teacher_names) == [name for name in feature_names(stage.student.unet)[0] if name.startswith("up_blocks")]


def test_the_online_model_carries_the_teachers_controlnet_and_leaves_it_alone(
    world: ControlWorld, client: TeacherClient
) -> None:
    stage = stage_of(world, client, "control_diff_instruct")
    online, big = stage.online.network, controlnet.load(world.controlnet)
    assert same(copied(online.unet), copied(UNet2DConditionModel.from_pretrained(world.teacher / "unet")))
    steps_of(stage, range(2))
    assert same(copied(online.controlnet), copied(big))
    assert not any(weight.requires_grad for weight in online.controlnet.parameters())
    assert not same(copied(online.unet), copied(UNet2DConditionModel.from_pretrained(world.teacher / "unet")))


def test_the_online_models_score_follows_the_control_image(world: ControlWorld, client: TeacherClient) -> None:
    """Before it has learnt anything it says what the teacher with its ControlNet says."""
    stage = stage_of(world, client, "control_diff_instruct")
    batch = world.context(client).draw(stage.deal.turn(0), 4)
    t_B = torch.tensor([50, 300, 700, 990])
    assert batch.control_BHWC is not None
    network = UNet2DConditionModel.from_pretrained(world.teacher / "unet")
    text = TextEncoder(world.teacher).encode(batch.captions).text_BLD
    with torch.no_grad():
        found = stage.online.predict(batch.target_BCHW, t_B, batch.captions, batch.control_BHWC)
        map_BCHW = as_condition(batch.control_BHWC)
        down, mid = controlnet.load(world.controlnet)(batch.target_BCHW, t_B, text, map_BCHW, return_dict=False)
        expected = network(
            batch.target_BCHW, t_B, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        )
        free = network(batch.target_BCHW, t_B, text).sample
    torch.testing.assert_close(found, expected.sample, rtol=1e-4, atol=1e-5)
    assert (found - free).abs().max() > 0.01


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_fresh_noise_keeps_unit_variance_and_the_rest_of_the_correlation(world: ControlWorld, share: float) -> None:
    noise_BCHW = torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = Batch(noise_BCHW, noise_BCHW, [], torch.Generator().manual_seed(2))
    section = WarmupSection(steps=1, batch=1, lr=1.0, feature_weights=(), fresh_noise=share)
    one_step = OneStep(nn.Identity(), TextEncoder(world.teacher), Diffusion.of(world.teacher))
    found = one_step.start(batch, section)
    assert float(found.var()) == pytest.approx(1.0, abs=0.02)
    correlation = float(torch.corrcoef(torch.stack([noise_BCHW.flatten(), found.flatten()]))[0, 1])
    assert correlation == pytest.approx(math.sqrt(1 - share), abs=0.02)
    again = one_step.start(replace(batch, generator=torch.Generator().manual_seed(2)), section)
    assert torch.equal(found, again)
    assert one_step.start(batch, section.model_copy(update={"fresh_noise": 0.0})) is noise_BCHW


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"micro_batch": 2}, "online ratio": {"online_ratio": 2}, "sid": {"sid": {}}, "latent gan": {"latent_gan": {}},
    "decoupled": {"decoupled": {}}, "online lora": {"online_lora_rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("option", [pytest.param(name, marks=() if name == "sid" else pytest.mark.slow) for name in OPTIONS])
def test_the_options_of_the_scores_know_control_images(world: ControlWorld, client: TeacherClient, option: str) -> None:
    """Another control image for every row, all else equal, is another loss."""
    recipe = world.recipe(diff_instruct=OPTIONS[option])
    lines = []
    for conditions in (("edge",), ("colour",)):
        context = world.context(client, recipe=recipe.model_copy(update={"conditions": conditions}))
        lines.append(steps_of(STAGES["control_diff_instruct"](context), range(1))[0])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["score_gradient"] != lines[1]["score_gradient"]


@pytest.mark.parametrize("name", ["controlnet", "control_diff_instruct"])
def test_activation_checkpointing_changes_nothing(world: ControlWorld, client: TeacherClient, name: str) -> None:
    lines = [steps_of(stage_of(world, client, name), range(1))[0]]
    if name == "controlnet":
        context = replace(of_teacher(world), placement=Placement(activation_checkpointing=True))
    else:
        context = world.context(client, Placement(activation_checkpointing=True))
    stage: Any = STAGES[name](context)
    assert stage.student.controlnet.is_gradient_checkpointing and stage.student.unet.is_gradient_checkpointing
    again: list[bool] = []
    block = stage.student.controlnet.down_blocks[0].resnets[0]
    block.register_forward_pre_hook(lambda *_: again.append(torch.is_grad_enabled()))
    lines += steps_of(stage, range(1))
    assert len([one for one in again if one]) == 2  # forward, and once more in the backward pass
    assert lines[1] == pytest.approx(lines[0], rel=1e-4)


@pytest.mark.parametrize("name", ["control_shrink", "control_warmup"])
def test_a_grid_shows_control_images_the_teachers_samples_and_the_stages_own(
    world: ControlWorld, client: TeacherClient, name: str
) -> None:
    """Three captions, one below the other: maps, samples, what the stage makes of the maps."""
    context = world.context(client)
    stage = STAGES[name](context)
    found = sample_grid(name, stage, context)
    assert found is not None
    rows = np.asarray(found).astype(int)[:, :32]
    assert found.size == (3 * 34 - 2, 3 * 34 - 2)  # white lines between the images
    samples = world.images.take(torch.tensor([0]))[0].astype(int)
    assert np.abs(rows[34:66] - samples).max() <= 1  # those went through float16
    free = sample_grid(name, stage, replace(context, sample_images=None))
    assert free is not None and free.size == (100, 66)
    assert np.abs(np.asarray(free).astype(int)[34:, :32] - rows[68:]).max() > 0
