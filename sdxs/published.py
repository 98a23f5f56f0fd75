"""Models and ControlNets as others publish them: which files of a repository are needed, and what is noted of where they are from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdxs import hub
from sdxs.bundle import CONTROL_TYPES
from sdxs.compose import PARTS
from sdxs.errors import InvalidRequest, NotFound
from sdxs.references import hub_id, likely_name

_MODEL = ["model_index.json", "config.json", *(f"{part}/*" for part in PARTS)]
"""A `config.json` beside the parts says that it is no model but a network alone."""
_CONTROLNET = ["config.json", CONTROL_TYPES, "*.safetensors"]


@dataclass(frozen=True)
class Published:
    """A local folder, and the commit it is from if it is the hub's."""

    folder: Path
    source: str = ""


def model(source: str, vae: str) -> Published:
    """A repository of the hub, with the autoencoder of that folder too. Raises as `hub.snapshot`."""
    commit = str(hub.pinned("model", source))
    return Published(hub.snapshot("model", commit, [*_MODEL, *([f"{vae}/*"] if vae else [])]), commit)


def controlnets(references: Iterable[str]) -> dict[str, Published]:
    """ControlNets of folders or the hub, by the last part of what they are asked for by.

    Raises:
        InvalidRequest: two have one name.
        NotFound, PermissionDenied, Unavailable: one cannot be had.
    """
    found: dict[str, Published] = {}
    for reference in references:
        name = likely_name(reference)
        if name in found:
            raise InvalidRequest("controlnet", reference, f"one of another name: two are called {name!r}")
        found[name] = _controlnet(reference)
    return found


def _controlnet(reference: str) -> Published:
    if hub_id(reference):
        commit = str(hub.pinned("controlnet", reference))
        return Published(hub.snapshot("controlnet", commit, _CONTROLNET), commit)
    if not Path(reference).is_dir():
        raise NotFound(f"controlnet {reference!r}: neither a folder nor a hub id (owner/name, owner/name@revision)")
    return Published(Path(reference))
