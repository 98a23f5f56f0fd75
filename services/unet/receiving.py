"""Residuals as they reach a U-Net replica: read from shared memory or from the message, and such as its network can add."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import unet_pb2
from services.fabric.handover import Borrower

Shape = tuple[int, int, int]


class Receiver:
    """Checks them here, one request at a time: in the network they would fail the whole batch, other callers' images included.

    A residual may be [images, C, 1, 1] too: some ControlNets add means of their maps.

    Args:
        shapes: of the residuals of one image, (C, h, w) each.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._shapes = shapes
        self._borrower = Borrower()

    def close(self) -> None:
        """After the last call."""
        self._borrower.close()

    async def read(self, request: unet_pb2.DenoiseRequest) -> Sequence[Residuals | None]:
        """For each image of the request. Raises InvalidRequest: field `shared` when they are in memory out of reach, else one below
        `shared` or `inline`."""
        which, count = request.WhichOneof("residuals"), len(request.seeds)
        if which is None:
            return [None] * count
        found = self._borrowed(request.shared, count) if which == "shared" else self._decoded(request.inline, count)
        await asyncio.to_thread(_check_numbers, found, "shared.shapes[{}]" if which == "shared" else "inline.parts[{}].data")
        return found.rows()

    def _borrowed(self, message: unet_pb2.SharedResiduals, count: int) -> Residuals:
        self._check_number("shared.shapes", len(message.shapes))
        for i, shape in enumerate(message.shapes):
            self._check_shape(f"shared.shapes[{i}]", tuple(shape.sizes), (count, *self._shapes[i]))
        return self._borrower.read(message)

    def _decoded(self, message: unet_pb2.InlineResiduals, count: int) -> Residuals:
        self._check_number("inline.parts", len(message.parts))
        parts = [tensors.decode(part, f"inline.parts[{i}]") for i, part in enumerate(message.parts)]
        for i, part in enumerate(parts):
            self._check_shape(f"inline.parts[{i}].shape", part.shape, (count, *self._shapes[i]))
            if part.dtype != np.float32:
                raise InvalidRequest(f"inline.parts[{i}].element_type", str(part.dtype), "float32")
        return Residuals(tuple(parts))

    @staticmethod
    def _check_shape(field: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found not in (expected, (*expected[:2], 1, 1)):
            raise InvalidRequest(field, list(found), str(list(expected)))

    def _check_number(self, field: str, found: int) -> None:
        if found != len(self._shapes):
            raise InvalidRequest(field, found, f"{len(self._shapes)} residuals, as this U-Net adds")


def _check_numbers(residuals: Residuals, field: str) -> None:
    """Raises InvalidRequest, the part's place in `field`, for numbers that are not finite."""
    for i, part in enumerate(residuals.parts):
        if not np.isfinite(part).all():
            raise InvalidRequest(field.format(i), "not a number or infinite", "finite numbers")


def together(residuals: Sequence[Residuals | None], shapes: Sequence[Shape]) -> Residuals | None:
    """Of the images of a batch, zeros for those without; None when none has any."""
    if all(each is None for each in residuals):
        return None
    zeros = Residuals(tuple(np.zeros((1, *shape), np.float32) for shape in shapes))
    rows = [each or zeros for each in residuals]
    return Residuals(
        tuple(np.concatenate([np.broadcast_to(row.parts[i], (1, *shape)) for row in rows]) for i, shape in enumerate(shapes))
    )


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
