"""Calls to peers, over real gRPC servers in this process."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from sdxs import rpc
from sdxs.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from sdxs.v1 import text_encoder_pb2
from services.fabric.deadline import Deadline, Priority
from services.fabric.discovery import replicas
from services.fabric.endpoint import Endpoint
from services.fabric.peers import Address, PeerSet
from services.fabric.server import DataPlane
from services.settings import ServingSettings

DESCRIPTOR = text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoderService"]
ANY = text_encoder_pb2.EncodeRequest(prompt="a").SerializeToString()


class Room:
    """Answers with its own name, or as it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.cancelled = False
        self.asked: list[Deadline] = []
        self.error: Exception | None = None
        self.hold: asyncio.Event | None = None

    async def encode(self, _: text_encoder_pb2.EncodeRequest, deadline: Deadline) -> text_encoder_pb2.EncodeResponse:
        self.calls += 1
        self.asked.append(deadline)
        if self.error is not None:
            raise self.error
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return text_encoder_pb2.EncodeResponse(model_digest=self.name)


class Site:
    """Servers that come and go, and the list of them."""

    def __init__(self, lines: bool) -> None:
        self.lines = lines
        self.planes: dict[Address, DataPlane] = {}

    async def add(self, room: Room, digest: str = "d", max_in_flight: int = 8, node: str = "") -> Address:
        plane = DataPlane(Endpoint(DESCRIPTOR, room, max_in_flight), 1 << 20, self.lines)
        await plane.start("127.0.0.1:0")
        address = Address(plane.address, digest, 0, node)
        self.planes[address] = plane
        return address

    async def kill(self, address: Address) -> None:
        await self.planes.pop(address).drain(0)

    async def resolve(self) -> Sequence[Address]:
        return list(self.planes)


