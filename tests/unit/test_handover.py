"""Memory shared between processes: pieces of it, what two processes see, and what is refused."""

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import unet_pb2
from services.fabric.handover import Borrower, Lender, _open
from services.fabric.lending import Extents
from tests.descriptors import descriptors

SHAPES: list[tuple[int, ...]] = [(2, 3, 4, 5), (2, 1, 2, 2), (2, 7, 1, 1)]
SIZE = 1 << 16


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 30)), max_size=60))
def test_pieces_never_overlap_and_all_come_back(moves: list[tuple[int, int]]) -> None:
    """Against a map of bytes, one owner each."""
    size = 4096
    extents, owner, taken = Extents(size), np.zeros(size, int), dict[int, int]()
    for number, (wanted, back) in enumerate(moves, start=1):
        offset = extents.take(wanted)
        if offset is None:
            needed = max(1, math.ceil(wanted / 64)) * 64
            free = "".join("x" if each else "." for each in owner)
            assert "." * needed not in free, "there was room"
        else:
            piece = owner[offset : offset + max(wanted, 1)]
            assert offset % 64 == 0 and len(piece) == max(wanted, 1) and not piece.any()
            owner[offset : offset + max(1, math.ceil(wanted / 64)) * 64] = number
            taken[offset] = number
        if taken and back < len(taken):
            gone = list(taken)[back]
            extents.give(gone)
            owner[owner == taken.pop(gone)] = 0
    for offset in taken:
        extents.give(offset)
    assert extents.take(size) == 0, "all in one piece again"


def test_a_piece_is_given_back_once() -> None:
    extents = Extents(256)
    offset = extents.take(10)
    assert offset is not None
    extents.give(offset)
    with pytest.raises(KeyError):
        extents.give(offset)


@pytest.fixture
def lender() -> Iterator[Lender]:
    lender = Lender(SIZE)
    yield lender
    lender.close()


@pytest.fixture
def borrower() -> Iterator[Borrower]:
    borrower = Borrower()
    yield borrower
    borrower.close()


def numbers(shapes: list[tuple[int, ...]], start: float = 0) -> Residuals:
    rng = np.random.default_rng(7)
    return Residuals(tuple(rng.standard_normal(shape, np.float32) + np.float32(start) for shape in shapes))


