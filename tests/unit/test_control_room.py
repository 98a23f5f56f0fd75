"""The control room beside a cluster that does as it is told, and a gateway's keeper beside stages that do not compute: who is started,
who serves, who is stopped, and never too early."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxs import bundle, registry
from sdxs.errors import Unavailable
from sdxs.store import ObjectStore, open_store
from sdxs.v1 import gateway_pb2
from services.fabric import pointers
from services.fabric.models import Plan, Report, ServedModel, Version, Wanted, application_name, served_model
from services.fabric.pointers import Found
from services.gateway import deployment
from services.gateway.keeper import Keeper
from services.gateway.table import Entry, ModelTable
from services.models import service
from services.models.service import ControlRoom, Status
from services.settings import ServingSettings
from tests.models import tiny_folder


class Cluster:
    """Applications that start when the test says so."""

    def __init__(self) -> None:
        self.found: dict[str, Status] = {}
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.refuses = False

    def version(self, reference: str, found: Found) -> Version:
        model = served_model(found.manifest)
        return Version(application_name(model, "p"), found.source, model, ("text_encoder", "unet", "decoder"))

    def statuses(self) -> Mapping[str, Status]:
        return dict(self.found)

    def start(self, reference: str, version: Version) -> None:
        if self.refuses:
            raise Unavailable("no room for it")
        self.started.append(version.application)
        self.found[version.application] = Status(running=False)

    def stop(self, names: Iterable[str]) -> None:
        for name in names:
            self.stopped.append(name)
            del self.found[name]

    def run_all(self) -> None:
        self.found = dict.fromkeys(self.found, Status(running=True))


class Clock:
    """The room's time."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one name."""
    folders = [tiny_folder(tmp_path_factory.mktemp("bundle") / "tiny", seed=seed) for seed in range(2)]
    for folder in folders:
        bundle.seal(folder, "tiny")
    return folders


@pytest.fixture
def settings(tmp_path: Path) -> ServingSettings:
    return ServingSettings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")


@pytest.fixture
def store(settings: ServingSettings, bundles: list[Path]) -> ObjectStore:
    """Both are published; `tiny` is the first."""
    opened = open_store(settings, "models")
    for folder in bundles:
        registry.publish(folder, opened)
    registry.promote("tiny", bundle.facts(bundles[0]).digest, opened)
    return opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (service, pointers):
        monkeypatch.setattr(module, "time", clock)
    return clock


def named(folder: Path) -> str:
    """The application of a bundle."""
    return application_name(served_model(bundle.facts(folder)), "p")


def telling(serving: str, *held: str, reference: str = "tiny") -> Report:
    """What a gateway reports that serves one."""
    return Report("one", {reference: serving} if serving else {}, frozenset({serving, *held} - {""}), {})


def line(plan: Plan | None) -> Wanted:
    """The one of a plan."""
    assert plan is not None
    [found] = plan
    return found


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def room(cluster: Cluster, settings: ServingSettings, store: ObjectStore, clock: Clock) -> ControlRoom:
    return ControlRoom(["tiny"], cluster, settings)


async def test_a_room_says_nothing_before_it_knows(room: ControlRoom, cluster: Cluster, bundles: list[Path]) -> None:
    assert room.follow(telling("")) is None
    await room.turn()
    assert cluster.started == [named(bundles[0])]
    wanted = line(room.follow(telling("")))
    assert wanted.version is not None and wanted.version.application == named(bundles[0])
    assert wanted.standing is None and not wanted.error


async def test_the_old_bundle_stands_until_no_gateway_needs_it(
    room: ControlRoom, cluster: Cluster, bundles: list[Path], store: ObjectStore, clock: Clock
) -> None:
    old, new = map(named, bundles)

    async def turn(report: Report, seconds: float = 20.0) -> Wanted:
        clock.now += seconds
        plan = room.follow(report)
        await room.turn()
        return line(plan)

    await room.turn()
    cluster.run_all()
    await turn(telling(old))
    registry.promote("tiny", bundle.facts(bundles[1]).digest, store)
    await turn(telling(old))
    assert cluster.started == [old, new]
    told = await turn(telling(old))
    assert told.version is not None and told.standing is not None
    assert (told.version.application, told.standing.application) == (new, old)
    cluster.run_all()
    for _ in range(5):  # it draws with the new one, or a call still uses the old one
        await turn(telling(old, new))
        await turn(telling(new, old))
    assert cluster.stopped == []
    await turn(telling(new), seconds=1)
    assert cluster.stopped == [], "a gateway may just have been told of it"
    assert line(room.follow(telling(new))).standing is None
    await turn(telling(new), seconds=6)
    assert cluster.stopped == [old] and set(cluster.found) == {new}


async def test_nothing_is_stopped_while_no_gateway_is_heard_of(
    room: ControlRoom, cluster: Cluster, bundles: list[Path], clock: Clock
) -> None:
    cluster.found["sdxs-tiny-left-over"] = Status(running=True)
    for _ in range(5):
        clock.now += 20
        await room.turn()
    assert cluster.stopped == []
    for _ in range(3):
        clock.now += 20
        room.follow(telling(named(bundles[0])))
        await room.turn()
    assert cluster.stopped == ["sdxs-tiny-left-over"]