@pytest.fixture(params=[True, False], ids=["lines", "calls"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    site = Site(request.param)
    yield site
    for address in list(site.planes):
        await site.kill(address)


@pytest.fixture
async def peers(site: Site) -> AsyncIterator[PeerSet]:
    peers = PeerSet(DESCRIPTOR.full_name, site.resolve, "d", refresh_s=0.2, patience_s=2.0)
    peers.open()
    yield peers
    await peers.close()


async def name_of(peers: PeerSet, seconds: float = 5.0) -> str:
    answer = await peers.call("Encode", ANY, Deadline.after(seconds))
    return text_encoder_pb2.EncodeResponse.FromString(answer).model_digest


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of events
            await asyncio.sleep(0.01)


async def known(peers: PeerSet, number: int) -> None:
    await until(lambda: len(peers._peers) == number)


async def test_a_dead_peer_is_replaced_by_the_living(site: Site, peers: PeerSet) -> None:
    first = await site.add(Room("first"))
    assert await name_of(peers) == "first"
    await site.kill(first)
    await site.add(Room("second"))
    assert await name_of(peers) == "second"


async def test_class_and_tenant_of_a_call_reach_the_room(site: Site, peers: PeerSet) -> None:
    room = Room("only")
    await site.add(room)
    await name_of(peers)
    began = time.monotonic()
    for deadline in (Deadline.after(9), Deadline.after(9, Priority.HIGH, "acme"), Deadline.after(9, Priority.LOW).within(5)):
        await peers.call("Encode", ANY, deadline)
    expected = [(Priority.NORMAL, ""), (Priority.HIGH, "acme"), (Priority.LOW, "")]
    assert [(deadline.priority, deadline.tenant) for deadline in room.asked[1:]] == expected
    assert began + 4 < room.asked[3].at < time.monotonic() + 5


@pytest.mark.parametrize(
    ("key", "value"), [("x-sdxs-priority", "urgent"), ("x-sdxs-tenant", "a b"), ("x-sdxs-tenant", "a" * 65)]
)
async def test_a_class_or_tenant_that_is_none_is_refused_by_its_name(site: Site, key: str, value: str) -> None:
    address = await site.add(Room("only"))
    async with grpc.aio.insecure_channel(address.target) as channel:
        call: Any = channel.unary_unary(f"/{DESCRIPTOR.full_name}/Encode")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(ANY, metadata=[(key, value)], timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in rpc.violations(caught.value.trailing_metadata())] == [key]


async def test_a_broken_connection_is_noticed_without_a_call(site: Site, peers: PeerSet) -> None:
    address = await site.add(Room("only"))
    await name_of(peers)
    peers.refresh_s = 100
    await asyncio.sleep(0.35)  # into the long wait
    await site.kill(address)
    await known(peers, 0)
    assert not peers.ready


async def test_a_call_waits_for_a_replica_that_is_yet_to_come(site: Site, peers: PeerSet) -> None:
    call = asyncio.create_task(name_of(peers))
    await asyncio.sleep(0.3)
    await site.add(Room("late"))
    assert await call == "late"


async def test_patience_ends(peers: PeerSet) -> None:
    peers.patience_s = 0.2
    with pytest.raises(Unavailable):
        await name_of(peers)


async def test_the_callers_deadline_comes_first(peers: PeerSet) -> None:
    with pytest.raises(DeadlineExceeded):
        await name_of(peers, seconds=0.2)


async def test_the_callers_deadline_comes_first_also_for_a_timer_that_is_early(
    peers: PeerSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then a loop's timer goes off just before its time; that was told as UNAVAILABLE."""
    remaining = Deadline.remaining
    monkeypatch.setattr(Deadline, "remaining", lambda self: (left := remaining(self)) and left / 2)
    with pytest.raises(DeadlineExceeded):
        await peers.call("Encode", b"", Deadline.after(0.1))


async def test_another_models_replicas_are_left_alone(site: Site, peers: PeerSet) -> None:
    await site.add(Room("other"), digest="e")
    await site.add(Room("ours"), digest="d")
    assert {await name_of(peers) for _ in range(20)} == {"ours"}


async def test_a_full_peer_sends_the_call_to_another(site: Site, peers: PeerSet) -> None:
    await site.add(Room("full"), max_in_flight=0)
    await site.add(Room("free"))
    await known(peers, 2)
    assert {await name_of(peers) for _ in range(20)} == {"free"}


async def test_all_full_is_overloaded(site: Site, peers: PeerSet) -> None:
    await site.add(Room("full"), max_in_flight=0)
    await site.add(Room("full too"), max_in_flight=0)
    await known(peers, 2)
    with pytest.raises(Overloaded):
        await name_of(peers)


async def test_the_less_busy_of_two_is_taken(site: Site, peers: PeerSet) -> None:
    busy, idle = Room("busy"), Room("idle")
    await site.add(busy)
    busy.hold = asyncio.Event()
    await known(peers, 1)
    stuck = [asyncio.create_task(name_of(peers)) for _ in range(3)]
    await until(lambda: busy.calls == 3)
    await site.add(idle)
    await known(peers, 2)
    assert {await name_of(peers) for _ in range(10)} == {"idle"}
    busy.hold.set()
    await asyncio.gather(*stuck)


async def asked_for(peers: PeerSet, affinity: str) -> str:
    answer = await peers.call("Encode", ANY, Deadline.after(5), affinity)
    return text_encoder_pb2.EncodeResponse.FromString(answer).model_digest


async def test_calls_with_an_affinity_go_to_the_same_replica(site: Site, peers: PeerSet) -> None:
    addresses = {name: await site.add(Room(name)) for name in "abc"}
    await known(peers, 3)
    homes = {f"lora-{i}": await asked_for(peers, f"lora-{i}") for i in range(30)}
    assert set(homes.values()) == {*addresses}, "each has its share"
    for affinity, home in homes.items():
        assert await asked_for(peers, affinity) == home
    gone = homes["lora-0"]
    await site.kill(addresses[gone])
    await known(peers, 2)
    for affinity, home in homes.items():
        now = await asked_for(peers, affinity)
        assert now == home if home != gone else now in homes.values(), "only what was at the one that is gone has moved"


async def test_a_preferred_replica_that_is_much_busier_is_passed_over(site: Site, peers: PeerSet) -> None:
    rooms = {name: Room(name) for name in "ab"}
    for room in rooms.values():
        await site.add(room, max_in_flight=64)
    await known(peers, 2)
    home = rooms[await asked_for(peers, "lora")]
    [other] = [room for room in rooms.values() if room is not home]
    home.hold = asyncio.Event()
    waiting = [asyncio.create_task(asked_for(peers, "lora")) for _ in range(5)]
    await until(lambda: home.calls == 6)
    assert await asked_for(peers, "lora") == other.name
    home.hold.set()
    assert await asyncio.gather(*waiting) == [home.name] * 5
    assert await asked_for(peers, "lora") == home.name


async def test_replicas_of_the_same_node_come_first(site: Site, peers: PeerSet) -> None:
    """However busy they are, as long as one of them takes the call."""
    peers.near = "here"
    near = [Room("near"), Room("near too")]
    await site.add(Room("far"), node="there")
    await site.add(Room("somewhere"))
    await known(peers, 2)
    assert {await name_of(peers) for _ in range(20)} == {"far", "somewhere"}, "there is none near yet"
    addresses = [await site.add(room, node="here", max_in_flight=2) for room in near]
    await known(peers, 4)
    assert {await name_of(peers) for _ in range(20)} == {"near", "near too"}
    for room in near:
        room.hold = asyncio.Event()
    stuck = [asyncio.create_task(name_of(peers)) for _ in range(4)]
    await until(lambda: near[0].calls + near[1].calls >= 24)
    assert {await name_of(peers) for _ in range(20)} == {"far", "somewhere"}, "those near are full"
    for room in near:
        assert room.hold is not None
        room.hold.set()
    assert set(await asyncio.gather(*stuck)) == {"near", "near too"}
    assert {await name_of(peers) for _ in range(20)} == {"near", "near too"}
    await site.kill(addresses[0])
    await site.kill(addresses[1])
    assert {await name_of(peers) for _ in range(20)} == {"far", "somewhere"}, "those near are gone"


async def test_a_second_try_is_encoded_for_the_peer_that_gets_it(site: Site, peers: PeerSet) -> None:
    peers.near = "here"
    full = await site.add(Room("full"), max_in_flight=0, node="here")
    free = await site.add(Room("free"), node="there")
    await known(peers, 2)
    asked: list[Address] = []

    def payload(address: Address) -> bytes:
        asked.append(address)
        return ANY

    answer = await peers.call("Encode", payload, Deadline.after(5))
    assert text_encoder_pb2.EncodeResponse.FromString(answer).model_digest == "free"
    assert asked == [full, free]


async def test_a_peer_that_waits_for_others_is_not_gone(site: Site, peers: PeerSet) -> None:
    """As a ControlNet's room that finds no U-Net: callers try again while they have patience, then hear what it says."""
    room = Room("waiting")
    room.error = Unavailable("no replica answers for sdxs.v1.UNetService")
    await site.add(room)
    await known(peers, 1)
    first = peers._peers.copy()
    call = asyncio.create_task(name_of(peers))
    await until(lambda: room.calls > 2)
    room.error = None
    assert await call == "waiting"
    room.error, peers.patience_s = Unavailable("no replica answers for sdxs.v1.UNetService"), 0.3
    with pytest.raises(Unavailable, match=r"sdxs\.v1\.UNetService"):
        await name_of(peers)
    assert peers._peers == first, "dropped"


async def test_a_refusal_is_not_tried_elsewhere(site: Site, peers: PeerSet) -> None:
    room = Room("strict")
    room.error = InvalidRequest("prompt", "a", "at least two letters")
    await site.add(room)
    with pytest.raises(InvalidRequest) as caught:
        await name_of(peers)
    assert caught.value.field == "prompt"
    assert room.calls == 1


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_deadline_and_cancellation_reach_the_replica(site: Site, peers: PeerSet, how: str) -> None:
    room = Room("slow")
    room.hold = asyncio.Event()
    await site.add(room)
    call = asyncio.create_task(name_of(peers, seconds=0.3 if how == "deadline" else 10))
    await until(lambda: room.calls == 1)
    if how == "cancel":
        call.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancel" else DeadlineExceeded):
        await call
    await until(lambda: room.cancelled)


async def test_a_draining_replica_answers_what_it_has(site: Site, peers: PeerSet) -> None:
    room = Room("leaving")
    room.hold = asyncio.Event()
    address = await site.add(room)
    call = asyncio.create_task(name_of(peers))
    await until(lambda: room.calls == 1)
    draining = asyncio.create_task(site.planes.pop(address).drain(5))
    await known(peers, 0)
    room.hold.set()
    assert await call == "leaving"
    await draining


async def test_an_unforeseen_error_keeps_its_text(site: Site, peers: PeerSet) -> None:
    room = Room("broken")
    room.error = RuntimeError("secret /path")
    await site.add(room)
    with pytest.raises(Exception, match="internal error") as caught:
        await name_of(peers)
    assert "secret" not in str(caught.value)


@dataclass
class Handle:
    """What a DeploymentHandle is to us: one question to all replicas."""

    site: Site

    def broadcast(self, method: str) -> "Handle":
        assert method == "addr"
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[object]:
        return [*await self.site.resolve(), Unavailable("one that is still starting")]


@pytest.mark.parametrize(("max_message_bytes", "arrives"), [(5_000_000, True), (4_000_000, False)])
async def test_the_settings_say_how_large_an_answer_may_be(site: Site, max_message_bytes: int, arrives: bool) -> None:
    settings = ServingSettings(max_message_bytes=max_message_bytes)
    await site.add(Room("x" * 4_500_000))
    peers = replicas(DESCRIPTOR.full_name, Handle(site), "d", settings)
    peers.open()
    with contextlib.nullcontext() if arrives else pytest.raises(Overloaded, match=r"4000000|3999936"):
        assert len(await name_of(peers)) == 4_500_000
    await peers.close()
