"""Files of the user's own that a recipe names: are they there, and is anything in them."""

from __future__ import annotations

import json
from pathlib import Path

from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from trainer.data.prompts import look
from trainer.recipe import ControlNetRecipe, DistillRecipe, RunRecipe, StyleRecipe
from trainer.sections import DataSection, LoraSection

Recipe = RunRecipe


def absent(recipe: Recipe) -> list[tuple[str, str]]:
    """Files that a recipe names and that are not here: (field, path)."""
    named = {"data.prompts": recipe.data and recipe.data.prompts, images_field(recipe): images_of(recipe)}
    found = [(field, path) for field, path in named.items() if path and not path.startswith("s3://") and not _files(path)]
    style = style_of(recipe)
    if style is not None and not Path(style[1].path).exists():
        found.append((style[0], style[1].path))
    return found


def style_of(recipe: Recipe) -> tuple[str, LoraSection] | None:
    """The LoRA that a recipe names, and the field of its path."""
    if isinstance(recipe, StyleRecipe):
        return "style.path", recipe.style
    if isinstance(recipe, DistillRecipe) and recipe.offline is not None and recipe.offline.lora is not None:
        return "offline.lora.path", recipe.offline.lora
    return None


def images_of(recipe: Recipe) -> str | None:
    """Where the real images are that a recipe distils on, if it does."""
    if isinstance(recipe, StyleRecipe):
        return None
    section = recipe.controlnet.images if isinstance(recipe, ControlNetRecipe) else recipe.unet.images
    return section.images if section else None


def images_field(recipe: Recipe) -> str:
    """The field that names them."""
    return "controlnet.images.images" if isinstance(recipe, ControlNetRecipe) else "unet.images.images"


def check_images(images: str, field: str) -> None:
    """There are files. What is in each is checked when they are read."""
    if not images.startswith("s3://") and not _files(images):
        raise InvalidRequest(field, images, "a folder, file or glob that is there and not empty")


def check_prompts(data: DataSection, settings: Settings, fetch: bool) -> None:
    """There are prompts, and nothing is wrong with the first ones (`look`); S3 is asked only where things may be fetched."""
    if data.prompts.startswith("s3://"):
        if fetch:
            look(data, settings)
        return
    files = _files(data.prompts)
    if not files:
        raise InvalidRequest("data.prompts", data.prompts, "a file, folder or glob that is there")
    if not any(_says_something(path) for path in files):
        raise InvalidRequest("data.prompts", data.prompts, "prompts; what is there is empty")
    look(data, settings)


def check_weights(field: str, source: str, folder: Path) -> None:
    """The .safetensors files of a network are whole, by their headers; of a sharded one all are there."""
    names = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(names):
        size, expected = (folder / name).stat().st_size, safetensors_size(folder / name)
        if size != expected:
            said = "no header that can be read" if expected is None else f"its header says {expected}"
            raise InvalidRequest(field, source, f"whole weights; {folder / name} has {size} bytes, {said}")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values())
        if names & shards and shards - names:  # none at all: the index of a variant that is not used
            raise InvalidRequest(field, source, f"whole weights; {folder} has no {min(shards - names)}")


def safetensors_size(path: Path) -> int | None:
    """Bytes that a .safetensors file has by its header: its length, itself, and the tensors. None: it has no such header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return None
    return 8 + length + max(ends, default=0)


def _files(prompts: str) -> list[Path]:
    """Of a file, folder or glob on this machine."""
    place = Path(prompts.removeprefix("file://")).absolute()
    found = place.rglob("*") if place.is_dir() else Path(place.anchor).glob(place.relative_to(place.anchor).as_posix())
    return [path for path in found if path.is_file() and not path.name.startswith((".", "_"))]


def _says_something(path: Path) -> bool:
    """Whether anything but white space is in a file."""
    with path.open("rb") as file:
        return any(block.strip() for block in iter(lambda: file.read(1 << 16), b""))
