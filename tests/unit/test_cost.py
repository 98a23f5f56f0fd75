"""Costs against independent counts: by hand, by running the stages themselves, and by what the allocator saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.cluster import Cluster
from trainer.models.families import write_teacher
from trainer.models.students import student_config
from trainer.models.text import TextEncoder
from trainer.pairs import Pairs, PairsOrder, draw_pairs
from trainer.placement import Placement
from trainer.plan import steps
from trainer.preflight.cost import StageCost, StageCosts, costs
from trainer.preflight.cost_table import PEAK, UTILISATION, count, device_hours, pool_rate, size
from trainer.preflight.networks import Networks, unet_call
from trainer.preflight.shapes import TeacherShapes, read_shapes, teacher_shapes, weightless
from trainer.preflight.trace import CPU_ATTENTION, trace
from trainer.recipe import DistillRecipe
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Pending, Request, Teacher

BATCH, STEPS = 4, 2
SIZE = {"steps": STEPS, "batch": BATCH, "lr": 1e-4}
WEIGHTS = {"feature_weights": (1.0, 0.5, 0.5, 0.5, 0.5)}
DECODER = {
    "latent_channels": 4, "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4,
}  # fmt: skip
CAPTIONS = ["a red circle", "blue star", "green square"]


def test_flops_of_a_small_network_are_those_on_paper() -> None:
    with weightless():
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
        found = trace(network, lambda net, images: net(torch.zeros(images, 3, 16, 16)))
    assert found.flops == 2 * 16 * 16 * (8 * 3 * 9 + 4 * 8)  # 2 per multiply-add
    assert found.parameters == 8 * 3 * 9 + 8 + 4 * 8 + 4
    assert (found.fixed, found.each) == (0, 4 * 16 * 16 * (3 + 8))  # the inputs of both convolutions, float32


def test_attention_counts_though_it_is_fused() -> None:
    with weightless():
        layer = nn.MultiheadAttention(16, 2, batch_first=True)
        found = trace(layer, lambda net, n: net(*[torch.zeros(n, 10, 16, requires_grad=True)] * 3, need_weights=False))
    assert found.flops == 2 * 10 * 16 * 16 * 4 + 2 * 2 * 10 * 10 * 16  # four projections; q k and (q k) v


@pytest.mark.parametrize(
    ("source", "student", "teacher"),
    [("stabilityai/stable-diffusion-2-1-base", 318_695_364, 865_910_724)],
)
def test_the_published_models_cost_what_is_known_of_them(source: str, student: int, teacher: int) -> None:
    """Parameters, and 804, 370 and 2,515 GFLOP of teacher, student and decoder at 512x512."""
    shapes = teacher_shapes(source)
    nets = Networks(recipe(Path(source)), shapes)
    assert (nets.student.parameters, nets.teacher.parameters) == (student, teacher)
    assert (round(nets.teacher.flops / 1e9), round(nets.student.flops / 1e9)) == (804, 370)
    assert round(nets.kl_decoder.flops / 1e9) == 2515


def recipe(teacher: Path, **sections: Any) -> DistillRecipe:
    data: dict[str, Any] = {
        "kind": "distill", "name": "mine", "world": "scenes", "teacher": str(teacher), "pairs": {"count": 8, "steps": 2},
        "decoder": {**SIZE, "config": DECODER, "discriminator_width": 8}, "unet": dict(SIZE), "warmup": SIZE | WEIGHTS,
        "evaluation": {"train_images": 2, "heldout_images": 2},
    }  # fmt: skip
    return DistillRecipe.model_validate(data | {name: {**data.get(name, {}), **change} for name, change in sections.items()})


@dataclass
class Lazy:
    """Answers when the reply is wanted: as many answers as are used."""

    teacher: Teacher
    asked: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)  # bytes there and back

    def submit(self, request: Request) -> Pending:
        client, self.asked = self, self.asked + 1

        class Reply:
            def result(self) -> list[Any]:
                found = client.teacher.answer(request)
                sent = [getattr(request, name, None) for name in ("noisy_BCHW", "latent_BCHW", "control_BHWC")]
                client.sizes.append((sum(part.nbytes for part in sent if part is not None), sum(part.nbytes for part in found)))
                return found

        return Reply()


@dataclass
class World:
    folder: Path
    teacher: Teacher
    shapes: TeacherShapes
    pairs: Pairs
    inputs: dict[str, Path]
    networks: Networks  # traced once: the cases' recipes have the same

    def context(self, made: DistillRecipe, client: Lazy) -> StageContext:
        return StageContext(made, self.folder, client, self.pairs, self.inputs, Placement.of(made.compute))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("cost")
    write_teacher("sd21", folder / "teacher")
    config = folder / "teacher" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    teacher = Teacher(folder / "teacher")
    made = recipe(folder / "teacher")
    pairs = draw_pairs(InProcessTeacher(teacher), PairsOrder.of(CAPTIONS, made.pairs, (4, 16, 16), 1), lambda _: None)
    shapes = read_shapes("x", folder / "teacher")
    world = World(folder / "teacher", teacher, shapes, pairs, {}, Networks(made, shapes))
    for name in ("decoder", "unet"):
        stage = STAGES[name](world.context(made, Lazy(teacher)))
        stage.export(folder / name)
        world.inputs[name] = folder / name
    world.inputs["warmup"] = folder / "unet"
    return world


ONLINE = SIZE | WEIGHTS | {"online_lr": 1e-4}
SEVERAL = {"micro_batch": 2}
SEVERAL_UNET = {"unet": SEVERAL}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {"decoder": {"encoder_weight": 0.1}}),
    ("unet", SEVERAL_UNET),
    ("unet", {"compute": {"activation_checkpointing": True}}),
    ("warmup", {}),
    ("straighten", {"straighten": SIZE | {"samples": {"count": 4}}}),
    ("diff_instruct", {"diff_instruct": ONLINE | SEVERAL | {"online_ratio": 3, "guidance": 1.0}}),
    ("finish", {"finish": SIZE | WEIGHTS | {"discriminator_width": 1}}),
]
RARE: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {"decoder": {"gan_weight": 0.0}}),
    ("straighten", {"straighten": SIZE | {"samples": {"count": 4}, "guidance": 1.0, "lora_rank": 1}}),
    ("diff_instruct", {"diff_instruct": ONLINE}),
    ("diff_instruct", {"diff_instruct": ONLINE | {"lambda_fm": (0.0, 0.0), "latent_gan": {}}}),
    ("diff_instruct", {"diff_instruct": ONLINE | {"decoupled": {}, "online_lora_rank": 1}}),
    ("diff_instruct", {"diff_instruct": ONLINE | {"sid": {}}}),
]


@pytest.mark.parametrize(
    ("name", "sections"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARE)],
    ids=[f"{case[0]}{i}" for i, case in enumerate([*CASES, *RARE])],
)
def test_flops_and_bytes_are_those_of_the_stage_itself(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, sections: dict[str, Any]
) -> None:
    """Counted while the stage runs, text encoders aside. 5%: the first layers need no gradients of their inputs."""
    world.teacher.text.encode([*CAPTIONS, ""])
    monkeypatch.setattr(StageContext, "text_encoder", lambda _: world.teacher.text)
    monkeypatch.setattr(TextEncoder, "__init__", lambda _, *__: None)
    made, client = recipe(world.folder, **sections), Lazy(world.teacher)
    monkeypatch.setattr("trainer.stages.diff_instruct.Teacher.load", lambda *_: world.teacher)
    world.networks.recipe = made
    stage = STAGES[name](world.context(made, client))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        for index in range(STEPS):
            stage.step(index)
    cost = next(c for c in costs(made, Cluster(), world.networks) if c.name == name)
    tolerance = (
        0.12 if "latent_gan" in sections.get(name, {}) else 0.05
    )  # its gradient ends at the deepest block, not counted so
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=tolerance)
    sent, received = (sum(sizes) for sizes in zip(*client.sizes, strict=True)) if client.sizes else (0, 0)
    assert (STEPS * BATCH * cost.sent, STEPS * BATCH * cost.received) == (sent, received)


def test_drawing_with_a_teacher_that_is_told_of_the_guidance_costs_one_forward_a_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(world.folder, pairs={"steps": 4, "guidance": 8.0, "solver": "lcm"})
    assert steps(made)[0].name == "pairs"
    drawn = StageCosts(made, Cluster(), world.networks)
    assert drawn.of(steps(made)[0]).teacher_forwards == 8
    lcm = {**world.shapes.unet, "time_cond_proj_dim": 256}
    monkeypatch.setattr(world.networks, "shapes", replace(world.shapes, unet=lcm))
    assert drawn.of(steps(made)[0]).teacher_forwards == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_the_allocator_saw(tmp_path: Path, checkpointing: bool) -> None:
    """A student of SD 2.1's classes with 64 to 192 channels on 32x32 latents, a real training pass. Tolerance 20%: kernels' own
    workspace and the gradients on their way are not estimated."""
    config = student_config(teacher_shapes("x/stable-diffusion-2-1-base").unet) | {
        "block_out_channels": (64, 128, 192), "cross_attention_dim": 64, "attention_head_dim": (1, 2, 3), "sample_size": 32,
    }  # fmt: skip
    texts = ({"max_position_embeddings": 77},)
    shapes = TeacherShapes("x", config, {}, {}, texts)
    call, images = unet_call(shapes), 4
    with weightless():
        estimated = trace(UNet2DConditionModel.from_config(config), call).saved(images, checkpointing)
    network = UNet2DConditionModel.from_config(config)
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    call(network, images).sum().backward()  # gradients are there before, as in any step but the first
    measured = peak(lambda: call(network, images).sum().backward(), tmp_path / "trace.json")
    assert estimated == pytest.approx(measured, rel=0.2)


def peak(work: Callable[[], Any], path: Path) -> int:
    """Highest number of bytes above those at the beginning, by the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    level = highest = 0
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest


