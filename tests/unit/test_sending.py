"""How residuals leave the ControlNet's room: on the device, by shared memory, in messages, in parts; to rooms that say what they got."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sdxs import tensors
from sdxs.errors import InvalidRequest, Overloaded
from sdxs.residuals import Residuals
from sdxs.v1 import unet_pb2
from services.controlnet.sending import Sender
from services.fabric.deadline import Deadline
from services.fabric.device_handover import DeviceBorrower, DeviceLender
from services.fabric.device_memory import HostMemory
from services.fabric.handover import Borrower, SharedLoan
from services.fabric.peers import Address, Payload

HERE, THERE = "node a", "node b"
NEAR, FAR = Address("10.0.0.1:1", "d", 1, HERE), Address("10.0.0.2:1", "d", 1, THERE)
SHAPES = [(2, 3, 4, 4), (2, 5, 1, 1)]
SEEDS = [7, 8]


class UNet:
    """Replicas that answer with what the residuals add up to, image by image; the addresses are asked in turn until one answers."""

    ready = True

    def __init__(self, *addresses: Address, blind: Sequence[str] = (), limit: int = 1 << 30) -> None:
        self.addresses, self.blind, self.limit = addresses, blind, limit
        self.seen: list[tuple[Address, str, tuple[int, ...]]] = []
        self.dead: set[Address] = set()
        self.hold: asyncio.Event | None = None
        self.reached = asyncio.Event()

    async def call(self, name: str, payload: Payload, deadline: Deadline, affinity: str = "") -> bytes:
        assert name == "Denoise"
        for address in self.addresses:
            encoded = payload if isinstance(payload, bytes) else payload(address)
            if address in self.dead:
                continue
            return await self._answer(address, encoded)
        raise AssertionError("none is alive")

    async def _answer(self, address: Address, encoded: bytes) -> bytes:
        if len(encoded) > self.limit:
            raise Overloaded(f"{len(encoded)} bytes, at most {self.limit}")
        request = unet_pb2.DenoiseRequest.FromString(encoded)
        which = request.WhichOneof("residuals")
        self.seen.append((address, which or "none", tuple(request.seeds)))
        self.reached.set()
        if self.hold is not None:
            await self.hold.wait()
        if which in self.blind:
            raise InvalidRequest(which, "process 1", "memory that can be read from here")
        sums = self._sums(request)
        answer = unet_pb2.DenoiseResponse(latent=tensors.encode(sums), model_digest="d", batch=len(request.seeds))
        return answer.SerializeToString()

    def _sums(self, request: unet_pb2.DenoiseRequest) -> np.ndarray:
        parts: Sequence[np.ndarray] = []
        if request.HasField("shared"):
            borrower = Borrower()
            parts = borrower.read(request.shared).parts
            borrower.close()
        elif request.HasField("device"):
            copier = DeviceBorrower(HostMemory(), torch.float32)
            parts = copier.read(request.device).host().parts
            copier.close()
        elif request.HasField("inline"):
            parts = [tensors.decode(part, "part") for part in request.inline.parts]
        zero = np.zeros(len(request.seeds), np.float32)
        return np.array(sum((part.sum(axis=(1, 2, 3)) for part in parts), zero), np.float32)


def residuals(images: int = 2) -> Residuals:
    rng = np.random.default_rng(1)
    return Residuals(tuple(rng.standard_normal((images, *shape[1:]), np.float32) for shape in SHAPES))


def expected(sent: Residuals) -> list[float]:
    return [sum(float(part[i].astype(np.float64).sum()) for part in sent.parts) for i in range(len(sent.parts[0]))]


async def send(sender: Sender, sent: Residuals | None, seeds: Sequence[int] = SEEDS) -> unet_pb2.DenoiseResponse:
    async with asyncio.timeout(10):
        rows = sent.rows() if sent is not None else []
        return await sender.send(unet_pb2.DenoiseRequest(seeds=seeds, strength=0.5), rows, Deadline())


def sums(answer: unet_pb2.DenoiseResponse) -> list[float]:
    return [float(one) for one in tensors.decode(answer.latent, "latent")]


def free(sender: Sender) -> list[tuple[int, int]]:
    """Pieces that are not lent."""
    assert sender._lender is not None
    return sender._lender._extents._free


async def returned(sender: Sender, size: int = 1 << 16) -> None:
    async with asyncio.timeout(5):
        while free(sender) != [(0, size)]:  # noqa: ASYNC110 - given back by a callback
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("address", "size", "way"), [(NEAR, 1 << 16, "shared"), (FAR, 1 << 16, "inline"), (NEAR, 0, "inline"), (NEAR, 64, "inline")]
)
async def test_residuals_go_the_fastest_way_there_is(address: Address, size: int, way: str) -> None:
    """Shared on one node; in the message to another, where there is to be no shared memory, and where it is all lent."""
    unet = UNet(address)
    sender = Sender(unet, HERE, size, 1 << 30)
    sent = residuals()
    answer = await send(sender, sent)
    assert unet.seen == [(address, way, (7, 8))]
    assert sender.sent == {way: 1}
    assert sums(answer) == pytest.approx(expected(sent), abs=1e-4)
    if size:
        await returned(sender, size)
    sender.close()


async def test_a_request_without_residuals_passes_as_it_is() -> None:
    unet = UNet(NEAR)
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    assert sums(await send(sender, None)) == [0, 0]
    assert (unet.seen, sender.sent) == ([(NEAR, "none", (7, 8))], {})
    sender.close()


async def test_who_cannot_read_shared_memory_is_sent_messages_from_then_on() -> None:
    unet = UNet(NEAR, blind=["shared"])
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    sent = residuals()
    for _ in range(2):
        assert sums(await send(sender, sent)) == pytest.approx(expected(sent), abs=1e-4)
    assert [way for _, way, _ in unet.seen] == ["shared", "inline", "inline"]
    await returned(sender)
    sender.close()


async def test_requests_that_are_refused_together_all_find_another_way() -> None:
    """The first refusal tells the sender, those that were on their way meanwhile do not fail for it."""
    unet = UNet(NEAR, blind=["shared"])
    unet.hold = asyncio.Event()
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    sent = residuals()
    calls = [asyncio.create_task(send(sender, sent)) for _ in range(4)]
    while len(unet.seen) < 4:  # noqa: ASYNC110 - the fourth of four
        await asyncio.sleep(0.01)
    unet.hold.set()
    for answer in await asyncio.gather(*calls):
        assert sums(answer) == pytest.approx(expected(sent), abs=1e-4)
    assert sender.sent == {"shared": 4, "inline": 4}
    await returned(sender)
    sender.close()


async def test_a_second_try_elsewhere_gets_what_can_be_read_there() -> None:
    unet = UNet(NEAR, FAR)
    unet.dead = {NEAR}
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    sent = residuals()
    assert sums(await send(sender, sent)) == pytest.approx(expected(sent), abs=1e-4)
    assert unet.seen == [(FAR, "inline", (7, 8))]
    sender.close()


async def test_what_is_too_large_for_a_message_goes_in_halves() -> None:
    images = 5
    sent = residuals(images)
    one = sum(part[:1].nbytes for part in sent.parts)
    limit = (1 << 20) + 2 * one  # two images, and room for the rest of the request
    unet = UNet(FAR, limit=limit)
    sender = Sender(unet, HERE, 1 << 16, limit)
    seeds = list(range(10, 10 + images))
    answer = await send(sender, sent, seeds)
    assert sums(answer) == pytest.approx(expected(sent), abs=1e-4)
    assert sorted(seeds for _, _, seeds in unet.seen) == [(10, 11), (12,), (13, 14)]
    assert (answer.batch, answer.model_digest) == (2, "d")
    await returned(sender)
    sender.close()


async def test_of_one_image_that_is_too_large_the_receiver_says_so() -> None:
    unet = UNet(FAR, limit=100)
    sender = Sender(unet, HERE, 0, 100)
    with pytest.raises(Overloaded, match="at most 100"):
        await send(sender, residuals())
    sender.close()


async def test_another_refusal_is_passed_on() -> None:
    class Strict(UNet):
        async def _answer(self, address: Address, encoded: bytes) -> bytes:
            self.seen.append((address, "refused", ()))
            raise InvalidRequest("shared.shapes[0]", [1], "[2]")

    unet = Strict(NEAR)
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    with pytest.raises(InvalidRequest, match=r"shared\.shapes\[0\]"):
        await send(sender, residuals())
    assert len(unet.seen) == 1
    await returned(sender)
    sender.close()


async def test_a_caller_who_leaves_while_the_unet_computes_gives_the_loan_back() -> None:
    unet = UNet(NEAR)
    unet.hold = asyncio.Event()
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    calling = asyncio.create_task(send(sender, residuals()))
    await unet.reached.wait()
    assert free(sender) != [(0, 1 << 16)]
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await returned(sender)
    sender.close()


async def test_a_loan_is_nobody_elses_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller leaves while the copy is being made: its thread goes on, so the piece is kept until it has ended."""
    begun, go_on = threading.Event(), threading.Event()
    write = SharedLoan.write

    def slowly(loan: SharedLoan, *sent: Residuals) -> None:
        begun.set()
        assert go_on.wait(10)
        write(loan, *sent)

    monkeypatch.setattr(SharedLoan, "write", slowly)
    unet = UNet(NEAR)
    sender = Sender(unet, HERE, 1 << 16, 1 << 30)
    calling = asyncio.create_task(send(sender, residuals()))
    await asyncio.to_thread(begun.wait, 10)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await asyncio.sleep(0.05)
    assert free(sender) != [(0, 1 << 16)]
    go_on.set()
    await returned(sender)
    assert unet.seen == []
    sender.close()


