"""Residuals as they reach a U-Net replica: read on the device, from shared memory or from the message, and such as its network can add."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import unet_pb2
from services.fabric.handover import Borrower

if TYPE_CHECKING:
    from services.fabric.device_handover import DeviceBorrower

Shape = tuple[int, int, int]


class Receiver:
    """Checks them here, one request at a time: in the network they would fail the whole batch, other callers' images included.

    A residual may be [images, C, 1, 1] too: some ControlNets add means of their maps.

    Args:
        device: reads those that are on the device this U-Net computes on; None: they are refused.
    """

    def __init__(self, device: "DeviceBorrower | None" = None) -> None:
        self._borrower, self._device = Borrower(), device

    def close(self) -> None:
        """After the last call."""
        self._borrower.close()
        if self._device is not None:
            self._device.close()

    async def read(self, request: unet_pb2.DenoiseRequest, shapes: Sequence[Shape]) -> Sequence[Residuals | None]:
        """For each image of the request, of these shapes, (C, h, w) each. Raises InvalidRequest: field `device` or `shared` when they are
        in memory out of reach, else one below `device`, `shared` or `inline`."""
        which, count = request.WhichOneof("residuals"), len(request.seeds)
        if which is None:
            return [None] * count
        if which == "device":
            return (await self._copied(request.device, count, shapes)).rows()
        shared = which == "shared"
        found = self._borrowed(request.shared, count, shapes) if shared else _decoded(request.inline, count, shapes)
        await asyncio.to_thread(_check_numbers, found, "shared.shapes[{}]" if shared else "inline.parts[{}].data")
        return found.rows()

    async def _copied(self, message: unet_pb2.DeviceResiduals, count: int, shapes: Sequence[Shape]) -> Residuals:
        if self._device is None:
            raise InvalidRequest("device", f"process {message.pid}", "none: this replica reads no device's memory")
        _check_shapes("device.shapes", message.shapes, count, shapes)
        return await asyncio.to_thread(self._device.read, message)

    def _borrowed(self, message: unet_pb2.SharedResiduals, count: int, shapes: Sequence[Shape]) -> Residuals:
        _check_shapes("shared.shapes", message.shapes, count, shapes)
        return self._borrower.read(message)


def _decoded(message: unet_pb2.InlineResiduals, count: int, shapes: Sequence[Shape]) -> Residuals:
    _check_count("inline.parts", len(message.parts), len(shapes))
    parts = [tensors.decode(part, f"inline.parts[{i}]") for i, part in enumerate(message.parts)]
    for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        _check_shape(f"inline.parts[{i}].shape", part.shape, (count, *shape))
        if part.dtype != np.float32:
            raise InvalidRequest(f"inline.parts[{i}].element_type", str(part.dtype), "float32")
    return Residuals(tuple(parts))


def _check_shapes(field: str, found: Sequence[unet_pb2.Shape], count: int, shapes: Sequence[Shape]) -> None:
    _check_count(field, len(found), len(shapes))
    for i, (one, shape) in enumerate(zip(found, shapes, strict=True)):
        _check_shape(f"{field}[{i}]", tuple(one.sizes), (count, *shape))


def _check_shape(field: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found not in (expected, (*expected[:2], 1, 1)):
        raise InvalidRequest(field, list(found), str(list(expected)))


def _check_count(field: str, found: int, expected: int) -> None:
    if found != expected:
        raise InvalidRequest(field, found, f"{expected} residuals, as this U-Net adds")


def _check_numbers(residuals: Residuals, field: str) -> None:
    """Raises InvalidRequest, the part's place in `field`, for numbers that are not finite."""
    for i, part in enumerate(residuals.parts):
        if not np.isfinite(part).all():
            raise InvalidRequest(field.format(i), "not a number or infinite", "finite numbers")


def together(residuals: Sequence[Residuals | None], shapes: Sequence[Shape]) -> Residuals | None:
    """Of the images of a batch, zeros for those without; None when none has any. On the device when any of them is."""
    given = [each for each in residuals if each is not None]
    if not given:
        return None
    first = next((each for each in given if not each.on_host), given[0])
    rows = [each and each.beside(first).spread(shapes) for each in residuals]
    return Residuals.stack(rows, first.spread(shapes))


def residual_shapes(network: Any, latent_shape: Shape) -> tuple[Shape, ...]:
    """(C, h, w) of what ControlNets add to an image: after the first convolution, each layer and each halving; last the mid one.

    Args:
        network: a UNet2DConditionModel, on the meta device too.
    """
    _, height, width = latent_shape
    found = [(network.conv_in.out_channels, height, width)]
    for block in network.down_blocks:
        found += [(layer.out_channels, height, width) for layer in block.resnets]
        for _ in block.downsamplers or ():
            height, width = -(-height // 2), -(-width // 2)
            found.append((block.resnets[-1].out_channels, height, width))
    return (*found, found[-1])
