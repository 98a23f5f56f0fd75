"""Costs of the stages of ControlNets, against the stages themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxs.store import FileStore
from tests.controls import IMAGES, tiny_controlnet
from tests.unit.test_cost import BATCH, CAPTIONS, ONLINE, SEVERAL, SIZE, STEPS, WEIGHTS, Lazy
from trainer.artifacts import Artifacts
from trainer.cluster import Cluster
from trainer.models.families import set_image_size, write_teacher
from trainer.models.text import TextEncoder
from trainer.pairs import Pairs, PairsOrder, draw_pairs
from trainer.placement import Placement
from trainer.preflight.cost import costs
from trainer.preflight.networks import Networks
from trainer.preflight.shapes import read_shapes, teacher_shapes
from trainer.preflight.trace import CPU_ATTENTION
from trainer.recipe import ControlNetRecipe, ControlRecipe
from trainer.sections import PairsSection
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import Decode, InProcessTeacher, Sample, Teacher, compact
from trainer.triplets import SampleImages, draw_images

PIXELS = 128


@dataclass
class World:
    folder: Path
    teacher: Teacher
    pairs: Pairs
    images: SampleImages
    inputs: dict[str, Path]
    traced: Networks | None = None

    def networks(self, made: ControlRecipe | ControlNetRecipe) -> Networks:
        """Traced once: the cases' recipes have the same."""
        if isinstance(made, ControlNetRecipe):
            return Networks(made, read_shapes("x", self.teacher.folder))
        if self.traced is None:
            self.traced = Networks(made, read_shapes("x", self.teacher.folder))
        self.traced.recipe = made
        return self.traced

    def recipe(self, **sections: Any) -> ControlRecipe:
        data: dict[str, Any] = {
            "kind": "control", "name": "mine", "world": "scenes", "base": "mine", "teacher": str(self.teacher.folder),
            "controlnet": str(self.folder / "controlnet"), "conditions": ["edge"], "pairs": {"count": 8, "steps": 2}, "unet": dict(SIZE),
            "shrink": dict(SIZE), "warmup": SIZE | WEIGHTS, "diff_instruct": dict(ONLINE),
            "evaluation": {"train_images": 2, "heldout_images": 2},
        }  # fmt: skip
        return ControlRecipe.model_validate(
            data | {name: {**data.get(name, {}), **change} for name, change in sections.items()}
        )

    def own(self) -> ControlNetRecipe:
        """That of the teacher's ControlNet."""
        return ControlNetRecipe.model_validate(
            {
                "kind": "controlnet", "name": "mine", "world": "scenes", "teacher": str(self.teacher.folder), "conditions": ["edge"],
                "controlnet": SIZE | {"views": 4},
            }
        )  # fmt: skip

    def context(self, made: ControlRecipe | ControlNetRecipe, client: Lazy) -> StageContext:
        images = self.images if isinstance(made, ControlRecipe) else None
        placement = Placement.of(made.compute)
        return StageContext(made, self.teacher.folder, client, self.pairs, self.inputs, placement, sample_images=images)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("cost")
    set_image_size(write_teacher("sd21", folder / "teacher"), PIXELS)
    tiny_controlnet(folder / "teacher" / "unet", folder / "controlnet")
    teacher = Teacher(folder / "teacher")
    client = InProcessTeacher(teacher)
    pairs = draw_pairs(client, PairsOrder.of(CAPTIONS, PairsSection(count=8, steps=2), (4, 16, 16), 1), lambda _: None)
    artifacts = Artifacts(FileStore(folder / "store"), folder / "cache")
    draw_images(client, pairs, "png", artifacts, IMAGES, lambda _: None)
    teacher.attach(folder / "controlnet")
    world = World(folder, teacher, pairs, SampleImages.load(artifacts.fetch(*IMAGES)), {})
    made = world.recipe()
    for name in ("unet", "control_shrink"):
        STAGES[name](world.context(made, Lazy(teacher))).export(folder / name)
        world.inputs[name] = folder / name
    world.inputs["base"] = folder / "unet"
    return world


CASES: list[tuple[str, dict[str, Any]]] = [
    ("control_shrink", {"shrink": SEVERAL}),
    ("control_diff_instruct", {"diff_instruct": {"guidance": 2.0}}),
]
RARE: list[tuple[str, dict[str, Any]]] = [
    ("control_shrink", {"compute": {"activation_checkpointing": True}}),
    ("control_warmup", {}),
    ("control_warmup", {"compute": {"activation_checkpointing": True}}),
    ("controlnet", {}),
    ("control_diff_instruct", {"diff_instruct": SEVERAL | {"lambda_fm": (0.0, 0.0), "online_ratio": 2}}),
    ("control_diff_instruct", {"diff_instruct": {"decoupled": {}}}),
    ("control_diff_instruct", {"diff_instruct": {"sid": {}}}),
]