async def test_what_cannot_start_is_told_and_tried_again(
    room: ControlRoom, cluster: Cluster, bundles: list[Path], clock: Clock
) -> None:
    [name] = map(named, bundles[:1])

    async def turn(seconds: float) -> str:
        clock.now += seconds
        await room.turn()
        return line(room.follow(telling(""))).error

    assert await turn(0) == ""
    cluster.found[name] = Status(running=False, failed=True, message="no such layer")
    assert await turn(20) == "no such layer" and cluster.started == [name]
    assert await turn(1) == "no such layer" and cluster.started == [name], "it pauses"
    await turn(5)
    assert cluster.started == [name, name]
    cluster.found, cluster.refuses = {}, True
    assert await turn(20) == "no room for it"
    cluster.refuses = False
    await turn(30)
    cluster.run_all()
    assert await turn(20) == "" and cluster.started == [name] * 3


async def test_a_new_room_finds_what_its_predecessor_left_in_the_middle(
    cluster: Cluster, settings: ServingSettings, store: ObjectStore, bundles: list[Path], clock: Clock
) -> None:
    old, new = map(named, bundles)
    cluster.found = {old: Status(running=True), new: Status(running=False)}
    registry.promote("tiny", bundle.facts(bundles[1]).digest, store)
    room = ControlRoom(["tiny"], cluster, settings)
    await room.turn()
    told = line(room.follow(telling("")))  # a gateway as new as the room
    assert told.version is not None and told.standing is not None
    assert (told.version.application, told.standing.application) == (new, old)
    assert cluster.started == []


class Chain:
    """Stages that are there, or break."""

    def __init__(self, breaks: bool = False) -> None:
        self.ready = True
        self.breaks = breaks
        self.drawn = 0

    async def run(self, *_: object) -> None:
        if self.breaks:
            raise Unavailable("the decoder has ended")
        self.drawn += 1


def version(name: str) -> Version:
    """A bundle of the model `tiny`."""
    return Version(name, name, ServedModel("tiny", f"sha256:{name}", 32, 32, 5))


class Stages:
    """What a gateway opens."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.entries: dict[str, Entry] = {}
        self.closed: list[str] = []

    async def open(self, version: Version) -> Entry:
        chain: Any = Chain(version.application in self.broken)
        name = version.application

        async def close() -> None:
            self.closed.append(name)

        self.entries[name] = Entry(name, version.model, chain, close)
        return self.entries[name]


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
async def keeper(stages: Stages) -> AsyncIterator[Keeper]:
    keeper = Keeper(ModelTable(1 << 20), stages.open)
    yield keeper
    await keeper.close()


async def settle() -> None:
    """All that waits for nothing goes on."""
    for _ in range(20):
        await asyncio.sleep(0)


REQUEST = gateway_pb2.GenerateRequest(prompt="red apple", seed=1)


async def test_a_gateway_draws_with_a_bundle_before_it_serves_it(stages: Stages) -> None:
    keeper = Keeper(table := ModelTable(1 << 20), stages.open)
    keeper.follow((Wanted("tiny", version("old")),))
    await settle()
    assert keeper.report().serving == {"tiny": "old"} and table.ready
    with table.take(REQUEST) as (order, chain):  # a call that takes its time
        stages.broken = {"new"}
        keeper.follow((Wanted("tiny", version("new"), version("old")),))
        await settle()
        assert keeper.report().serving == {"tiny": "old"}
        assert keeper.report().errors == {"new": "the decoder has ended"}
        assert table.listing()[0].digest == "sha256:old"
        keeper.follow((Wanted("tiny", version("new"), version("old")),))
        await settle()
        assert keeper.report().held == {"old"}, "it pauses before the next try"
        keeper.follow((Wanted("tiny", version("newer"), version("old")),))
        await settle()
        assert keeper.report().serving == {"tiny": "newer"}
        assert stages.entries["newer"].chain.drawn == 1  # type: ignore[attr-defined]
        assert order.model.digest == "sha256:old" and chain is stages.entries["old"].chain
        assert "old" not in stages.closed and "old" in keeper.report().held
    await settle()
    assert "old" in stages.closed and keeper.report().held == {"newer"}
    with table.take(REQUEST) as (order, _):
        assert order.model.digest == "sha256:newer"
    await keeper.close()
    assert stages.closed.count("newer") == 1 and not table.ready


async def test_a_try_that_is_no_longer_wanted_is_given_up(keeper: Keeper, stages: Stages) -> None:
    chain: Any = Chain()
    chain.ready = False

    async def opened(version: Version) -> Entry:
        entry = await Stages.open(stages, version)
        entry.chain = chain
        return entry

    keeper._open = opened
    keeper.follow((Wanted("tiny", version("old")),))
    await settle()
    assert keeper.report().held == {"old"} and keeper.report().serving == {}
    keeper.follow(())
    await settle()
    assert stages.closed == ["old"] and keeper.report().held == frozenset()


async def test_a_gateway_goes_on_while_the_room_knows_nothing_or_is_away(
    monkeypatch: pytest.MonkeyPatch, keeper: Keeper
) -> None:
    """A room that was just replaced answers None; that ended the gateway's loop once."""
    monkeypatch.setattr(deployment, "_ASK_S", 0.0)
    answers = iter([None, ConnectionError("away"), (Wanted("tiny", version("old")),)])
    asked = asyncio.Event()

    class Follow:
        async def remote(self, _report: Report) -> Plan | None:
            answer = next(answers, ())
            if isinstance(answer, Exception):
                raise answer
            if answer:
                asked.set()
            return answer

    gateway: Any = SimpleNamespace(_keeper=keeper, _room=SimpleNamespace(follow=Follow()))
    following = asyncio.create_task(deployment.GatewayReplica._follow(gateway))
    async with asyncio.timeout(5):
        await asked.wait()
    assert not following.done()
    following.cancel()
