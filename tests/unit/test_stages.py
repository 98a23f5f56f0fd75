"""The four distillation stages on a tiny teacher, each fed by the folders of those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from sdxs.noise import latent_noise
from tests.models import tiny_recipe, tiny_teacher
from trainer.diffusion import Diffusion
from trainer.loop import Stage, load_state, save_state
from trainer.models.features import UNetEncoder
from trainer.models.students import FeatureTap, shrink
from trainer.models.text import TextEncoder
from trainer.pairs import Pairs, PairsOrder, draw_pairs
from trainer.placement import Deal
from trainer.recipe import DistillRecipe
from trainer.sources import load_frozen
from trainer.stages import STAGES
from trainer.stages.context import Ahead, OneStep, StageContext
from trainer.stages.decoder import PatchDiscriminator
from trainer.teacher import Decode, Denoise, InProcessTeacher, Request, Teacher, compact

STEPS, SHAPE = 3, (8, 4, 4)
DIFF_INSTRUCT = {
    "loss", "score_gradient", "gap", "feature_matching", "online", "alpha", "lambda_fm", "gradient_norm"
}  # fmt: skip
UPSTREAM = {"decoder": [], "unet": [], "warmup": ["unet"], "diff_instruct": ["warmup"]}
NAMES = tuple(UPSTREAM)
CAPTIONS = ["a red circle", "blue star", "green square"]


@dataclass
class Done:
    """All stages after `STEPS` steps: what each reported, its exported folder, and its context."""

    teacher: Teacher
    pairs: Pairs
    metrics: dict[str, list[dict[str, float]]]
    folders: dict[str, Path]
    contexts: dict[str, StageContext]


def steps_of(stage: Stage, indices: range) -> list[dict[str, float]]:
    return [{name: float(torch.as_tensor(v).detach()) for name, v in stage.step(index).items()} for index in indices]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("stages")
    teacher = Teacher(tiny_teacher(folder / "teacher"))
    recipe = DistillRecipe.model_validate(tiny_recipe(teacher.folder, STEPS))
    client = InProcessTeacher(teacher)
    pairs = draw_pairs(client, PairsOrder.of(CAPTIONS, recipe.pairs, SHAPE, 1), lambda _done: None)
    found = Done(teacher, pairs, {}, {}, {})
    for name in NAMES:
        build = STAGES[name]
        inputs = {upstream: found.folders[upstream] for upstream in UPSTREAM[name]}
        found.contexts[name] = StageContext(recipe, teacher.folder, client, pairs, inputs)
        stage = build(found.contexts[name])
        found.metrics[name] = steps_of(stage, range(stage.steps))
        found.folders[name] = folder / name
        stage.export(found.folders[name])
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    return state


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder", {"loss", "down8_l1", "pixel_l1", "gan", "discriminator", "gradient_norm"}),
        ("unet", {"loss", "output", "features", "gradient_norm"}),
        ("warmup", {"loss", "feature_matching", "latent_l2", "gradient_norm"}),
        ("diff_instruct", DIFF_INSTRUCT),
    ],
)
def test_every_step_reports_finite_numbers(done: Done, name: str, expected: set[str]) -> None:
    assert len(done.metrics[name]) == STEPS
    for line in done.metrics[name]:
        assert set(line) == expected
        assert all(math.isfinite(value) for value in line.values())


def test_reported_totals_are_the_sums_of_their_terms(done: Done) -> None:
    for line in done.metrics["unet"]:
        assert line["loss"] == pytest.approx(line["output"] + line["features"], rel=1e-5)
    for line in done.metrics["warmup"]:
        assert line["loss"] == pytest.approx(line["feature_matching"] + line["latent_l2"], rel=1e-5)
    assert [line["alpha"] for line in done.metrics["diff_instruct"]] == pytest.approx([1.0, 0.9, 0.8])
    assert [line["lambda_fm"] for line in done.metrics["diff_instruct"]] == pytest.approx([1.0, 0.6, 0.2])


def test_the_decoder_is_exported_in_the_diffusers_format(done: Done) -> None:
    vae = AutoencoderTiny.from_pretrained(done.folders["decoder"] / "vae")
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 8, 4, 4)).sample.shape == (1, 3, 32, 32)


def test_each_student_starts_where_the_stage_before_ended(done: Done) -> None:
    teacher = UNet2DConditionModel.from_pretrained(done.teacher.folder / "unet")
    before = shrink(teacher).state_dict()
    for name in ("unet", "warmup", "diff_instruct"):
        stage = STAGES[name](done.contexts[name])
        assert distance(dict(stage.trainables["unet"].network.state_dict()), before) == 0
        after = weights(done.folders[name])
        # AdamW moves a weight by at most about the rate, 1e-3, a step.
        assert 1e-4 < distance(after, before) < STEPS * 1.5e-3
        before = after


def test_the_online_model_starts_as_the_teacher(done: Done) -> None:
    stage = STAGES["diff_instruct"](done.contexts["diff_instruct"])
    online = stage.trainables["online"].network.state_dict()
    assert distance(dict(online), weights(done.teacher.folder)) == 0


def test_the_first_distillation_loss_by_hand(done: Done) -> None:
    """Teacher and shrunk student on the asked x_t, without pool, hooks or float16."""
    stage: Any = STAGES["unet"](done.contexts["unet"])
    asked, _ = stage._draw(0)
    student = shrink(UNet2DConditionModel.from_pretrained(done.teacher.folder / "unet"))
    x_BCHW, t_B = torch.from_numpy(asked.noisy_BCHW).float(), torch.from_numpy(asked.t_B)
    text_BLD = done.teacher.text.encode(asked.captions).text_BLD
    with torch.no_grad():
        expected = (student(x_BCHW, t_B, text_BLD).sample - done.teacher.unet(x_BCHW, t_B, text_BLD).sample).square().mean()
    assert done.metrics["unet"][0]["output"] == pytest.approx(float(expected), rel=5e-3)


def test_the_first_decoder_loss_by_hand(done: Done) -> None:
    stage: Any = STAGES["decoder"](done.contexts["decoder"])
    latent_BCHW, _ = stage._draw(0)
    with torch.no_grad():
        target = done.teacher.vae.decode(latent_BCHW).sample.clamp(-1, 1)
        error = (stage.vae.decode(latent_BCHW).sample - target).numpy()
    assert done.metrics["decoder"][0]["pixel_l1"] == pytest.approx(np.abs(error).mean(), rel=5e-3)
    blocks = error.reshape(4, 3, 4, 8, 4, 8).mean((3, 5))
    assert done.metrics["decoder"][0]["down8_l1"] == pytest.approx(np.abs(blocks).mean(), rel=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_stage_repeats_the_unbroken_one_exactly(done: Done, name: str, tmp_path: Path) -> None:
    first = STAGES[name](done.contexts[name])
    assert steps_of(first, range(2)) == done.metrics[name][:2]
    save_state(first, 2, tmp_path / "state.pt")
    resumed = STAGES[name](done.contexts[name])
    assert load_state(resumed, tmp_path / "state.pt") == 2
    assert steps_of(resumed, range(2, 3)) == done.metrics[name][2:]


def test_workers_of_one_run_draw_different_batches(done: Done) -> None:
    context = done.contexts["warmup"]
    drawn = [context.draw(Deal(4, 2, rank, 2).turn(0), 4).noise_BCHW for rank in (0, 1, 0)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_one_step_is_alpha_x_minus_sigma_v_at_the_last_timestep(done: Done) -> None:
    student = UNet2DConditionModel.from_pretrained(done.folders["warmup"] / "unet")
    text = TextEncoder(done.teacher.folder)
    noise = torch.from_numpy(np.stack([latent_noise(seed, SHAPE) for seed in (1, 2)]))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.prod(1 - betas)
    with torch.no_grad():
        found = OneStep(student, text, Diffusion.of(done.teacher.folder))(noise, CAPTIONS[:2])
        v = student(noise, 999, text.encode(CAPTIONS[:2]).text_BLD).sample
    expected = alpha_bar**0.5 * noise.numpy() - (1 - alpha_bar) ** 0.5 * v.numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_encoder_features_are_those_of_the_teachers_own_forward_pass(done: Done) -> None:
    latent, text = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), TextEncoder(done.teacher.folder)
    unet = load_frozen(UNet2DConditionModel, done.teacher.folder / "unet")
    found = UNetEncoder(unet)(latent, text.encode(CAPTIONS[:2]))
    teacher = UNet2DConditionModel.from_pretrained(done.teacher.folder / "unet").eval()
    tap = FeatureTap(teacher, [f"down_blocks.{i}" for i in range(3)])
    with torch.no_grad():
        teacher(latent, 0, text.encode(CAPTIONS[:2]).text_BLD)
    for feature, expected in zip(found, [latent, *tap.take()], strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


def test_guidance_moves_away_from_the_unconditional_output(done: Done) -> None:
    noisy = np.stack([latent_noise(seed, SHAPE) for seed in (1, 2)])
    t_B, client = np.array([100, 800]), InProcessTeacher(done.teacher)

    def ask(captions: list[str], guidance: float) -> np.ndarray:
        return client.submit(Denoise(noisy, t_B, captions, guidance)).result()[0].astype(np.float64)

    uncond, cond, guided = ask(["", ""], 1.0), ask(CAPTIONS[:2], 1.0), ask(CAPTIONS[:2], 4.0)
    np.testing.assert_allclose(guided, uncond + 4 * (cond - uncond), rtol=0.02, atol=0.02)


def test_the_teacher_decodes_as_its_autoencoder(done: Done) -> None:
    latent = np.stack([latent_noise(seed, SHAPE) for seed in (1, 2)])
    [image] = InProcessTeacher(done.teacher).submit(Decode(compact(torch.from_numpy(latent)))).result()
    with torch.no_grad():
        expected = done.teacher.vae.decode(torch.from_numpy(latent)).sample
    np.testing.assert_allclose(image.astype(np.float32), expected.numpy(), rtol=5e-3, atol=5e-3)


class Recorder(InProcessTeacher):
    """Notes which steps were asked for."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher)
        self.asked: list[float] = []

    def submit(self, request: Request) -> Any:
        assert isinstance(request, Decode)
        self.asked.append(float(request.latent_BCHW[0, 0, 0, 0]))
        return super().submit(request)