@pytest.mark.parametrize(
    ("name", "sections"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARE)],
)
def test_flops_and_bytes_are_those_of_the_stage_itself(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, sections: dict[str, Any]
) -> None:
    """Counted while the stage runs, text encoders aside."""
    world.teacher.text.encode([*CAPTIONS, ""])
    monkeypatch.setattr(StageContext, "text_encoder", lambda _: world.teacher.text)
    monkeypatch.setattr(TextEncoder, "__init__", lambda _, *__: None)
    monkeypatch.setattr("trainer.stages.diff_instruct.Teacher.load", lambda *_: world.teacher)
    monkeypatch.setattr("trainer.worlds.scenes.SIZE", PIXELS)
    made: Any = world.own() if name == "controlnet" else world.recipe(**sections)
    client = Lazy(world.teacher)
    stage = STAGES[name](world.context(made, client))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        for index in range(STEPS):
            stage.step(index)
    cost = next(c for c in costs(made, Cluster(), world.networks(made)) if c.name == name)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    sent, received = (sum(sizes) for sizes in zip(*client.sizes, strict=True)) if client.sizes else (0, 0)
    assert (STEPS * BATCH * cost.sent, STEPS * BATCH * cost.received) == (sent, received)


def test_controlled_samples_cost_unet_and_controlnet_in_both_guided_halves_of_every_step(world: World) -> None:
    made = world.recipe(controlled={"count": 4, "steps": 2, "guidance": 2.0})
    found = {cost.name: cost for cost in costs(made, Cluster(), world.networks(made))}
    noise, maps = np.zeros((4, 4, 16, 16), np.float32), np.zeros((4, PIXELS, PIXELS, 3), np.uint8)
    asked = Sample(noise, CAPTIONS[:1] * 4, 2, 2.0, "ddim", maps)
    world.teacher.text.encode([*CAPTIONS, ""])
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        [reply] = world.teacher.answer(asked)
    drawn, free = found["controlled"], found["pairs"]
    assert drawn.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (4 * drawn.sent, 4 * drawn.received) == (noise.nbytes + maps.nbytes, reply.nbytes)
    assert drawn.memory.teacher - free.memory.teacher == 4 * world.networks(made).controlnet.parameters
    assert (found["images"].batch, found["controlled_images"].batch) == (8, 4)


def test_images_cost_the_teachers_decoder_once_a_pair(world: World) -> None:
    cost = next(c for c in costs(world.recipe(), Cluster(), world.networks(world.recipe())) if c.name == "images")
    asked = compact(world.pairs.latent_NCHW[torch.arange(8)])
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        [reply] = world.teacher.answer(Decode(asked))
    assert cost.flops == counter.get_total_flops()
    assert (cost.batch, cost.batch * cost.sent, cost.batch * cost.received) == (8, asked.nbytes, reply.nbytes)
    assert cost.stored == 8 * 3 * PIXELS**2  # of PNG at most
    jpeg = world.recipe(images={"format": "jpeg"})
    assert next(c for c in costs(jpeg, Cluster(), world.networks(jpeg)) if c.name == "images").stored == cost.stored // 10


def test_memory_of_a_stage_with_a_controlnet_by_its_parts(world: World) -> None:
    """The U-Net is there and does not learn; the teacher's ControlNet is in the teacher, and beside the online model."""
    made = world.recipe(shrink={"ema": 0.9})
    nets = world.networks(made)
    found = {cost.name: cost.memory for cost in costs(made, Cluster(teachers=0), nets)}
    learns = nets.controlled.learns
    shrink = found["control_shrink"]
    assert shrink.weights == 4 * (nets.student.parameters + learns)
    assert (shrink.gradients, shrink.moments, shrink.average) == (4 * learns, 8 * learns, 4 * learns)
    assert shrink.teacher - found["unet"].teacher == 4 * nets.controlnet.parameters
    assert found["control_warmup"].teacher == 0
    scores = found["control_diff_instruct"]
    assert scores.frozen - found["control_warmup"].frozen == 4 * nets.controlnet.parameters
    assert scores.moments == 8 * (learns + nets.offline.parameters)


@pytest.mark.slow
def test_the_published_sizes(world: World) -> None:
    """88.86M for an SDXS-512 without a mid stage, 364M for SD 2.1's own; maps of 512 pixels are 768 KiB an image on the way."""
    shapes = teacher_shapes("x/stable-diffusion-2-1-base")
    nets = Networks(world.recipe().model_copy(update={"controlnet": "thibaud/controlnet-sd21-canny-diffusers"}), shapes)
    assert nets.controlled.learns == 88_856_720
    assert round(nets.controlnet.parameters / 1e6) == 364
    assert nets.image_elements == 768 * 1024


def test_activations_of_a_frozen_unet_are_those_of_its_up_half(world: World) -> None:
    """What autograd keeps of the real pass, counted by hooks on real tensors."""
    nets = world.networks(world.recipe())
    stage: Any = STAGES["control_warmup"](world.context(world.recipe(), Lazy(world.teacher)))
    kept: dict[int, Any] = {}
    weights = {p.untyped_storage().data_ptr() for p in stage.student.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return value

    batch = world.context(world.recipe(), Lazy(world.teacher)).draw(stage.deal.turn(0), BATCH)
    stage.generate.predict.text.encode(batch.captions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = stage.generate.predict(batch.noise_BCHW, torch.full((BATCH,), 999), batch.captions, batch.control_BHWC)
    assert output.requires_grad
    measured = sum(storage.nbytes() for storage in kept.values())
    assert nets.controlled.trace.saved(BATCH, False) == pytest.approx(measured, rel=0.05)
    assert nets.controlled.trace.saved(BATCH, True) < nets.controlled.trace.saved(BATCH, False)
