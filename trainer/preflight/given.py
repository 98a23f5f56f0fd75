"""Files of the user's own that a recipe names: are they there, and is anything in them."""

from __future__ import annotations

from pathlib import Path

from sdxs.errors import InvalidRequest
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


def check_prompts(data: DataSection) -> None:
    """Local files of prompts exist and are not empty. What is in each row is checked when they are read."""
    if data.prompts.startswith("s3://"):
        return
    files = _files(data.prompts)
    if not files:
        raise InvalidRequest("data.prompts", data.prompts, "a file, folder or glob that is there")
    if not any(_says_something(path) for path in files):
        raise InvalidRequest("data.prompts", data.prompts, "prompts; what is there is empty")


def _files(prompts: str) -> list[Path]:
    """Of a file, folder or glob on this machine."""
    place = Path(prompts.removeprefix("file://")).absolute()
    found = place.rglob("*") if place.is_dir() else Path(place.anchor).glob(place.relative_to(place.anchor).as_posix())
    return [path for path in found if path.is_file() and not path.name.startswith((".", "_"))]


def _says_something(path: Path) -> bool:
    """Whether anything but white space is in a file."""
    with path.open("rb") as file:
        return any(block.strip() for block in iter(lambda: file.read(1 << 16), b""))
