"""Tables of served models without a control room."""

from typing import Any

from sdxs.errors import Unavailable
from sdxs.store import ObjectStore
from services.fabric.models import ServedModel
from services.gateway.loras import LoraNames
from services.gateway.table import Entry, ModelTable


def _no_store() -> ObjectStore:
    raise Unavailable("no store in this test")


def table_of(model: ServedModel | None = None, chain: Any = None, max_image_bytes: int = 32 << 20) -> ModelTable:
    """One model drawn by that chain, or none."""
    table = ModelTable(max_image_bytes, LoraNames(_no_store, 0.0))
    if model is not None:
        table.switch(model.name, Entry(model.name, model, chain))
    return table
