"""Triplets: the teacher's image of every pair, decoded once, and control images drawn from it anew at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sdxs import control
from sdxs.store import FileStore
from tests.controls import IMAGES, ControlWorld, control_world
from trainer import triplets
from trainer.artifacts import Artifacts
from trainer.conditions import condition_maps
from trainer.placement import Deal
from trainer.stages.context import StageContext
from trainer.strokes import hand_drawn
from trainer.teacher import Decode, InProcessTeacher, NobodyToAsk, Request, Teacher
from trainer.triplets import BentMaps, SampleImages, draw_images, file_of, pixels
from trainer.worlds.base import get_world

PICTURES, _ = get_world("scenes").training_images(6, np.random.default_rng(0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ControlWorld:
    return control_world(tmp_path_factory.mktemp("triplets"))


def test_an_image_is_the_teachers_decode_of_its_pair(world: ControlWorld) -> None:
    vae = AutoencoderKL.from_pretrained(world.teacher / "vae")
    with torch.no_grad():
        expected = vae.decode(world.pairs.latent_NCHW[torch.arange(16)].float()).sample.clamp(-1, 1)
    levels = (expected.permute(0, 2, 3, 1).numpy() + 1) / 2 * 255
    found = world.images.take(torch.arange(len(world.images)))
    assert (found.shape, found.dtype) == ((16, 32, 32, 3), np.uint8)
    assert np.abs(found - levels).max() < 1  # rounding, and float16 on the way
    rows = torch.tensor([7, 0, 15, 7])
    np.testing.assert_array_equal(world.images.take(rows), found[rows])


def test_png_keeps_every_pixel_and_jpeg_nearly(world: ControlWorld) -> None:
    for kind, error in (("png", 0.0), ("jpeg", 6.0)):
        files = [file_of(image, kind) for image in PICTURES]
        ends = torch.tensor(np.cumsum([len(file) for file in files]))
        kept = SampleImages([(torch.from_numpy(np.concatenate(files)), ends)])
        found = kept.take(torch.arange(len(PICTURES)))
        assert np.abs(found.astype(float) - PICTURES).mean() <= error


def test_pixels_are_rounded_and_cut_to_bytes() -> None:
    image_BCHW = np.array([-2.0, -1.0, -0.999, 0.0, 1.0, 3.0], np.float16).reshape(1, 1, 2, 3)
    np.testing.assert_array_equal(pixels(image_BCHW)[0, :, :, 0], [[0, 0, 0], [128, 255, 255]])


class Failing(InProcessTeacher):
    """Gives up after some requests; notes how many images it was asked for."""

    def __init__(self, teacher: Teacher, requests: int) -> None:
        super().__init__(teacher)
        self.left, self.asked = requests, 0

    def submit(self, request: Request) -> Any:
        assert isinstance(request, Decode)
        if not self.left:
            raise ConnectionError("gone")
        self.left -= 1
        self.asked += len(request.latent_BCHW)
        return super().submit(request)


def test_shards_that_an_interrupted_run_left_are_kept(
    world: ControlWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triplets, "SHARD", 6)
    monkeypatch.setattr(triplets, "BATCH", 4)
    artifacts, told = Artifacts(FileStore(tmp_path / "store"), tmp_path / "cache"), list[int]()
    teacher = Teacher(world.teacher)
    with pytest.raises(ConnectionError):
        draw_images(Failing(teacher, 3), world.pairs, "png", artifacts, IMAGES, told.append)
    assert artifacts.facts(*IMAGES) is None and told == [4, 6]
    second = Failing(teacher, 99)
    draw_images(second, world.pairs, "png", artifacts, IMAGES, told.append)
    assert second.asked == 16 - 6
    assert told[2:] == [10, 12, 16]
    found = SampleImages.load(artifacts.fetch(*IMAGES))
    rows = torch.arange(16)
    np.testing.assert_array_equal(found.take(rows), world.images.take(rows))


def maps(context: StageContext, index: int, micro: int = 0, rank: int = 0, workers: int = 1) -> np.ndarray:
    """Control images of a step's micro-batch, on one of some workers."""
    deal = Deal(4, 2, rank, workers)
    [turn] = [turn for turn in deal.turns(index) if turn.micro == micro]
    found = context.draw(turn, 4).control_BHWC
    assert found is not None
    return found


def test_control_images_follow_from_seed_and_step_alone(world: ControlWorld) -> None:
    context = world.context(NobodyToAsk())
    first = maps(context, 3)
    assert (first.shape, first.dtype) == ((4, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(first, maps(world.context(NobodyToAsk()), 3))
    np.testing.assert_array_equal(maps(context, 3, micro=1), maps(context, 3, micro=1, rank=1, workers=2))
    seeded = world.recipe().model_copy(update={"seed": 1})
    for other in (maps(context, 4), maps(context, 3, micro=1), maps(world.context(NobodyToAsk(), recipe=seeded), 3)):
        assert not np.array_equal(first, other)


def test_each_image_gets_one_of_the_conditions_all_equally_often() -> None:
    images = np.repeat(PICTURES[:1], 300, axis=0)
    found = condition_maps(images, ("edge", "colour"), torch.Generator().manual_seed(0))
    edge, colour = (control.extract(images[0], kind, 32) for kind in ("edge", "colour"))
    edges, colours = ((found == one).all((1, 2, 3)).sum() for one in (edge, colour))
    assert edges + colours == 300
    assert 120 < edges < 180


def test_a_sketch_is_another_one_each_time_near_the_edges() -> None:
    image = PICTURES[0].repeat(4, 0).repeat(4, 1)
    first, again, other = (hand_drawn(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.shape, first.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    edge = control.extract(image, "edge", 128)[..., 0] > 0
    rows, columns = np.nonzero(edge)
    for sketch in (first, other):
        lines = np.argwhere(sketch[..., 0] > 127)
        assert len(lines)
        nearest = np.sqrt(((lines[:, None] - np.stack([rows, columns], 1)[None]) ** 2).sum(-1)).min(1)
        assert np.median(nearest) < 6  # a shaky hand: three pixels at 64


def test_a_bent_map_follows_from_caption_and_seed_alone(world: ControlWorld) -> None:
    bent = BentMaps(world.images, ("edge", "colour"), 1.0)
    first = bent(5, 1 << 32)
    assert (first.shape, first.dtype) == ((32, 32, 3), np.uint8)
    np.testing.assert_array_equal(first, BentMaps(world.images, ("edge", "colour"), 1.0)(5, 1 << 32))
    for number, seed in ((5, 2 << 32), (6, 1 << 32)):
        assert not np.array_equal(first, bent(number, seed))


def test_bent_maps_are_of_every_condition_and_without_a_bend_of_the_sample_itself(world: ControlWorld) -> None:
    straight = [BentMaps(world.images, ("edge", "colour"), 0.0)(5, seed) for seed in range(60)]
    [image] = world.images.take(torch.tensor([5]))
    views = [view for side in (image, image[:, ::-1]) for view in (control.extract(side, k, 32) for k in ("edge", "colour"))]
    counts = [sum(np.array_equal(found, view) for found in straight) for view in views]
    assert sum(counts) == 60 and min(counts) > 5  # a bend mirrors half of the images even then


def test_nothing_is_sketched_of_an_empty_image() -> None:
    assert not hand_drawn(np.full((64, 64, 3), 200, np.uint8), np.random.default_rng(0)).any()