async def test_many_at_once_do_not_write_over_each_other() -> None:
    """More than there is room for: some shared, some in messages, each with its own sums."""
    unet = UNet(NEAR)
    sender = Sender(unet, HERE, 4096, 1 << 30)
    rng = np.random.default_rng(5)
    many = [Residuals(tuple(rng.standard_normal(shape, np.float32) for shape in SHAPES)) for _ in range(40)]
    answers = await asyncio.gather(*(send(sender, each) for each in many))
    for answer, sent in zip(answers, many, strict=True):
        assert sums(answer) == pytest.approx(expected(sent), abs=1e-4)
    assert sender.sent["shared"] > 0 and sender.sent["inline"] > 0 and sender.sent.total() == 40
    await returned(sender, 4096)
    sender.close()


# Residuals that are on a device; the host's memory stands in for it.


def on_device(sent: Residuals) -> Residuals:
    return Residuals(tuple(map(torch.from_numpy, sent.parts)))


@pytest.fixture
def lender() -> DeviceLender:
    return DeviceLender(HostMemory(), torch.float32, 4096)


async def all_returned(lender: DeviceLender) -> None:
    async with asyncio.timeout(5):
        while lender._extents._free != [(0, 4096)]:  # noqa: ASYNC110 - given back by a callback
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("addresses", "blind", "ways"),
    [
        ([NEAR], [], ["device", "device"]),
        ([NEAR], ["device"], ["device", "shared", "shared"]),
        ([NEAR], ["device", "shared"], ["device", "shared", "inline", "inline"]),
        ([FAR], [], ["inline", "inline"]),
    ],
    ids=["it can", "it cannot", "it can read no memory", "another node"],
)
async def test_residuals_on_a_device_go_the_fastest_way_there_is(
    lender: DeviceLender, addresses: list[Address], blind: list[str], ways: list[str]
) -> None:
    unet = UNet(*addresses, blind=blind)
    sender = Sender(unet, HERE, 1 << 16, 1 << 30, lender)
    sent = residuals()
    for _ in range(2):
        assert sums(await send(sender, on_device(sent))) == pytest.approx(expected(sent), abs=1e-4)
        await returned(sender)
        await all_returned(lender)
    assert [way for _, way, _ in unet.seen] == ways
    assert sender.sent.total() == len(ways)
    sender.close()