def test_loans_end_and_their_room_is_lent_again(lender: Lender, borrower: Borrower) -> None:
    quarter = [(SIZE // 4 // 4,)]
    loans = [lender.lend(quarter) for _ in range(4)]
    assert lender.lend(quarter) is None
    assert loans[2] is not None
    loans[2].end()
    again = lender.lend(quarter)
    assert again is not None
    assert again.message.offset == loans[2].message.offset
    again.write(Residuals((np.full(quarter[0], 3, np.float32),)))
    assert borrower.read(again.message).parts[0].tolist() == [3.0] * quarter[0][0]


CHILD = """
import sys, numpy as np
from sdxs.residuals import Residuals
from services.fabric.handover import Lender
from tests.unit.test_handover import SHAPES, SIZE, numbers
lender = Lender(SIZE)
first = lender.lend([(5,)])
loan = lender.lend(SHAPES)
loan.write(numbers(SHAPES))
sys.stdout.buffer.write(loan.message.SerializeToString().hex().encode() + b"\\n")
sys.stdout.flush()
sys.stdin.readline()
loan.write(numbers(SHAPES, start=100))
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other_process() -> "Iterator[subprocess.Popen[bytes]]":
    """A lender in a process of its own, which writes, and writes again when told."""
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def lent(process: "subprocess.Popen[bytes]") -> unet_pb2.SharedResiduals:
    assert process.stdout is not None
    return unet_pb2.SharedResiduals.FromString(bytes.fromhex(process.stdout.readline().decode()))


def maps(word: str = "sdxs-residuals") -> int:
    """How many mappings of this process are of such memory."""
    return Path("/proc/self/maps").read_text().count(word)


def test_one_process_reads_what_another_wrote(other_process: "subprocess.Popen[bytes]", borrower: Borrower) -> None:
    message, before = lent(other_process), maps()
    assert message.pid == other_process.pid != os.getpid()
    first = borrower.read(message)
    for part, expected in zip(first.parts, numbers(SHAPES).parts, strict=True):
        np.testing.assert_array_equal(part, expected)
    assert not first.parts[0].flags.writeable
    assert other_process.stdin is not None and other_process.stdout is not None
    other_process.stdin.write(b"\n")
    other_process.stdin.flush()
    assert other_process.stdout.readline() == b"written\n"
    second = borrower.read(message)
    assert np.shares_memory(first.parts[0], second.parts[0]), "mapped once"
    np.testing.assert_array_equal(second.parts[2], numbers(SHAPES, start=100).parts[2])
    assert maps() == before + 1


def test_memory_of_a_dead_lender_is_dropped_once_nobody_reads_it(
    other_process: "subprocess.Popen[bytes]", borrower: Borrower, lender: Lender
) -> None:
    message, before, opened = lent(other_process), maps(), descriptors()
    views = borrower.read(message)
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.wait(10)
    np.testing.assert_array_equal(views.parts[0], numbers(SHAPES).parts[0])  # what is being read stays
    with pytest.raises(InvalidRequest) as caught:
        borrower.read(message)
    assert caught.value.field == "shared"
    del views
    assert maps() == before
    assert descriptors() <= opened


def test_reading_a_thousand_times_holds_one_file(lender: Lender, borrower: Borrower) -> None:
    loan = lender.lend([(4,)])
    assert loan is not None
    borrower.read(loan.message)
    before = descriptors()
    for _ in range(1000):
        borrower.read(loan.message)
    assert descriptors() <= before
    borrower.close()
    assert len(before - descriptors()) == 2, "its file and the handle of its process"


def test_nobody_can_change_the_size_of_lent_memory(lender: Lender) -> None:
    loan = lender.lend([(4,)])
    assert loan is not None
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(loan.message.fd, size)


@contextlib.contextmanager
def memory(seal: bool, content: bytes) -> Iterator[int]:
    """Memory of this process that is not a lender's."""
    import fcntl

    fd = os.memfd_create("stranger", os.MFD_ALLOW_SEALING)
    os.write(fd, content.ljust(SIZE, b"\0"))
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield fd
    os.close(fd)


NONCE = bytes(range(16))


@pytest.mark.parametrize(
    ("seal", "content", "nonce"),
    [(False, NONCE, NONCE), (True, bytes(16), NONCE), (True, b"", b""), (True, NONCE, NONCE[:8])],
    ids=["might shrink", "another nonce", "no nonce", "half a nonce"],
)
def test_memory_that_is_no_lenders_is_refused(borrower: Borrower, seal: bool, content: bytes, nonce: bytes) -> None:
    before = descriptors()
    message = unet_pb2.SharedResiduals(pid=os.getpid(), nonce=nonce, offset=4096, shapes=[unet_pb2.Shape(sizes=[4])])
    with memory(seal, content) as message.fd, pytest.raises(InvalidRequest) as caught:
        borrower.read(message)
    assert caught.value.field == "shared"
    assert descriptors() <= before


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["nobody's process", "ourselves, by zero", "closed", "fifo", "file", "far too large"])
def test_a_strangers_numbers_are_refused(borrower: Borrower, tmp_path: Path, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        os.mkfifo(tmp_path / "fifo")
        reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)  # opened without, it is waited for
        stack.callback(os.close, reading)
        plain = stack.enter_context((tmp_path / "file").open("w+b"))
        plain.write(NONCE.ljust(SIZE, b"\0"))
        plain.flush()
        strangers = {
            "nobody's process": (2**22 + 1, 3),
            "ourselves, by zero": (0, 3),
            "closed": (os.getpid(), 100_000),
            "fifo": (os.getpid(), reading),
            "file": (os.getpid(), plain.fileno()),
            "far too large": (2**32 - 1, 2**32 - 1),
        }
        pid, fd = strangers[kind]
        before = descriptors()
        with pytest.raises(InvalidRequest) as caught:
            borrower.read(unet_pb2.SharedResiduals(pid=pid, fd=fd, nonce=NONCE, shapes=[unet_pb2.Shape(sizes=[1])]))
        assert caught.value.field == "shared"
        assert descriptors() <= before


@pytest.mark.parametrize(
    ("offset", "shapes"),
    [
        (0, [[4]]),  # the nonce
        (4096 + 2, [[4]]),
        (4096 + SIZE - 12, [[4]]),
        (4096, [[2**32 - 1] * 8]),
        (2**63, [[4]]),
        (4096, []),
        (4096, [[]]),
        (4096, [[1] * 9]),
        (4096, [[1]] * 65),
    ],
)
def test_arrays_that_do_not_lie_in_the_memory_are_refused(
    lender: Lender, borrower: Borrower, offset: int, shapes: list[list[int]]
) -> None:
    loan = lender.lend([(4,)])
    assert loan is not None
    message = loan.message
    message.offset = offset
    del message.shapes[:]
    message.shapes.extend(unet_pb2.Shape(sizes=sizes) for sizes in shapes)
    with pytest.raises(InvalidRequest) as caught:
        borrower.read(message)
    assert caught.value.field == "shared"


def test_what_was_lent_outlives_the_lender_where_it_is_read(borrower: Borrower) -> None:
    lender = Lender(SIZE)
    loan = lender.lend(SHAPES)
    assert loan is not None
    loan.write(numbers(SHAPES))
    views = borrower.read(loan.message)
    lender.close()
    np.testing.assert_array_equal(views.parts[1], numbers(SHAPES).parts[1])
    with pytest.raises(FileNotFoundError):
        _open(loan.message)
