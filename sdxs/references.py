"""How a model is asked for: where it is, and what it is to have in place of its own parts or beside them.

`base` or `base?option&option`. The base is a name, `name@pointer`, a digest, a folder, an `s3://` address or a hub id. The options:

    vae=vae_large               the autoencoder in that folder of the model
    controlnet=owner/sketch     one more ControlNet, of a folder or the hub; may be said again
    name=large                  what the model is then called
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from sdxs.bundle import NAME, slug
from sdxs.errors import InvalidRequest
from sdxs.hub import SCHEME, HubId

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Reference:
    """A model as it is asked for. `str` gives the text back."""

    base: str
    vae: str = ""
    controlnets: tuple[str, ...] = ()
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises InvalidRequest for an option that is none, or is said twice, or says nothing."""
        base, mark, query = text.partition("?")
        said: dict[str, list[str]] = {"vae": [], "controlnet": [], "name": []}
        for part in query.split("&") if mark else ():
            option, _, value = part.partition("=")
            if option not in said or not value or (said[option] and option != "controlnet"):
                raise InvalidRequest("model", text, "after ? vae=, name= (once each) and controlnet=, with & between them")
            said[option].append(value)
        found = cls(base, "".join(said["vae"]), tuple(said["controlnet"]), "".join(said["name"]))
        if found.vae and not _FOLDER.fullmatch(found.vae):
            raise InvalidRequest("model", text, "vae= the name of a folder in the model's, such as vae_large")
        if found.name and not re.fullmatch(NAME, found.name):
            raise InvalidRequest("model", text, "name= lower-case letters, digits, ., _ and -")
        return found

    def __str__(self) -> str:
        options = [f"vae={self.vae}"] if self.vae else []
        options += [f"controlnet={each}" for each in self.controlnets]
        options += [f"name={self.name}"] if self.name else []
        return self.base + ("?" + "&".join(options) if options else "")

    @property
    def changes(self) -> bool:
        """Whether it has options."""
        return bool(self.vae or self.controlnets or self.name)


def likely_name(text: str) -> str:
    """What the model of a reference is called, as far as the reference says: one of a folder or an address may have another name."""
    asked = Reference.parse(text)
    if asked.name:
        return asked.name
    if is_folder(asked.base) or "://" in asked.base:
        found = hub_id(asked.base)
        return slug(found.name if found else Path(urlparse(asked.base).path).name)
    return asked.base.partition("@")[0]


def is_folder(base: str) -> bool:
    """Whether it is a folder's path or a hub id, and not a name, a digest or an address."""
    return "://" not in base and ("/" in base or base.startswith("."))


def hub_id(base: str) -> HubId | None:
    """The repository that a base means: of `owner/name` only where there is no such folder."""
    return None if not base.startswith(SCHEME) and Path(base).is_dir() else HubId.parse(base)


def absolute(text: str) -> str:
    """The same reference for a process in another folder: paths from the root, hub ids with their scheme."""
    asked = Reference.parse(text)
    return str(Reference(_absolute(asked.base), asked.vae, tuple(map(_absolute, asked.controlnets)), asked.name))


def _absolute(base: str) -> str:
    if found := hub_id(base):
        return str(found)
    return str(Path(base).absolute()) if is_folder(base) else base
