"""LoRAs of a replica: one load at a time for each, the least recently used detached, nobody held up by somebody else's load."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from ray.util import metrics

from sdxs.errors import InvalidRequest, NotFound, SdxsError, Unavailable
from sdxs.v1 import lora_pb2
from services.fabric.batcher import GreedyBatcher
from services.fabric.lora_metrics import LoraMetrics
from services.fabric.loras import ReplicaLoras


class Fitted:
    """As large as it says."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Site:
    """Networks, a store and a device, with a gate in front of the store."""

    def __init__(self, most: int = 2, most_bytes: int = 1000) -> None:
        self.worn: list[str] = []
        self.read: list[str] = []
        self.errors: dict[str, SdxsError] = {}
        self.open = threading.Event()
        self.open.set()
        self.threads: set[str] = set()
        self.batcher = GreedyBatcher[str, list[str]](self._compute, max_batch=4, max_waiting=100)
        self.loras = ReplicaLoras("unet", self, self._read, self.batcher.between, most, most_bytes)

    def attached(self, name: str, _: Any) -> list[str]:
        if name == "odd":
            raise InvalidRequest("", "", "a LoRA that PEFT can attach")
        return [*self.worn, name]

    def detached(self, name: str) -> list[str]:
        return [each for each in self.worn if each != name]

    def put(self, dressed: list[str]) -> None:
        self.threads.add(threading.current_thread().name)
        self.worn = dressed

    def _read(self, digest: str) -> Any:
        self.read.append(digest)
        assert self.open.wait(5)
        if digest in self.errors:
            raise self.errors[digest]
        return Fitted(int(digest.partition("-")[2] or 1))

    def _compute(self, names: Sequence[str]) -> Sequence[list[str]]:
        self.threads.add(threading.current_thread().name)
        return [[*self.worn] for _ in names]

    async def draw(self, *digests: str, scale: float = 1.0) -> list[str]:
        """What was attached while it was computed."""
        async with self.loras.hold([lora_pb2.LoraUse(digest=digest, scale=scale) for digest in digests]) as uses:
            assert uses == tuple((digest, scale) for digest in digests)
            [done] = await self.batcher.submit(["image"])
        return done.result


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    yield site
    site.open.set()
    site.loras.close()
    site.batcher.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - threads tell no event
            await asyncio.sleep(0.005)


async def test_one_load_for_all_who_ask_and_none_for_those_after(site: Site) -> None:
    site.open.clear()
    asking = [asyncio.create_task(site.draw("a")) for _ in range(5)]
    await until(lambda: site.read == ["a"])
    site.open.set()
    assert await asyncio.gather(*asking) == [["a"]] * 5
    assert await site.draw("a") == ["a"]
    assert (site.read, site.loras.misses, site.loras.hits) == (["a"], 1, 5)
    assert site.threads == {"device_0"}


async def test_others_are_drawn_while_one_is_loaded(site: Site) -> None:
    await site.draw("a")
    site.open.clear()
    waiting = asyncio.create_task(site.draw("b"))
    await until(lambda: site.read == ["a", "b"])
    for _ in range(20):
        assert await site.draw("a") == ["a"]
        assert await site.draw() == ["a"]
    assert not waiting.done()
    site.open.set()
    assert await waiting == ["a", "b"]


async def test_the_least_recently_used_leaves(site: Site) -> None:
    for digest in ("a", "b", "a", "c"):
        await site.draw(digest)
    await until(lambda: sorted(site.worn) == ["a", "c"])
    await site.draw("b")
    assert site.read == ["a", "b", "c", "b"]


async def test_bytes_count_too(site: Site) -> None:
    await site.draw("a-600")
    await site.draw("b-300")
    await until(lambda: site.loras.nbytes == 900)
    await site.draw("c-200")
    await until(lambda: site.worn == ["b-300", "c-200"])


async def test_those_in_use_stay_however_many(site: Site) -> None:
    assert sorted(await site.draw("a", "b", "c", "d")) == ["a", "b", "c", "d"]
    await until(lambda: site.worn == ["c", "d"])


async def test_a_failure_reaches_all_who_wait_under_their_field_and_is_not_kept(site: Site) -> None:
    site.errors = {"gone": NotFound("not there"), "away": Unavailable("no store"), "bent": InvalidRequest("", "bent", "a LoRA")}
    site.open.clear()
    asking = [asyncio.create_task(site.draw(*digests)) for digests in (("gone",), ("a", "gone"), ("bent",), ("a", "away"))]
    await until(lambda: len(site.read) == 4)
    site.open.set()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert [(type(error), error.field) for error in found if isinstance(error, SdxsError)] == [
        (NotFound, "loras[0]"), (NotFound, "loras[1]"), (InvalidRequest, "loras[0]"), (Unavailable, ""),
    ]  # fmt: skip
    site.errors = {}
    assert await site.draw("gone") == ["a", "gone"]
    with pytest.raises(InvalidRequest, match="PEFT can attach"):
        await site.draw("odd")
    assert len(site.loras) == 2


async def test_who_leaves_does_not_stop_the_load(site: Site) -> None:
    site.open.clear()
    leaving = asyncio.create_task(site.draw("a"))
    await until(lambda: site.read == ["a"])
    staying = asyncio.create_task(site.draw("a"))
    leaving.cancel()
    await asyncio.sleep(0)
    site.open.set()
    assert await staying == ["a"]
    assert site.read == ["a"]


async def test_what_makes_no_sense_is_refused_before_anything_is_read(site: Site) -> None:
    for digests, scale, field in (
        (("a",), float("nan"), "loras[0].scale"),
        (("a",) * 2, 1.0, "loras[1].name"),
        ("abcde", 1.0, "loras"),
    ):
        with pytest.raises(InvalidRequest) as error:
            await site.draw(*digests, scale=scale)
        assert error.value.field == field
    assert site.read == []


async def test_attaching_waits_for_the_batch_in_hand(site: Site) -> None:
    """A network is never changed under a forward pass."""
    computing, release = threading.Event(), threading.Event()

    def compute(names: Sequence[str]) -> Sequence[list[str]]:
        before = [*site.worn]
        computing.set()
        release.wait(5)
        assert site.worn == before
        return [before for _ in names]

    site.batcher._compute = compute
    drawing = asyncio.create_task(site.draw())
    await until(computing.is_set)
    waiting = asyncio.create_task(site.draw("a"))
    await until(lambda: site.read == ["a"])
    await asyncio.sleep(0.05)
    assert site.worn == []
    release.set()
    assert await drawing == []
    assert await waiting == ["a"]


async def test_numbers_for_prometheus(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(metrics.Counter, "inc", lambda counter, value, tags: told.append((counter.info["name"], value, tags)))
    monkeypatch.setattr(metrics.Gauge, "set", lambda gauge, value, tags: told.append((gauge.info["name"], value, tags)))
    published = LoraMetrics(site.loras)
    for digest in ("a-7", "a-7", "b-5"):
        await site.draw(digest)
    published.tell()
    tags = {"stage": "unet"}
    assert told == [
        ("sdxs_lora_cache", 1, {**tags, "outcome": "hit"}), ("sdxs_lora_cache", 2, {**tags, "outcome": "miss"}),
        ("sdxs_loras_attached", 2, tags), ("sdxs_lora_bytes", 12, tags),
    ]  # fmt: skip
    told.clear()
    published.tell()
    assert [name for name, *_ in told] == ["sdxs_loras_attached", "sdxs_lora_bytes"]
