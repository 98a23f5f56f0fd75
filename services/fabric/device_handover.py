"""Residuals from the process that computes them to the one that adds them, on the device both compute on: no way by the host.

The lender allocates one slab of the device's memory, once, and lends pieces of it; the borrower opens the slab, once, and copies out
what a message tells of. A loan lasts as long as the call, as in shared memory: no handle is opened and no reference counted per message.
The values are in the type that the networks compute in, to which the U-Net would round them next: no bit is lost.

Knows tensors and processes; how memory is shared is services.fabric.device_memory's. Imports torch.
"""

import logging
import math
import secrets
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.stages import place
from sdxs.v1 import tensor_pb2, unet_pb2
from services.fabric.device_memory import CudaMemory, DeviceMemory, HostMemory
from services.fabric.lending import NONCE_BYTES, Extents, Opened, check_lies, out_of_reach
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_HEADER = 256  # bytes; holds the nonce
_TYPES = {
    torch.float32: tensor_pb2.ELEMENT_TYPE_FLOAT32,
    torch.float16: tensor_pb2.ELEMENT_TYPE_FLOAT16,
    torch.bfloat16: tensor_pb2.ELEMENT_TYPE_BFLOAT16,
}
_UNREACHABLE = (OSError, OverflowError, RuntimeError, ValueError)

_own: "weakref.WeakValueDictionary[bytes, torch.Tensor]" = weakref.WeakValueDictionary()
"""Slabs of this process, by nonce: CUDA opens none of its own."""


def memory_of(settings: ServingSettings) -> DeviceMemory | None:
    """Where networks compute by these settings; None: residuals are to go by way of the host."""
    device, _ = place(settings)
    if settings.handover_device == "never":
        return None
    if device.type == "cuda":
        return CudaMemory(device)
    return HostMemory() if settings.handover_device == "always" else None


def lender_of(settings: ServingSettings) -> "DeviceLender | None":
    """None where nothing is to be lent on the device, or nothing can be."""
    memory, (_, dtype) = memory_of(settings), place(settings)
    if memory is None or not settings.handover_bytes:
        return None
    try:
        return DeviceLender(memory, dtype, settings.handover_bytes)
    except _UNREACHABLE as error:
        logger.warning("no memory to lend on %s: %s; residuals go by way of the host", memory.device, error)
        return None


def borrower_of(settings: ServingSettings) -> "DeviceBorrower | None":
    """None where nothing is to be borrowed on the device."""
    memory, (_, dtype) = memory_of(settings), place(settings)
    return None if memory is None else DeviceBorrower(memory, dtype)


