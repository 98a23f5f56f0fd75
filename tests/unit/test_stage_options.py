"""The options of the stages on a tiny teacher: each trains, resumes exactly, and does what it is named for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from sdxs.errors import InvalidRequest
from sdxs.lora.adapters import Adapters
from sdxs.lora.files import read
from sdxs.settings import Settings
from tests.models import tiny_recipe, tiny_teacher
from trainer.loop import Stage, load_state, save_state
from trainer.models import lora
from trainer.models.text import TextEncoder
from trainer.pairs import Pairs, PairsOrder, draw_pairs
from trainer.placement import Placement
from trainer.real_images import encode_images, encoded_images
from trainer.recipe import DistillRecipe, StyleRecipe
from trainer.sections import ImagesSection, LoraSection
from trainer.sources import load_frozen
from trainer.specs import TeacherSpec
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import Denoise, InProcessTeacher, Teacher

SHAPE, CAPTIONS = (8, 4, 4), ["a red circle", "blue star", "green square"]
STEPS = 3


@dataclass
class World:
    """A teacher, its pairs, and a student to go on from."""

    folder: Path
    teacher: Teacher
    pairs: Pairs
    inputs: dict[str, Path]
    recipe: dict[str, Any]

    def context(self, placement: Placement | None = None, **sections: dict[str, Any]) -> StageContext:
        """A stage's, with these sections of the recipe changed."""
        data = {**self.recipe, **{name: {**self.recipe.get(name, {}), **change} for name, change in sections.items()}}
        recipe = DistillRecipe.model_validate(data)
        client = InProcessTeacher(self.teacher)
        return StageContext(recipe, self.teacher.folder, client, self.pairs, self.inputs, placement or Placement())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("options")
    teacher = Teacher(tiny_teacher(folder / "teacher"))
    recipe = tiny_recipe(teacher.folder, STEPS)
    sections = DistillRecipe.model_validate(recipe)
    pairs = draw_pairs(InProcessTeacher(teacher), PairsOrder.of(CAPTIONS, sections.pairs, SHAPE, 1), lambda _done: None)
    made = World(folder, teacher, pairs, {}, recipe)
    for name in ("decoder", "unet"):
        stage = STAGES[name](made.context())
        stage.export(folder / name)
        made.inputs[name] = folder / name
    made.inputs["warmup"] = made.inputs["base"] = folder / "unet"
    return made


def steps_of(stage: Stage, indices: range) -> list[dict[str, float]]:
    return [{name: float(torch.as_tensor(v).detach()) for name, v in stage.step(index).items()} for index in indices]


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    return state


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoupled": ("diff_instruct", {"decoupled": {"t_low": 0.1, "t_high": 0.9}, "guidance": 2.0}),
    "sid": ("diff_instruct", {"sid": {"alpha": 1.0}}),
    "latent gan": ("diff_instruct", {"latent_gan": {"weight": 0.1}}),
    "adaptive": ("diff_instruct", {"schedule_shape": "adaptive", "overlap": (1.0, 0.1)}),
    "cosine": ("diff_instruct", {"schedule_shape": "cosine"}),
    "online lora": ("diff_instruct", {"online_lora_rank": 2}),
    "online adamw8bit": ("diff_instruct", {"online_optimizer": "adamw8bit"}),
    "online ratio": ("diff_instruct", {"online_ratio": 2}),
    "diffused input": ("diff_instruct", {"student_input": "diffused"}),
    "diffused warm-up": ("warmup", {"student_input": "diffused"}),
    "accumulation": ("diff_instruct", {"micro_batch": 2}),
    "accumulated distillation": ("unet", {"micro_batch": 1}),
    "finish": ("finish", {"steps": STEPS, "batch": 4, "lr": 1e-2, "feature_weights": (1.0, 0.5, 0.5, 0.5), "lora_rank": 1}),
    "straighten": ("straighten", {
        "steps": STEPS, "batch": 4, "lr": 1e-3, "grid": 10, "samples": {"count": 4, "steps": 2, "guidance": 2.0},
    }),
    "straighten lora": ("straighten", {
        "steps": STEPS, "batch": 4, "lr": 1e-2, "grid": 10, "lora_rank": 2, "samples": {"count": 4, "steps": 2, "guidance": 2.0},
    }),
}  # fmt: skip


