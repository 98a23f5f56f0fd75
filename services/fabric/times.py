"""What a stage spent on a request, and with what software: its part of the receipt."""

import functools
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import sdxs
from sdxs.settings import Settings
from sdxs.v1 import stage_pb2
from services.fabric.batcher import Batched

_PACKAGES = ("torch", "diffusers", "transformers")


def spent(stage: str, computed: Sequence[Batched[Any]], software: str) -> stage_pb2.StageTime:
    """On the images of one request: each figure is that of the image that had most of it."""
    return stage_pb2.StageTime(
        stage=stage,
        queue_seconds=max(done.queue_s for done in computed),
        compute_seconds=max(done.compute_s for done in computed),
        software=software,
    )


@functools.cache
def products() -> str:
    """This installation as product tokens (RFC 9110, section 10.1.5), without importing anything heavy."""
    found = [f"sdxs/{sdxs.__version__}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name}/{version(name)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)


def software(settings: Settings) -> str:
    """`products`, and what networks compute on and in. Imports torch."""
    from sdxs.stages import place

    device, dtype = place(settings)
    return f"{products()} {device.type}/{str(dtype).removeprefix('torch.')}"