async def test_what_the_device_has_no_room_for_goes_by_the_host(lender: DeviceLender) -> None:
    unet = UNet(NEAR)
    sender = Sender(unet, HERE, 1 << 16, 1 << 30, lender)
    large = Residuals((np.ones((2, 600, 1, 1), np.float32),))
    assert sums(await send(sender, on_device(large))) == [600, 600]
    assert sender.sent == {"shared": 1}
    assert sums(await send(sender, residuals())) == pytest.approx(expected(residuals()), abs=1e-4)
    assert sender.sent == {"shared": 2}, "those on the host do not go to the device"
    sender.close()


async def test_a_second_try_elsewhere_gets_what_is_on_the_device_by_the_host(lender: DeviceLender) -> None:
    unet = UNet(NEAR, FAR)
    unet.dead = {NEAR}
    sender = Sender(unet, HERE, 1 << 16, 1 << 30, lender)
    sent = residuals()
    assert sums(await send(sender, on_device(sent))) == pytest.approx(expected(sent), abs=1e-4)
    assert unet.seen == [(FAR, "inline", (7, 8))]
    sender.close()


async def test_what_is_on_a_device_and_too_large_for_a_message_goes_in_halves(lender: DeviceLender) -> None:
    sent = residuals(4)
    limit = (1 << 20) + 2 * sum(part[:1].nbytes for part in sent.parts)
    unet = UNet(FAR, limit=limit)
    sender = Sender(unet, HERE, 1 << 16, limit, lender)
    assert sums(await send(sender, on_device(sent), [1, 2, 3, 4])) == pytest.approx(expected(sent), abs=1e-4)
    assert sorted(seeds for _, _, seeds in unet.seen) == [(1, 2), (3, 4)]
    await all_returned(lender)
    sender.close()


async def test_many_at_once_on_a_device_do_not_write_over_each_other(lender: DeviceLender) -> None:
    unet = UNet(NEAR)
    sender = Sender(unet, HERE, 4096, 1 << 30, lender)
    rng = np.random.default_rng(5)
    many = [Residuals(tuple(rng.standard_normal(shape, np.float32) for shape in SHAPES)) for _ in range(40)]
    answers = await asyncio.gather(*(send(sender, on_device(each)) for each in many))
    for answer, sent in zip(answers, many, strict=True):
        assert sums(answer) == pytest.approx(expected(sent), abs=1e-4)
    assert sender.sent["device"] > 0 and sender.sent.total() == 40
    await returned(sender, 4096)
    await all_returned(lender)
    sender.close()


async def test_a_caller_who_leaves_gives_the_devices_memory_back(lender: DeviceLender) -> None:
    unet = UNet(NEAR)
    unet.hold = asyncio.Event()
    sender = Sender(unet, HERE, 1 << 16, 1 << 30, lender)
    calling = asyncio.create_task(send(sender, on_device(residuals())))
    await unet.reached.wait()
    assert lender._extents._free != [(0, 4096)]
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await all_returned(lender)
    sender.close()