@pytest.fixture
def quick() -> Iterator[None]:
    """torchao compiles its optimiser's step, which takes minutes, once a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_trains_and_resumes_exactly(world: World, option: str, tmp_path: Path, quick: None) -> None:
    name, change = OPTIONS[option]
    if "8bit" in option:
        pytest.importorskip("torchao")
    context = world.context(None, **{name: change})
    stage = STAGES[name](context)
    lines = steps_of(stage, range(STEPS))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    stage.export(tmp_path / "whole")
    before = weights(world.teacher.folder if name == "straighten" else world.inputs["unet"])
    after = weights(tmp_path / "whole")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)

    first = STAGES[name](context)
    assert steps_of(first, range(1)) == lines[:1]
    save_state(first, 1, tmp_path / "state.pt")
    resumed = STAGES[name](context)
    assert load_state(resumed, tmp_path / "state.pt") == 1
    assert steps_of(resumed, range(1, STEPS)) == lines[1:]


def test_accumulation_gives_the_first_step_of_the_whole_batch_of_the_same_draws(world: World) -> None:
    """The drawn micro-batches differ from one draw of four, so the comparison is with the mean of their own losses."""
    context = world.context(warmup={"micro_batch": 2})
    stage: Any = STAGES["warmup"](context)
    alone = [float(stage._losses(turn)["loss"].detach()) for turn in stage.deal.turns(0)]
    assert len(alone) == 2
    [line] = steps_of(stage, range(1))
    assert line["loss"] == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_a_diffused_input_is_the_target_at_the_last_timestep(world: World) -> None:
    stage: Any = STAGES["warmup"](world.context(warmup={"student_input": "diffused"}))
    batch = world.context().draw(stage.deal.turn(0), 4)
    alpha, sigma = (float(part[999]) for part in (stage.generate.diffusion.alpha, stage.generate.diffusion.sigma))
    expected = alpha * batch.target_BCHW + sigma * batch.noise_BCHW
    torch.testing.assert_close(stage.generate.start(batch, stage.section), expected)
    assert stage.generate.start(batch, stage.section.model_copy(update={"student_input": "noise"})) is batch.noise_BCHW


def test_adaptive_schedules_never_go_back(world: World) -> None:
    stage = STAGES["diff_instruct"](
        world.context(diff_instruct={"schedule_shape": "adaptive", "overlap": (1.0, 0.1), "steps": 8})
    )
    alphas = [line["alpha"] for line in steps_of(stage, range(8))]
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[1] == alphas[0]  # the online model is still the offline one, which is no overlap


@pytest.mark.parametrize("name", ["warmup", "diff_instruct", "finish"])
def test_stages_look_at_decoded_images(world: World, tmp_path: Path, name: str) -> None:
    """Through the tiny decoder, in bfloat16, by a DINOv2 of four layers; the gradients reach the student."""
    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size, intermediate_size=32)).save_pretrained(tmp_path)
    change = {"encoder": "dinov2", "encoder_source": str(tmp_path), "latent_l2": 0.0}
    if name == "finish":
        change = OPTIONS["finish"][1] | change
    stage = STAGES[name](world.context(Placement(precision="bf16"), **{name: change}))
    line = steps_of(stage, range(1))[0]
    assert 0 < line["feature_matching"] < 2.5 * 2  # weights add up to 2.5, 1 - SSIM is at most 2
    assert line["gradient_norm"] > 0


def test_feature_weights_are_one_for_each_map(world: World) -> None:
    with pytest.raises(InvalidRequest, match=r"feature_weights.*4 numbers"):
        STAGES["warmup"](world.context(None, warmup={"feature_weights": (1.0, 0.5)}))


def test_the_finish_changes_the_student_by_a_matrix_of_its_rank(world: World, tmp_path: Path) -> None:
    name, change = OPTIONS["finish"]
    stage = STAGES[name](world.context(None, **{name: change}))
    steps_of(stage, range(STEPS))
    stage.export(tmp_path)
    before, after = weights(world.inputs["unet"]), weights(tmp_path)
    ranks = set()
    for key, value in before.items():
        change_of = (after[key] - value).flatten(1) if value.dim() > 1 else after[key] - value
        if value.dim() > 1:
            singular = torch.linalg.svdvals(change_of.double())
            ranks.add(int((singular > 1e-5 * singular.max().clamp_min(1e-3)).sum()))
        else:
            assert torch.equal(after[key], value)
    assert ranks == {0, 1}
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_bfloat16_autocast_trains_with_float32_weights_and_x0(world: World) -> None:
    """Slow on a CPU, and close to float32."""
    losses = []
    for precision in ("float32", "bf16"):
        stage = STAGES["warmup"](world.context(Placement(precision=precision)))
        losses.append(steps_of(stage, range(1))[0]["loss"])
        assert {p.dtype for p in stage.trainables["unet"].network.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_embeddings_kept_on_disk_are_found_again_and_change_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that finds them computes none, and goes to the last bit as the run that kept them; float16 moves the loss little."""
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("trainer.models.embeddings.SHARD_S", 0.0)
    in_memory = steps_of(STAGES["warmup"](world.context()), range(STEPS))
    first: Any = STAGES["warmup"](world.context(compute={"embeddings": "disk"}))
    lines = steps_of(first, range(STEPS))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in in_memory], rel=1e-3)
    assert list((tmp_path / "embeddings").rglob("*.safetensors"))
    monkeypatch.setattr(TextEncoder, "compute", None)
    assert steps_of(STAGES["warmup"](world.context(compute={"embeddings": "disk"})), range(STEPS)) == lines
    spec = TeacherSpec(str(world.teacher.folder), embeddings="disk")
    known = CAPTIONS[0]
    torch.testing.assert_close(
        Teacher.load(spec).text.encode([known]).text_BLD, world.teacher.text.encode([known]).text_BLD, rtol=1e-3, atol=1e-3
    )


