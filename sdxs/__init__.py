"""sdxs: one-step text-to-image. `sdxs.Client` talks to a server; `sdxs.OneStepPipeline` generates in this process.

Importing this module loads neither torch nor ray nor grpc; each name brings what it needs on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxs.client import AsyncClient, Client
    from sdxs.control import Control
    from sdxs.lora import Lora
    from sdxs.pipeline import OneStepPipeline
    from sdxs.settings import Settings

__all__ = ["AsyncClient", "Client", "Control", "Lora", "OneStepPipeline", "Settings"]
__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "sdxs.client",
    "Client": "sdxs.client",
    "Control": "sdxs.control",
    "Lora": "sdxs.lora",
    "OneStepPipeline": "sdxs.pipeline",
    "Settings": "sdxs.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdxs' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
