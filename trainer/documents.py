"""Recipes and protocols as files: TOML by built-in name or path, and what pydantic has against one, in one line."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxs.errors import InvalidRequest, NotFound


def shipped(package: str) -> list[str]:
    """Names of the TOML files that lie in a package."""
    files = (path.name for path in resources.files(package).iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def read(kind: str, name_or_path: str, package: str) -> tuple[Path, dict[str, Any]]:
    """The file and what is in it.

    Raises:
        NotFound: neither a name in `package` nor a file.
        InvalidRequest: it is not TOML.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = Path(str(resources.files(package) / f"{name_or_path}.toml"))
    if not path.is_file():
        raise NotFound(f"{kind} {name_or_path!r}: no such file, and not one of {', '.join(shipped(package))}")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(kind, str(path), f"TOML ({error})") from error


def refused(kind: str, data: dict[str, Any], error: ValidationError, skip: int = 0) -> InvalidRequest:
    """The first field that is missing, unknown or out of range, less `skip` leading parts of its place."""
    first = error.errors()[0]
    place = first["loc"][skip:] if first["loc"] else ("kind",) * skip
    value = first.get("input") if place else data.get("name")  # of a rule about the whole, the name says enough
    return InvalidRequest(".".join([kind, *map(str, place)]), value, first["msg"])
