"""A device's memory lent between processes: what the other reads, when it lets go, and what is refused.

The same tests on the host's memory, which stands in for a device's here, and on a GPU where there is one.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import tensor_pb2, unet_pb2
from services.fabric import device_handover
from services.fabric.device_handover import DeviceBorrower, DeviceLender, borrower_of, lender_of
from services.fabric.device_memory import CudaMemory, DeviceMemory, HostMemory
from services.settings import ServingSettings
from tests.descriptors import descriptors

SHAPES: list[tuple[int, ...]] = [(2, 3, 4, 5), (2, 1, 2, 2), (2, 7, 1, 1)]
SIZE = 1 << 16
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def memory_on(kind: str) -> DeviceMemory:
    return CudaMemory(torch.device("cuda")) if kind == "cuda" else HostMemory()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def memory(request: pytest.FixtureRequest) -> DeviceMemory:
    return memory_on(request.param)


def numbers(device: torch.device, start: float = 0) -> list[Residuals]:
    """Of two images, float32 on the device."""
    rng = np.random.default_rng(7)
    parts = [torch.from_numpy(rng.standard_normal(shape, np.float32)) + start for shape in SHAPES]
    return Residuals(tuple(part.to(device) for part in parts)).rows()


def same(found: Residuals, device: torch.device, dtype: torch.dtype, start: float = 0) -> bool:
    """Whether they are those numbers, rounded to the type."""
    sent = Residuals.stack(numbers(device, start), numbers(device)[0])
    return all(
        part.dtype == dtype and torch.equal(part, expected.to(dtype))
        for part, expected in zip(found.parts, sent.parts, strict=True)
    )


CHILD = """
import sys, torch
from services.fabric.device_handover import DeviceLender
from tests.unit.test_device_handover import SHAPES, SIZE, memory_on, numbers
memory = memory_on(sys.argv[1])
lender = DeviceLender(memory, getattr(torch, sys.argv[2]), SIZE)
first = lender.lend([(5,)])
loan = lender.lend(SHAPES)
loan.write(*numbers(memory.device))
print(loan.message.SerializeToString().hex(), flush=True)
for line in sys.stdin:
    loan.write(*numbers(memory.device, start=float(line)))
    print("written", flush=True)
