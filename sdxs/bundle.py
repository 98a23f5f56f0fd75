"""The model bundle: a diffusers folder and `bundle.json`. A bundle exists when its manifest does; it is named by the manifest's digest.

Only safetensors, JSON, text and pictures are accepted: nothing in a bundle can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound
from sdxs.onestep import OneStepConstants, probe_folder

MANIFEST = "bundle.json"
SUFFIXES = frozenset({".safetensors", ".json", ".jsonl", ".txt", ".md", ".png", ".toml"})


class FileEntry(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """Facts of a bundle that a server needs before it loads a weight, and the digest of every file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]{0,63}$")
    image_size: int = Field(gt=0)
    latent_channels: int = Field(gt=0)
    latent_size: int = Field(gt=0)
    text_width: int = Field(gt=0)
    max_prompt_tokens: int = Field(gt=0)
    dtype: str
    one_step: OneStepConstants
    files: dict[str, FileEntry]
    recipe_hash: str = ""
    metrics: dict[str, float] = {}
    lineage: dict[str, str] = {}
    created: str = ""

    @field_validator("files")
    @classmethod
    def _safe_paths(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix not in SUFFIXES:
                raise ValueError(f"{name!r} is not a relative path to one of {', '.join(sorted(SUFFIXES))}")
        return files

    @property
    def digest(self) -> str:
        """`sha256:` of the canonical JSON without `created`: the same files and facts are the same bundle, whenever sealed."""
        data = self.model_dump(mode="json", exclude={"created"})
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    @classmethod
    def from_diffusers(cls, folder: Path, name: str, **facts: Any) -> Manifest:
        """The manifest of a plain diffusers folder, such as the published SDXS weights.

        Raises:
            CorruptArtifact: a needed configuration file is missing.
        """
        unet, vae = read_config(folder, "unet/config.json"), read_config(folder, "vae/config.json")
        text = read_config(folder, "text_encoder/config.json")
        tokenizer = read_config(folder, "tokenizer/tokenizer_config.json")
        latent_size = unet["sample_size"]
        levels = vae.get("decoder_block_out_channels") or vae["block_out_channels"]
        factor = vae.get("upsampling_scaling_factor", 2) ** (len(levels) - 1)
        return cls(
            name=name,
            image_size=latent_size * factor,
            latent_channels=unet["in_channels"],
            latent_size=latent_size,
            text_width=text["hidden_size"],
            max_prompt_tokens=tokenizer["model_max_length"],
            dtype=_dtype(folder),
            one_step=probe_folder(folder),
            files=_hash_files(folder),
            **facts,
        )


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder. Raises CorruptArtifact when it is missing or not JSON."""
    try:
        data: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{name} is missing: not a diffusers text-to-image folder") from error
    except ValueError as error:
        raise CorruptArtifact(f"{name} is not JSON: {error}") from error
    return data


def _dtype(folder: Path) -> str:
    """Storage type of the U-Net's weights, read from the safetensors header."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(next(entry["dtype"] for key, entry in header.items() if key != "__metadata__"))


def _hash(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _hash_files(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in paths:
        if path.suffix not in SUFFIXES or path.is_symlink():
            raise InvalidRequest("bundle", path.name, f"plain files ending in {', '.join(sorted(SUFFIXES))}")
    return {path.relative_to(folder).as_posix(): _hash(path) for path in paths}


def seal(folder: Path, name: str, **facts: Any) -> Manifest:
    """Hash everything in `folder` and write its manifest, last and atomically.

    Args:
        facts: recipe_hash, metrics, lineage.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest.from_diffusers(folder, name, created=created, **facts)
    part = folder / f".{MANIFEST}.part"
    part.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf8")
    os.replace(part, folder / MANIFEST)
    return manifest


def parse(text: str | bytes) -> Manifest:
    """A manifest from its JSON. Raises CorruptArtifact that names the field."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptArtifact(f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read(folder: Path, *, verify: bool = True) -> Manifest:
    """The manifest of a sealed folder; with `verify`, every file is hashed.

    Raises:
        NotFound: there is no manifest.
        CorruptArtifact: a file is missing or differs; names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFound(f"no {MANIFEST} in {folder.name!r}: not a bundle")
    manifest = parse(path.read_bytes())
    if verify:
        for name, entry in manifest.files.items():
            if not (folder / name).is_file():
                raise CorruptArtifact(f"{name} is missing from bundle {manifest.name!r}")
            if _hash(folder / name) != entry:
                raise CorruptArtifact(f"{name} of bundle {manifest.name!r} is not the file that was sealed")
    return manifest
