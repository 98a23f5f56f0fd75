"""Where networks come from: an embedded teacher, a diffusers folder, an S3 prefix or a hub id becomes a local folder, once a machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import diffusers.utils.logging
import transformers.utils.logging

from sdxs.errors import InvalidRequest, NotFound
from sdxs.hub import HubId, snapshot
from sdxs.settings import Settings
from sdxs.store import open_url
from trainer.recipe import digest

ASSETS = Path(__file__).parent / "assets"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WANTED = [f"{part}*/*" for part in PARTS] + ["model_index.json"]


def hush() -> None:
    """No bars for loading weights that take milliseconds, no advice on configurations that diffusers wrote itself."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def teacher_folder(source: str) -> Path:
    """The local folder of a teacher.

    Args:
        source: `<world>-teacher` for an embedded one, a diffusers text-to-image folder, `s3://bucket/prefix` of one, or a hub id
            (`owner/name`, `owner/name@revision`). The last two are downloaded once.

    Raises:
        NotFound: there is no such folder.
        InvalidRequest: the folder lacks a part of a text-to-image model; names it.
    """
    folder = _locate(source)
    for part in PARTS:
        if not any(
            (folder / part / name).is_file() for name in ("config.json", "scheduler_config.json", "tokenizer_config.json")
        ):
            raise InvalidRequest("teacher", source, f"a diffusers text-to-image folder; {folder} has no {part}/")
    return folder.resolve()


def _locate(source: str) -> Path:
    embedded = ASSETS / source.removesuffix("-teacher") / "teacher"
    if source.endswith("-teacher") and embedded.is_dir():
        return embedded
    return _elsewhere("teacher", source, WANTED)


def controlnet_folder(source: str) -> Path:
    """The local folder of a ControlNet: `<world>-teacher-controlnet` for an embedded one, a folder in diffusers' format, `s3://bucket/prefix`
    of one, or a hub id.

    Raises:
        NotFound: there is no such folder.
        InvalidRequest: it is not a ControlNet's.
    """
    embedded = ASSETS / source.removesuffix("-teacher-controlnet") / "controlnet"
    if source.endswith("-teacher-controlnet") and embedded.is_dir():
        return embedded
    folder = _elsewhere("controlnet", source, ["config.json", "*.safetensors"])
    if not (folder / "config.json").is_file():
        raise InvalidRequest("controlnet", source, f"a ControlNet's folder in diffusers' format; {folder} has no config.json")
    return folder.resolve()


def _elsewhere(what: str, source: str, wanted: list[str]) -> Path:
    """A folder, a prefix of a store, or a repository of the hub."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith("s3://"):
        return _from_s3(what, source)
    if HubId.parse(source):
        return snapshot(what, source, wanted)
    raise NotFound(f"{what} {source!r}: neither a folder, an s3:// address, a hub id (owner/name), nor an embedded {what}")


def _from_s3(what: str, source: str) -> Path:
    settings = Settings()
    store = open_url(source, settings)
    address = urlparse(source)
    target = settings.cache_dir / f"{what}s" / address.netloc / address.path.strip("/")
    keys = [key for key in store.list("") if what != "teacher" or key.partition("/")[0].removesuffix("_2") in PARTS]
    if not keys:
        raise NotFound(f"{what} {source!r}: nothing there" + (f" under {', '.join(PARTS)}" if what == "teacher" else ""))
    for key in keys:
        if not (target / key).exists():
            (target / key).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(key, target / key)
    return target


def teacher_digest(folder: Path) -> str:
    """Digest of a teacher's networks, tokenizer and scheduler; its card and logs, which lie beside their folders, do not count."""
    return folder_digest(folder, ("*",))


def folder_digest(folder: Path, names: tuple[str, ...]) -> str:
    """Digest of the files in the subfolders of these names, which may be patterns."""
    found = {path for name in names for path in folder.glob(f"{name}/**/*") if path.is_file() and ".cache" not in path.parts}
    parts = []
    for path in sorted(found):
        with path.open("rb") as file:
            parts.append([path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(parts)


def embeddings_folder() -> Path:
    """Where processes of this machine keep text embeddings."""
    return Settings().cache_dir / "embeddings"


def latent_shape(folder: Path) -> tuple[int, int, int]:
    """(C, H, W) of a teacher's latents."""
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf8"))
    return config["in_channels"], config["sample_size"], config["sample_size"]


def load_network(kind: Any, folder: Path, dtype: Any = None) -> Any:
    """A network of a diffusers or transformers folder, in float32 unless told otherwise, in eval mode.

    Weights stored in float16 or bfloat16 are widened; a folder that has only an `fp16` variant is read from it.
    """
    import torch

    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    plain = any(name.count(".") == 1 for name in names)  # a variant's name has a dot more
    variant = "fp16" if not plain and any(".fp16" in name for name in names) else None
    return kind.from_pretrained(folder, torch_dtype=dtype or torch.float32, variant=variant).eval()


def load_frozen(kind: Any, folder: Path, dtype: Any = None) -> Any:
    """The same without gradients."""
    return load_network(kind, folder, dtype).requires_grad_(False)