class DeviceLender:
    """A slab of the device's memory that others on the node may read.

    Args:
        dtype: that the residuals are added in.
        size: most bytes lent at a time, taken at once.

    Raises OSError, RuntimeError where there is no room, or no way to share it.
    """

    def __init__(self, memory: DeviceMemory, dtype: torch.dtype, size: int) -> None:
        self.memory, self.dtype = memory, dtype
        self._slab = memory.allocate(_HEADER + size)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        with memory.apart():
            self._slab.bytes[:NONCE_BYTES] = torch.tensor(list(self._nonce), dtype=torch.uint8)
        self._extents = Extents(size)
        _own[self._nonce] = self._slab.bytes

    def lend(self, shapes: Sequence[Sequence[int]]) -> "DeviceLoan | None":
        """See services.fabric.lending.Lends."""
        offset = self._extents.take(self.dtype.itemsize * sum(map(math.prod, shapes)))
        return None if offset is None else DeviceLoan(self, offset, shapes)

    def close(self) -> None:
        """No more loans. Borrowers keep what they have opened until they drop it."""
        _own.pop(self._nonce, None)
        self._slab.close()

    def _views(self, offset: int, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return _views(self._slab.bytes, _HEADER + offset, shapes, self.dtype)

    def _message(self, offset: int, shapes: Sequence[Sequence[int]]) -> unet_pb2.DeviceResiduals:
        found = unet_pb2.DeviceResiduals(nonce=self._nonce, offset=_HEADER + offset, element_type=_TYPES[self.dtype])
        found.MergeFrom(self._slab.place)
        found.shapes.extend(unet_pb2.Shape(sizes=shape) for shape in shapes)
        return found


class DeviceLoan:
    """See services.fabric.lending.Loan."""

    field: ClassVar[str] = "device"

    def __init__(self, lender: DeviceLender, offset: int, shapes: Sequence[Sequence[int]]) -> None:
        self._lender, self._offset, self._shapes = lender, offset, shapes
        self.message = lender._message(offset, shapes)

    def encoded(self) -> bytes:
        """See Loan."""
        return unet_pb2.DenoiseRequest(device=self.message).SerializeToString()

    @torch.inference_mode()
    def write(self, *residuals: Residuals) -> None:
        """See Loan. They must be computed by now; they are written when this returns."""
        views = self._lender._views(self._offset, self._shapes)
        with self._lender.memory.apart():
            for view, parts in zip(views, zip(*(each.parts for each in residuals), strict=True), strict=True):
                for room, part in zip(view.split([len(part) for part in parts]), parts, strict=True):
                    room.copy_(part)

    def end(self) -> None:
        """See Loan."""
        self._lender._extents.give(self._offset)


class DeviceBorrower:
    """Copies out what lenders on this node lend, to the device and in the type that this process computes in.

    Copies, because a batch also holds other callers' images: a lender that dies while the device reads from it must not take those along.
    """

    def __init__(self, memory: DeviceMemory, dtype: torch.dtype) -> None:
        self.memory, self.dtype = memory, dtype
        self._opened: Opened[torch.Tensor] = Opened()

    @torch.inference_mode()
    def read(self, message: unet_pb2.DeviceResiduals) -> Residuals:
        """Blocks until they are here. Any thread may call it.

        Raises:
            InvalidRequest: field `device`: the memory is out of reach, of another type, or the message does not fit it; one below
                `device.shapes`: numbers that are not finite.
        """
        if message.element_type != _TYPES[self.dtype]:
            raise InvalidRequest("device", _type_name(message.element_type), _type_name(_TYPES[self.dtype]))
        try:
            slab = self._opened.get(message.pid, message.nonce, lambda: self._open(message))
        except _UNREACHABLE as error:
            raise out_of_reach("device", message.pid, error) from error
        shapes = [tuple(shape.sizes) for shape in message.shapes]
        check_lies("device", message.offset, shapes, self.dtype.itemsize, range(_HEADER, len(slab)))
        with self.memory.apart():
            views = _views(slab, message.offset, shapes, self.dtype)
            # Allocated for this stream, used on the networks': safe, because who drops them has seen the batch's end.
            parts = [view.to(self.memory.device, copy=True) for view in views]
            finite = torch.stack([torch.isfinite(part).all() for part in parts]).tolist()
        if not all(finite):
            raise InvalidRequest(f"device.shapes[{finite.index(False)}]", "not a number or infinite", "finite numbers")
        return Residuals(tuple(parts))

    def close(self) -> None:
        """Drop all memory."""
        self._opened.close()

    def _open(self, message: unet_pb2.DeviceResiduals) -> torch.Tensor:
        """Raises OSError when it is not the memory the message names, and what opening it raises."""
        slab = _own.get(message.nonce)
        if slab is None:
            slab = self.memory.open(message)
        with self.memory.apart():
            head = slab[:NONCE_BYTES].tolist()
        if len(message.nonce) != NONCE_BYTES or bytes(head) != message.nonce:
            del slab  # else it is held as long as the error is
            raise OSError("another process has this handle here")
        return slab


def _views(slab: torch.Tensor, offset: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Arrays that lie one after the other in the slab."""
    views = []
    for shape in shapes:
        size = dtype.itemsize * math.prod(shape)
        views.append(slab[offset : offset + size].view(dtype).view(*shape))
        offset += size
    return views


def _type_name(element_type: Any) -> str:
    known = tensor_pb2.ElementType.values()
    return str(tensor_pb2.ElementType.Name(element_type)) if element_type in known else str(element_type)