"""


class Other:
    """A lender in a process of its own, which writes, and writes again when told."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        command = [sys.executable, "-c", CHILD, device.type, str(dtype).removeprefix("torch.")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.message = unet_pb2.DeviceResiduals.FromString(bytes.fromhex(self._line()))

    def write(self, start: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{start}\n")
        self.process.stdin.flush()
        assert self._line() == "written"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def other(memory: DeviceMemory) -> Iterator[Callable[[torch.dtype], Other]]:
    started: list[Other] = []

    def start(dtype: torch.dtype) -> Other:
        started.append(Other(memory.device, dtype))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def lender(memory: DeviceMemory) -> Iterator[DeviceLender]:
    lender = DeviceLender(memory, torch.float16, SIZE)
    yield lender
    lender.close()


@pytest.fixture
def borrower(memory: DeviceMemory) -> Iterator[DeviceBorrower]:
    borrower = DeviceBorrower(memory, torch.float16)
    yield borrower
    borrower.close()


def maps() -> int:
    """How many mappings of this process are of such memory; of a GPU's, none."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("sdxs-device")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_process_reads_what_another_wrote(
    memory: DeviceMemory, other: Callable[[torch.dtype], Other], dtype: torch.dtype
) -> None:
    lending, borrower, before = other(dtype), DeviceBorrower(memory, dtype), maps()
    assert lending.message.pid == lending.process.pid != os.getpid()
    found = borrower.read(lending.message)
    assert same(found, memory.device, dtype)
    lending.write(100)
    assert same(found, memory.device, dtype), "a copy: the loan may end"
    assert same(borrower.read(lending.message), memory.device, dtype, start=100)
    borrower.close()
    assert maps() == before


def test_memory_is_opened_once(
    memory: DeviceMemory, other: Callable[[torch.dtype], Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By several threads at a time, and again after a loan of other shapes."""
    opened: list[int] = []
    open_it = type(memory).open

    def count(self: DeviceMemory, place: unet_pb2.DeviceResiduals) -> torch.Tensor:
        opened.append(place.pid)
        return open_it(self, place)

    monkeypatch.setattr(type(memory), "open", count)
    lending, borrower = other(torch.float16), DeviceBorrower(memory, torch.float16)
    threads = [threading.Thread(target=borrower.read, args=(lending.message,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = descriptors()
    for _ in range(200):
        borrower.read(lending.message)
    assert opened == [lending.process.pid]
    assert descriptors() <= before
    borrower.close()
    assert any("pidfd" in target for _, target in before - descriptors()), "the handle of its process"


def test_memory_of_a_dead_lender_is_dropped(
    memory: DeviceMemory, other: Callable[[torch.dtype], Other], borrower: DeviceBorrower
) -> None:
    first, second, before = other(torch.float16), other(torch.float16), maps()
    found = borrower.read(first.message)
    first.kill()
    assert same(found, memory.device, torch.float16), "what was read stays"
    assert same(borrower.read(second.message), memory.device, torch.float16), "another lender is read all the same"
    with pytest.raises(InvalidRequest) as caught:
        borrower.read(first.message)
    assert caught.value.field == "device"
    second.kill()
    with pytest.raises(InvalidRequest):
        borrower.read(second.message)
    assert maps() == before
    assert borrower._opened._found == {}


def test_a_killed_lender_leaves_nothing_behind(memory: DeviceMemory, other: Callable[[torch.dtype], Other]) -> None:
    before = set(Path("/dev/shm").iterdir())
    lending = other(torch.float16)
    lending.kill()
    if memory.device.type == "cpu":  # CUDA's reference counters are torch's files
        assert set(Path("/dev/shm").iterdir()) == before


def test_a_process_reads_its_own(memory: DeviceMemory, lender: DeviceLender, borrower: DeviceBorrower) -> None:
    """As when all rooms are in one: CUDA opens no handle of its own process."""
    loan = lender.lend(SHAPES)
    assert loan is not None
    loan.write(*numbers(memory.device))
    assert same(borrower.read(loan.message), memory.device, torch.float16)


def test_loans_end_and_their_room_is_lent_again(lender: DeviceLender) -> None:
    quarter = [(SIZE // 4 // 2,)]  # float16
    loans = [lender.lend(quarter) for _ in range(4)]
    assert lender.lend(quarter) is None
    assert loans[2] is not None
    loans[2].end()
    again = lender.lend(quarter)
    assert again is not None
    assert again.message.offset == loans[2].message.offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_type_is_refused(memory: DeviceMemory, lender: DeviceLender, dtype: torch.dtype) -> None:
    """A U-Net that computes in more bits would get numbers rounded to fewer."""
    loan, borrower = lender.lend([(4,)]), DeviceBorrower(memory, dtype)
    assert loan is not None
    loan.message.element_type = 99  # type: ignore[assignment]  # one that is not known yet
    for value in (99, tensor_pb2.ELEMENT_TYPE_FLOAT16):
        loan.message.element_type = value  # type: ignore[assignment]
        with pytest.raises(InvalidRequest) as caught:
            borrower.read(loan.message)
        assert caught.value.field == "device"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6], ids=["nan", "infinite", "beyond float16"])
def test_numbers_that_are_not_finite_are_named(
    memory: DeviceMemory, lender: DeviceLender, borrower: DeviceBorrower, value: float
) -> None:
    loan = lender.lend(SHAPES)
    assert loan is not None
    rows = numbers(memory.device)
    rows[1].parts[2][0, 3] = value
    loan.write(*rows)
    with pytest.raises(InvalidRequest) as caught:
        borrower.read(loan.message)
    assert caught.value.field == "device.shapes[2]"


Edit = Callable[[unet_pb2.DeviceResiduals], object]
STRANGE: dict[str, Edit] = {
    "another nonce": lambda message: setattr(message, "nonce", bytes(16)),
    "half a nonce": lambda message: setattr(message, "nonce", message.nonce[:8]),
    "no nonce": lambda message: message.ClearField("nonce"),
    "nobody's process": lambda message: setattr(message, "pid", 2**22 + 1),
    "process zero": lambda message: setattr(message, "pid", 0),
    "no process": lambda message: setattr(message, "pid", 2**32 - 1),
    "no memory": lambda message: message.CopyFrom(
        unet_pb2.DeviceResiduals(pid=message.pid, nonce=message.nonce, offset=message.offset, shapes=message.shapes)
    ),
    "a closed file": lambda message: setattr(message.host, "fd", 100_000),
    "standard input": lambda message: setattr(message.host, "fd", 0),
    "another GPU": lambda message: setattr(message.cuda, "device_uuid", "GPU-0"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("edit", STRANGE.values(), ids=STRANGE.keys())
def test_memory_that_is_no_lenders_is_refused(
    memory: DeviceMemory, other: Callable[[torch.dtype], Other], borrower: DeviceBorrower, edit: Edit
) -> None:
    message, before = other(torch.float16).message, descriptors()
    edit(message)
    with pytest.raises(InvalidRequest) as caught:
        borrower.read(message)
    assert caught.value.field == "device"
    assert descriptors() <= before or memory.device.type != "cpu"  # CUDA opens files of its own
    assert borrower._opened._found == {}


@pytest.mark.parametrize(
    ("offset", "shapes"),
    [
        (0, [[4]]),  # the nonce
        (256 + 1, [[4]]),
        (256 + SIZE - 6, [[4]]),
        (256, [[2**32 - 1] * 8]),
        (2**63, [[4]]),
        (256, []),
        (256, [[]]),
        (256, [[1] * 9]),
        (256, [[1]] * 65),
    ],
)
def test_arrays_that_do_not_lie_in_the_memory_are_refused(
    lender: DeviceLender, borrower: DeviceBorrower, offset: int, shapes: list[list[int]]
) -> None:
    loan = lender.lend([(4,)])
    assert loan is not None
    message = loan.message
    message.offset = offset
    del message.shapes[:]
    message.shapes.extend(unet_pb2.Shape(sizes=sizes) for sizes in shapes)
    with pytest.raises(InvalidRequest) as caught:
        borrower.read(message)
    assert caught.value.field == "device"


def test_settings_say_whether_residuals_stay_on_the_device() -> None:
    def either(**values: object) -> tuple[bool, bool]:
        settings = ServingSettings.model_validate({"torch_device": "cpu", **values})
        lender, borrower = lender_of(settings), borrower_of(settings)
        if lender is not None:
            lender.close()
        return lender is not None, borrower is not None

    assert either() == either(handover_device="never") == (False, False)
    assert either(handover_device="always") == (True, True)
    assert either(handover_device="always", handover_bytes=0) == (False, True)
    with pytest.raises(InvalidRequest, match="SDXS_HANDOVER_DEVICE"):
        ServingSettings(handover_device="sometimes")


def test_a_lender_without_room_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DeviceMemory, size: int) -> None:
        raise torch.OutOfMemoryError(f"{size} bytes")

    monkeypatch.setattr(HostMemory, "allocate", full)
    assert lender_of(ServingSettings(torch_device="cpu", handover_device="always")) is None


@CUDA
def test_a_loan_is_written_while_the_networks_stream_is_busy() -> None:
    """Writing waits for no work of theirs that was begun after the residuals."""
    memory = CudaMemory(torch.device("cuda"))
    lender, borrower = DeviceLender(memory, torch.float32, 1 << 20), DeviceBorrower(memory, torch.float32)
    loan, rows, busy = lender.lend(SHAPES), numbers(memory.device), torch.cuda.Event()
    assert loan is not None
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy.record()
    loan.write(*rows)
    found = borrower.read(loan.message)
    assert not busy.query(), "it waited"
    torch.cuda.synchronize()
    assert same(found, memory.device, torch.float32)
    lender.close()
    borrower.close()


def test_slabs_of_this_process_are_forgotten_with_their_lender(memory: DeviceMemory) -> None:
    lender = DeviceLender(memory, torch.float32, 64)
    assert lender._nonce in device_handover._own
    lender.close()
    assert lender._nonce not in device_handover._own
