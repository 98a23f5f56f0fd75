"""LoRAs (arXiv:2106.09685) on a bundle's networks, chosen anew for each image: what a caller says. Knows no torch.

sdxs.lora.manifest   what is known of a published one
sdxs.lora.published  publishing, names, opening; the store's side
sdxs.lora.files      the formats, and whether one fits a model
sdxs.lora.adapters   on networks, switched between two forward passes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxs.errors import InvalidRequest

MAX_LORAS = 4
"""On one image."""
MAX_SCALE = 10.0
"""Of either sign: some are trained as sliders."""


@dataclass(frozen=True)
class Lora:
    """A LoRA and how strongly it counts.

    Args:
        name: a published one: name, `name@pointer` or `sha256:...`; in process also a .safetensors file or a folder, as a Path or with
            a `/` in it.
        scale: 1 is as trained; 0: as if it were not there.
    """

    name: str | Path
    scale: float = 1.0


def check_scale(scale: float, field: str) -> None:
    """Raises InvalidRequest."""
    if not -MAX_SCALE <= scale <= MAX_SCALE:  # not a number is not either
        raise InvalidRequest(f"{field}.scale", scale, f"-{MAX_SCALE:g} to {MAX_SCALE:g}")


def check_number(loras: Iterable[Any]) -> None:
    """Raises InvalidRequest."""
    if (count := len(list(loras))) > MAX_LORAS:
        raise InvalidRequest("loras", count, f"at most {MAX_LORAS}")


def check_distinct(digests: Iterable[str]) -> None:
    """Raises InvalidRequest that names the second of two that are the same LoRA, under whatever names."""
    seen: set[str] = set()
    for i, digest in enumerate(digests):
        if digest in seen:
            raise InvalidRequest(f"loras[{i}].name", digest, "each LoRA once; add up the scales")
        seen.add(digest)
