"""Memory where networks compute, allocated by one process and opened by another on the same node: of a GPU, or the host's.

Knows bytes; which piece holds what is services.fabric.device_handover's. Imports torch.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sdxs.v1 import unet_pb2
from services.fabric.lending import map_sealed, sealed_memory


@dataclass(frozen=True)
class Slab:
    """Memory of this process that others can open, and what tells them where it is: `pid` and `memory` of a DeviceResiduals."""

    bytes: torch.Tensor
    place: unet_pb2.DeviceResiduals
    close: Callable[[], None] = lambda: None
    """Nobody opens it any more."""


class DeviceMemory(Protocol):
    """One device's."""

    device: torch.device

    def allocate(self, size: int) -> Slab:
        """So many bytes. Raises OSError, RuntimeError when there is no room, or no way to share it."""
        ...

    def open(self, place: unet_pb2.DeviceResiduals) -> torch.Tensor:
        """The bytes of another process's slab, as long as the tensor is held. Raises OSError, RuntimeError when they are out of reach."""
        ...

    def apart(self) -> AbstractContextManager[None]:
        """What is done inside waits for no network's work on the device, and is done when the context ends."""
        ...


class HostMemory:
    """A sealed anonymous file, as services.fabric.handover has it: what a device's memory is to networks on a CPU."""

    device = torch.device("cpu")

    def allocate(self, size: int) -> Slab:
        """See DeviceMemory."""
        fd = sealed_memory(size, "sdxs-device")
        place = unet_pb2.DeviceResiduals(pid=os.getpid(), host=unet_pb2.HostMemory(fd=fd))
        return Slab(torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8), place, lambda: os.close(fd))

    def open(self, place: unet_pb2.DeviceResiduals) -> torch.Tensor:
        """See DeviceMemory."""
        if not place.HasField("host"):
            raise OSError("it is not the host's")
        # Copy on write: torch has no tensors that are read-only, and the lender's bytes stay its own.
        return torch.frombuffer(map_sealed(place.pid, place.host.fd, mmap.ACCESS_COPY), dtype=torch.uint8)

    def apart(self) -> AbstractContextManager[None]:
        """See DeviceMemory."""
        return nullcontext()


class CudaMemory:
    """A GPU's, by CUDA's inter-process handles as torch.multiprocessing uses them (torch/multiprocessing/reductions.py).

    A process cannot open its own; the device of another's must be among those it sees.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index or 0)
        self._stream: Any = torch.cuda.Stream(self.device)

    def allocate(self, size: int) -> Slab:
        """See DeviceMemory."""
        found = torch.empty(size, dtype=torch.uint8, device=self.device)
        storage: Any = found.untyped_storage()
        with torch.cuda.device(self.device):
            _, handle, nbytes, offset, counter, counter_offset, *_ = storage._share_cuda_()
        cuda = unet_pb2.CudaMemory(
            device_uuid=_uuid(self.device.index),
            handle=handle,
            size=nbytes,
            offset=offset,
            ref_counter_handle=counter,
            ref_counter_offset=counter_offset,
        )
        return Slab(found, unet_pb2.DeviceResiduals(pid=os.getpid(), cuda=cuda))

    def open(self, place: unet_pb2.DeviceResiduals) -> torch.Tensor:
        """See DeviceMemory. Costs milliseconds, so once for all loans of a slab."""
        cuda = place.cuda
        index = next((i for i in range(torch.cuda.device_count()) if _uuid(i) == cuda.device_uuid), None)
        if index is None:
            raise OSError(f"no GPU {cuda.device_uuid or 'at all'} is seen here")
        untyped: Any = torch.UntypedStorage
        with torch.cuda.device(index):
            storage = untyped._new_shared_cuda(
                index,
                cuda.handle,
                cuda.size,
                cuda.offset,
                cuda.ref_counter_handle,
                cuda.ref_counter_offset,
                b"",
                False,  # no event to wait for
            )
            return torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}").set_(storage)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """See DeviceMemory. A stream of its own: on the networks' it would queue behind the next batch."""
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


def _uuid(index: int) -> str:
    """Of the GPU itself, whatever number it has here."""
    return str(torch.cuda.get_device_properties(index).uuid)
