"""Files of the user's own that a recipe names: are they there, and is anything in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdxs import registry
from sdxs.errors import InvalidRequest, SdxsError
from sdxs.settings import Settings
from trainer.data.prompts import look
from trainer.preflight.shapes import local_controlnet
from trainer.recipe import ControlNetRecipe, ControlRecipe, DistillRecipe, RunRecipe, StyleRecipe
from trainer.sections import DataSection, ImagesSection, LoraSection
from trainer.worlds.base import get_world

Recipe = RunRecipe


def absent(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe names and this machine does not have: (field, path or name)."""
    images = images_of(recipe)
    named = {"data.prompts": recipe.data and recipe.data.prompts, f"{images_field(recipe)}.images": images and images.images}
    found = [(field, path) for field, path in named.items() if path and not path.startswith("s3://") and not _files(path)]
    style = style_of(recipe)
    if style is not None and not Path(style[1].path).exists():
        found.append((style[0], style[1].path))
    if isinstance(recipe, (StyleRecipe, ControlRecipe)) and local_base(recipe.base) is None:
        found.append(("base", recipe.base))
    if isinstance(recipe, ControlRecipe) and local_controlnet(recipe.controlnet) is None:
        found.append(("controlnet", recipe.controlnet))
    lacking = missing_for_images(recipe)
    return found + ([("world", lacking)] if lacking else [])


def local_base(reference: str) -> Path | None:
    """The folder of a bundle that is here without asking a store: a folder, or one that ships."""
    if "/" in reference or reference.startswith("."):
        return Path(reference) if Path(reference).is_dir() else None
    return registry.packaged().get(reference.removesuffix(f"@{registry.PACKAGED}"))


def missing_for_images(recipe: Recipe) -> str | None:
    """What this machine lacks to draw the world's images, where a run trains on them."""
    if not isinstance(recipe, ControlNetRecipe) or recipe.world is None:
        return None
    return get_world(recipe.world).missing()


def style_of(recipe: Recipe) -> tuple[str, LoraSection] | None:
    """The LoRA that a recipe names, and the field of its path."""
    if isinstance(recipe, StyleRecipe):
        return "style.path", recipe.style
    if isinstance(recipe, DistillRecipe) and recipe.offline is not None and recipe.offline.lora is not None:
        return "offline.lora.path", recipe.offline.lora
    return None


def images_of(recipe: Recipe) -> ImagesSection | None:
    """The real images that a recipe trains on, if it does."""
    if isinstance(recipe, StyleRecipe):
        return None
    return recipe.controlnet.images if isinstance(recipe, ControlNetRecipe) else recipe.unet.images


def images_field(recipe: Recipe) -> str:
    """The field of their section."""
    return "controlnet.images" if isinstance(recipe, ControlNetRecipe) else "unet.images"


def check_images(section: ImagesSection, field: str) -> None:
    """There are files. What is in each is checked when they are read."""
    if not section.images.startswith("s3://") and not _files(section.images):
        raise InvalidRequest(f"{field}.images", section.images, "a folder, file or glob that is there and not empty")


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


@contextmanager
def of_field(field: str, source: str) -> Iterator[None]:
    """Says of every fault found inside which field is at fault."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(field, source, error.allowed) from error
    except SdxsError as error:
        raise reworded(error, f"{field}: {error}", field) from error


def reworded(error: SdxsError, text: str, field: str) -> SdxsError:
    """An error of the same kind. InvalidRequest, which takes more than a text, is not meant."""
    found = type(error)(text)
    found.field = field
    return found
