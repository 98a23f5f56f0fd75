"""What a large pool draws: as many requests under way as keep it busy, and nothing twice."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxs.settings import Settings
from tests.pool_fakes import Array, Crowd
from trainer import pairs as module
from trainer import triplets
from trainer.artifacts import Artifacts, open_artifacts
from trainer.pairs import Pairs, PairsOrder, draw_pairs, draw_shards
from trainer.pool.client import Limits, PoolClient
from trainer.real_images import encode_images, encoded_images
from trainer.sections import ImagesSection, PairsSection
from trainer.teacher import Decode, Encode, Sample
from trainer.triplets import SampleImages, draw_images

MEMBERS, SHAPE = 16, (2, 4, 4)


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")


def halved(request: Sample) -> list[Array]:
    return [(request.noise_BCHW / 2).astype(np.float16)]


def order(count: int) -> PairsOrder:
    return PairsOrder.of(["red", "blue", "green"], PairsSection(count=count), SHAPE, 1)


def untold(_: int) -> None:
    """Nobody watches."""


@pytest.mark.parametrize(("members", "most"), [(16, 32), (1, 6), (0, 6)])
def test_pairs_are_asked_for_two_ahead_of_every_member(members: int, most: int) -> None:
    crowd = Crowd(members, halved)
    pairs = draw_pairs(crowd, order(40 * module.BATCH), untold)
    assert (crowd.most, crowd.waiting, len(crowd.asked)) == (most, 0, 40)
    noise, latent, _ = pairs.take(torch.tensor([0, 700, 1279]))
    torch.testing.assert_close(latent, (noise / 2).half().float())


def test_images_of_pairs_are_asked_for_two_ahead_of_every_member(local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def grey(request: Decode) -> list[Array]:
        """As bright as the latent's first number says."""
        return [np.broadcast_to(request.latent_BCHW[:, :1, :1, :1], (len(request.latent_BCHW), 3, 8, 8))]

    monkeypatch.setattr(triplets, "BATCH", 2)
    brightness = torch.linspace(-1, 1, 80).half()
    pairs = Pairs(brightness.view(-1, 1, 1, 1).expand(80, *SHAPE), torch.arange(80), ["x"] * 80)
    crowd, artifacts = Crowd(MEMBERS, grey), open_artifacts(local)
    draw_images(crowd, pairs, "png", artifacts, ("images", "abc"), untold)
    assert (crowd.most, crowd.waiting) == (2 * MEMBERS, 0)
    found = SampleImages.load(artifacts.fetch("images", "abc")).take(torch.arange(80))
    np.testing.assert_allclose(found[:, 0, 0, 0], (brightness.float().numpy() + 1) * 127.5, atol=0.51)


def photos(folder: Path, count: int) -> Path:
    """Grey ones, each twice under two captions."""
    folder.mkdir()
    for i in range(count):
        for name in ("a", "b"):
            Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i:04}{name}.png")
            (folder / f"{i:04}{name}.txt").write_text(f"{name} {i}")
    return folder


def test_real_images_are_asked_for_two_ahead_of_every_member_and_each_once(
    local: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.real_images.source_digest", lambda _: "teacher")
    monkeypatch.setattr("trainer.real_images.BATCH", 3)
    crowd = Crowd(MEMBERS, lambda request: [request.image_BHWC[:, :1, :1, 0].astype(np.float16)])
    section, done = ImagesSection(images=str(photos(tmp_path / "photos", 120)), size=8), list[int]()
    assert encode_images(section, "teacher", crowd, local, done.append) == 240
    assert (crowd.most, crowd.waiting) == (2 * MEMBERS, 0)
    assert sum(len(request.image_BHWC) for request in crowd.asked) == 120 == done[-1]
    assert all(isinstance(request, Encode) for request in crowd.asked)
    images = encoded_images(section, "teacher", local)
    values = [(caption, float(images.take([i]))) for i, caption in enumerate(images.captions)]
    assert values == [(f"{name} {i}", float(i)) for i in range(120) for name in ("a", "b")]


class Deaf:
    """A member of a pool that takes requests and never answers."""

    def __init__(self) -> None:
        self.answer = self

    def options(self, **_: Any) -> Deaf:
        return self

    def remote(self, *_: Any) -> Deaf:
        return self

    def future(self) -> Future[Any]:
        return Future()


def test_a_client_that_asks_a_pool_alone_may_keep_all_of_it_busy() -> None:
    worker = PoolClient([Deaf() for _ in range(MEMBERS)], Limits())
    alone, request = worker.whole(), Encode(np.zeros((1, 2, 2, 3), np.uint8))
    for _ in range(2 * MEMBERS):
        alone.submit(request)
    assert alone.outstanding == [2] * MEMBERS
    assert not alone._places.acquire(blocking=False)  # the next one waits
    assert (worker.limits.max_in_flight, worker.outstanding) == (8, [0] * MEMBERS)
    assert PoolClient([Deaf()], Limits()).whole().limits == Limits()


class GoneError(Exception):
    """Stands for the end of the process."""


def files(artifacts: Artifacts, digest: str) -> dict[str, bytes]:
    folder = artifacts.fetch("pairs", digest)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("answers", [0, 5, 9])
def test_an_interrupted_drawing_asks_only_for_the_shards_that_are_missing(
    local: Settings, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """Four shards of four requests; the first run ends after so many answers. To the last bit as without it."""
    monkeypatch.setattr(module, "SHARD", 4 * module.BATCH)
    wanted, artifacts = order(14 * module.BATCH), open_artifacts(local)
    draw_shards(Crowd(1, halved), wanted, artifacts, ("pairs", "unbroken"), untold)

    def then_gone(request: Sample) -> list[Array]:
        if len(first.asked) - first.waiting > answers:
            raise GoneError
        return halved(request)

    first, second, told = Crowd(1, then_gone), Crowd(1, halved), list[int]()
    with pytest.raises(GoneError):
        draw_shards(first, wanted, artifacts, ("pairs", "broken"), untold)
    assert artifacts.facts("pairs", "broken") is None
    draw_shards(second, wanted, artifacts, ("pairs", "broken"), told.append)
    kept = answers // 4 * 4
    asked = [caption for request in second.asked for caption in request.captions]
    assert asked == wanted.captions[kept * module.BATCH :]
    np.testing.assert_array_equal(second.asked[0].noise_BCHW, list(wanted.requests())[kept].noise_BCHW)
    assert told == [done * module.BATCH for done in range(kept + 1, 15)]
    assert files(artifacts, "broken") == files(artifacts, "unbroken") and len(files(artifacts, "broken")) == 4
    assert artifacts.facts("pairs", "broken") == artifacts.facts("pairs", "unbroken")