def test_memory_and_hours_follow_from_the_parts(world: World) -> None:
    made = recipe(world.folder, unet={"ema": 0.9})
    nets = Networks(made, world.shapes)
    unet = {cost.name: cost for cost in costs(made, Cluster(), nets)}["unet"]
    parameters = nets.student.parameters
    memory = unet.memory
    assert (memory.weights, memory.gradients, memory.moments, memory.average) == tuple(n * parameters for n in (4, 4, 8, 4))
    assert memory.teacher == 0
    assert memory.activations == nets.student.saved(BATCH, False) > memory.checkpointed
    sharded = recipe(world.folder, compute={"parallel": "fsdp"})
    four = {cost.name: cost for cost in costs(sharded, Cluster(workers=4, teachers=0), nets.__class__(sharded, world.shapes))}[
        "unet"
    ]
    assert (four.micro, four.memory.weights, four.memory.moments) == (1, parameters, 2 * parameters)
    assert four.memory.teacher > 4 * nets.teacher.parameters  # with text encoder and decoder
    flops = [StageCost("x", 10, 100, 1, memory, worker_flops=3e12, teacher_flops=1e12)]
    seconds = 10 * 100 * 4e12 / (PEAK["float32"] * UTILISATION)
    assert device_hours(flops, made.compute) == pytest.approx(seconds / 3600)
    rate = StageCost("x", 10, 100, 1, memory, worker_flops=PEAK["float32"] * UTILISATION / 50, sent=10, received=30)
    assert pool_rate(rate, made.compute, 2) == pytest.approx(2 * 50 * 40)  # 50 images a second on each of two workers


def test_numbers_for_people() -> None:
    assert (count(0), count(12e12), count(3.25e15), count(7)) == ("", "12.0 T", "3.2 P", "7.0")
    assert (size(0), size(100), size(1536), size(3 * 2**30)) == ("", "100 B", "1.5 KiB", "3.0 GiB")