def test_activation_checkpointing_changes_nothing(world: World) -> None:
    for name in ("unet", "diff_instruct"):
        curves = [
            steps_of(STAGES[name](world.context(Placement(activation_checkpointing=wanted))), range(2))
            for wanted in (False, True)
        ]
        for plain, checkpointed in zip(*curves, strict=True):
            assert checkpointed == pytest.approx(plain, rel=1e-4)


@pytest.fixture(scope="module")
def style(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A style LoRA for the teacher, in the form style LoRAs are published in."""
    unet = UNet2DConditionModel.from_pretrained(world.teacher.folder / "unet")
    lora.attach(unet, 2)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if ".lora_" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    folder = tmp_path_factory.mktemp("style")
    lora.save_adapter(unet.state_dict(), folder, 2)
    return folder


def test_a_style_in_the_offline_model_moves_its_score_as_the_lora_says(world: World, style: Path) -> None:
    request = Denoise(world.pairs.latent_NCHW[:2].float().numpy(), torch.tensor([500, 900]).numpy(), CAPTIONS[:2])
    plain = world.teacher.answer(request)[0]
    styled = Teacher.load(TeacherSpec(str(world.teacher.folder), lora=LoraSection(path=str(style), scale=0.7)))
    assert not any(".lora_" in name for name in styled.unet.state_dict())
    by_hand = load_frozen(UNet2DConditionModel, world.teacher.folder / "unet")
    from safetensors.torch import load_file

    state = load_file(style / "pytorch_lora_weights.safetensors")
    layers = by_hand.state_dict()
    for name, down in state.items():
        layer, found, _ = name.removeprefix("unet.").partition(".lora_A.")
        if found:
            layers[f"{layer}.weight"] += 0.7 * state[name.replace("lora_A", "lora_B")] @ down
    with torch.no_grad():
        text = styled.text.encode(CAPTIONS[:2])
        expected = by_hand(torch.from_numpy(request.noisy_BCHW), torch.from_numpy(request.t_B), **text.arguments()).sample
    answer = styled.answer(request)[0]
    assert abs(answer.astype(float) - plain).max() > 0.01
    torch.testing.assert_close(torch.from_numpy(answer).float(), expected, rtol=5e-3, atol=5e-3)


@pytest.fixture
def style_context(world: World, style: Path) -> Callable[[], StageContext]:
    def make() -> StageContext:
        recipe = StyleRecipe.model_validate(
            {
                "kind": "style", "name": "painted", "world": "scenes", "base": str(world.folder), "teacher": str(world.teacher.folder),
                "style": {"path": str(style)}, "evaluation": {"train_images": 1, "heldout_images": 1},
                "lora": {
                    "steps": STEPS, "batch": 4, "lr": 1e-2, "online_lr": 1e-3, "lambda_fm": (0.0, 0.0), "feature_weights": (), "rank": 2,
                },
            }
        )  # fmt: skip
        spec = TeacherSpec(recipe.teacher, lora=recipe.style)
        prompts = Pairs.of_prompts(CAPTIONS, SHAPE, 0)
        return StageContext(recipe, world.teacher.folder, InProcessTeacher(Teacher.load(spec)), prompts, world.inputs)

    return make


def test_a_learnt_style_is_a_lora_that_diffusers_loads_on_the_base(
    world: World, style_context: Callable[[], StageContext], tmp_path: Path
) -> None:
    stage = STAGES["style"](style_context())
    lines = steps_of(stage, range(STEPS))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert "feature_matching" not in lines[0]
    stage.export(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(
        world.teacher.folder, unet=load_frozen(UNet2DConditionModel, world.inputs["base"] / "unet")
    )
    x, t, text = torch.randn(1, *SHAPE), torch.tensor([999]), torch.randn(1, 16, 32)
    with torch.no_grad():
        base = pipeline.unet(x, t, text).sample
        pipeline.load_lora_weights(tmp_path / "lora")
        loaded = pipeline.unet(x, t, text).sample
        folded = load_frozen(UNet2DConditionModel, tmp_path / "unet")(x, t, text).sample
    assert (loaded - base).abs().max() > 1e-4
    torch.testing.assert_close(loaded, folded, rtol=1e-4, atol=1e-5)
    served = Adapters({"unet": load_frozen(UNet2DConditionModel, world.inputs["base"] / "unet")})
    served.put(served.attached("style", served.fit(read(tmp_path / "lora"), "lora", "style")))
    with torch.no_grad(), served.use([("style", 1.0)]):
        torch.testing.assert_close(served.networks["unet"](x, t, text).sample, folded, rtol=1e-4, atol=1e-5)


def test_the_online_model_of_a_style_starts_without_it(world: World, style_context: Callable[[], StageContext]) -> None:
    stage = STAGES["style"](style_context())
    online = stage.trainables["online"].network.state_dict()
    for name, value in weights(world.teacher.folder).items():
        assert torch.equal(value, online[name])


def test_distillation_on_real_images_diffuses_their_latents(world: World, tmp_path: Path) -> None:
    """Four images of one colour each, encoded through the client, then read from the cache alone."""
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (90, 90, 90)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 32), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    settings = Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")
    section, teacher = ImagesSection(images=str(tmp_path), size=32), str(world.teacher.folder)
    assert encode_images(section, teacher, InProcessTeacher(world.teacher), settings, lambda _done: None) == 4
    images = encoded_images(section, teacher, settings)
    for latent_CHW, caption in zip(images.take(range(4)), images.captions, strict=True):
        pixels = torch.tensor(colours[caption]).float().div(127.5).sub(1).view(1, 3, 1, 1).expand(1, 3, 32, 32)
        with torch.no_grad():
            expected = world.teacher.vae.encode(pixels).latent_dist.mean * world.teacher.vae.config.scaling_factor
        torch.testing.assert_close(latent_CHW.float()[None], expected, rtol=5e-3, atol=5e-3)
    stage: Any = STAGES["unet"](replace(world.context(), images=images))
    lines = steps_of(stage, range(STEPS))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    asked, _ = stage._draw(0)
    assert set(asked.captions) <= {*colours, ""}
