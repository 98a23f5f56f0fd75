"""A disk that is full for a stage's state or its result, though not for the lines of its curve: said as what it is."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from trainer.disk import full_disk
from trainer.loop import Stage, load_state, save_state
from trainer.optimisation import Trainable
from trainer.schedule import Schedule
from trainer.worker import _final


class Wide(Stage):
    """As wide as it is told: weights and moments of 48 kB, or of 1.2 MB."""

    def __init__(self, width: int) -> None:
        self.steps = 1
        self.trainables = {"net": Trainable(nn.Linear(width, 10), Schedule(1, 1e-3))}
        self.step(0)

    def step(self, index: int) -> dict[str, torch.Tensor | float]:
        trainable = self.trainables["net"]
        inputs = torch.ones(1, trainable.network.get_parameter("weight").shape[1])
        return {"norm": trainable.update(trainable.network(inputs).square().mean(), index)}

    def export(self, folder: Path) -> None:
        save_file(dict(self.trainables["net"].network.state_dict()), folder / "net.safetensors")


SMALL, BIG = 400, 10_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def room_for_the_curve(disk: Path) -> bool:
    (disk / "log.jsonl").write_text('{"step": 10, "loss": 0.5}\n' * 40)
    return True


def test_a_state_without_room_is_said_and_the_one_before_it_stays(disk: Path) -> None:
    save_state(Wide(SMALL), 1, disk / "state.pt")
    with pytest.raises(OSError, match="No space left") as caught:
        save_state(Wide(BIG), 2, disk / "state.pt")
    reason = _final(caught.value)
    assert reason is not None and reason.startswith("no space left on ") and "unexpected pos" not in reason
    assert room_for_the_curve(disk)
    assert {path.name for path in disk.iterdir()} == {"state.pt", "log.jsonl"}  # no half of it is in the way
    assert load_state(Wide(SMALL), disk / "state.pt") == 1


def test_a_result_without_room_is_said(disk: Path) -> None:
    with pytest.raises(SafetensorError) as caught:
        Wide(BIG).export(disk)
    assert (_final(caught.value) or "").startswith("no space left on ")
    assert room_for_the_curve(disk)


def test_a_device_that_is_always_full_needs_no_small_disk(tmp_path: Path) -> None:
    (tmp_path / "state.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_state(Wide(BIG), 1, tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()


def raised_over(error: OSError) -> Exception:
    """What a library raises while it handles another error, as torch's writer does."""
    try:
        try:
            raise error
        except OSError:
            raise RuntimeError("unexpected pos 576 vs 534")  # noqa: B904 - that is what it does
    except RuntimeError as found:
        return found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disks_and_quotas_are_told_from_other_faults(number: int) -> None:
    said = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    for error in (OSError(number, "full"), raised_over(OSError(number, "full")), SafetensorError(said)):
        found = full_disk(error)
        assert found is not None and found.errno == number
    for other in (OSError(errno.EIO, "broken"), raised_over(OSError(errno.EIO, "broken")), RuntimeError(said)):
        assert full_disk(other) is None
        assert _final(other) is None
    assert full_disk(SafetensorError("Error while deserializing header: (os error 2)")) is None
