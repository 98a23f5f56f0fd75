"""Tables of served models without a control room."""

from typing import Any

from services.fabric.models import ServedModel
from services.gateway.table import Entry, ModelTable


def table_of(model: ServedModel | None = None, chain: Any = None, max_image_bytes: int = 32 << 20) -> ModelTable:
    """One model drawn by that chain, or none."""
    table = ModelTable(max_image_bytes)
    if model is not None:
        table.switch(model.name, Entry(model.name, model, chain))
    return table
