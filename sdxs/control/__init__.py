"""Condition images: what a client asks for, and the maps that ControlNets read. No torch."""

from __future__ import annotations

from sdxs.control.asked import Control, check_scale, map_of, pick
from sdxs.control.images import fit, read_image
from sdxs.control.preprocessors import TYPES, extract

__all__ = ["TYPES", "Control", "check_scale", "extract", "fit", "map_of", "pick", "read_image"]