def test_requests_run_ahead_but_never_beyond_the_end(done: Done) -> None:
    recorder = Recorder(done.teacher)

    def draw(step: int) -> tuple[int, Request]:
        return step, Decode(np.full((1, *SHAPE), step, np.float16))

    ahead = Ahead(recorder, draw, count=6, depth=2)
    for step, asked in ((1, 3), (2, 4), (3, 5), (4, 5), (5, 5)):
        kept, [image] = ahead.get(step)
        assert kept == step
        with torch.no_grad():
            expected = done.teacher.vae.decode(torch.full((1, *SHAPE), float(step))).sample
        torch.testing.assert_close(image, expected, rtol=5e-3, atol=5e-3)
        assert recorder.asked == list(range(1, asked + 1))
    skipping = Ahead(recorder, draw, count=6)
    skipping.get(0)
    with pytest.raises(RuntimeError, match="expected 1, got 3"):
        skipping.get(3)


def test_the_discriminator_sees_the_latent_and_answers_per_patch() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(latent_channels=8, width=4, downsamplings=3)
    image, latent = torch.randn(2, 3, 32, 32), torch.randn(2, 8, 4, 4)
    logits = net(image, latent)
    assert logits.shape == (2, 1, 4, 4)
    moved = net(image, latent + F.pad(torch.ones(1, 1, 1, 1), (0, 3, 0, 3)))
    changed = (moved - logits).abs()[:, 0] > 1e-6
    assert changed[:, :2, :2].all() and not changed[:, 2:].any() and not changed[:, :, 2:].any()
