"""The model bundle: a diffusers folder and `bundle.json`. A bundle exists when its manifest does; its digest names it.

Only safetensors, JSON, text and pictures are accepted: nothing in a bundle can run code. What the networks are, diffusers'
own configuration files say; this module knows files, digests and the few facts that a server needs first.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from sdxs import sizes
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound
from sdxs.onestep import OneStepConstants, probe_folder
from sdxs.sizes import Size

MANIFEST = "bundle.json"
NAME = "[a-z0-9][a-z0-9._-]{0,63}"
"""Of a bundle, as a regular expression."""
_PART = f".{MANIFEST}.part"
SUFFIXES = frozenset({".safetensors", ".json", ".jsonl", ".txt", ".md", ".png", ".toml"})


class FileEntry(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """Facts of a bundle that a server needs before it loads a weight, and the digest of every file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: str = Field(pattern=f"^{NAME}$")
    image_size: int = Field(gt=0)
    latent_channels: int = Field(gt=0)
    latent_size: int = Field(gt=0)
    text_width: int = Field(gt=0)
    pooled_width: int = Field(default=0, ge=0)
    """Of SDXL's pooled text embedding; 0: the U-Net takes none."""
    max_prompt_tokens: int = Field(gt=0)
    dtype: str
    one_step: OneStepConstants
    controlnets: dict[str, tuple[str, ...]] = {}
    """Of each ControlNet the control types it was trained for; none: it says of none, and takes any."""
    files: dict[str, FileEntry]
    recipe_hash: str = ""
    metrics: dict[str, float] = {}
    lineage: dict[str, str] = {}
    created: str = ""

    @field_validator("files")
    @classmethod
    def _safe_paths(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not accepted(name):
                raise ValueError(f"{name!r} is not a plain relative path to one of {', '.join(sorted(SUFFIXES))}")
        return files

    @model_serializer(mode="wrap")
    def _as_before_sdxl(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what a bundle does not have: such manifests keep their digests, and older versions read them."""
        data: dict[str, Any] = handler(self)
        for name in ("pooled_width", "controlnets"):
            if not data.get(name):
                data.pop(name, None)
        return data

    @property
    def digest(self) -> str:
        """`sha256:` of the canonical JSON without `created`: the same files and facts are the same bundle, whenever sealed."""
        data = self.model_dump(mode="json", exclude={"created"})
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent of the model's own size."""
        return self.latent_of(Size.of(self.image_size))

    @property
    def upsampling(self) -> int:
        """Pixels of an image to one of its latent, along a side."""
        return self.image_size // self.latent_size

    def size(self, width: int = 0, height: int = 0) -> Size:
        """Of an image of that width and height, its own where they are 0. Raises InvalidRequest; see sdxs.sizes."""
        return sizes.chosen(width, height, self.image_size, self.upsampling)

    def latent_of(self, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of the latent of an image."""
        return self.latent_channels, size.height // self.upsampling, size.width // self.upsampling

    @classmethod
    def from_diffusers(cls, folder: Path, name: str = "", **facts: Any) -> Manifest:
        """The manifest of a plain diffusers folder, such as the published SDXS weights; `name` defaults to the folder's.

        Files that a bundle cannot hold are left out: they are never loaded either.

        Raises:
            CorruptArtifact: a needed configuration file or a value in it is missing, or the networks do not fit each other.
            InvalidRequest: it is no one-step model, or no model at all but a ControlNet.
        """
        check_is_model(folder, name or folder.name)
        unet, vae = read_config(folder, "unet/config.json"), read_config(folder, "vae/config.json")
        try:
            text = _text_facts(folder, unet)
            _check_fits(unet, vae, text["text_width"])
            found = {
                "image_size": unet["sample_size"] * _upsampling(vae),
                "latent_channels": unet["in_channels"],
                "latent_size": unet["sample_size"],
                "dtype": _dtype(folder),
                "one_step": _one_step(folder),
                "controlnets": {each: control_types(place) for each, place in controlnet_folders(folder).items()},
            }
            facts.setdefault("files", {file: _hash(folder / file) for file in _files(folder) if accepted(file)})
            return cls(name=name or slug(folder.resolve().name), **found, **text, **facts)
        except KeyError as error:
            raise CorruptArtifact(f"{error.args[0]!r} is missing in the configuration files of {folder.name!r}") from error
        except ValidationError as error:
            raise CorruptArtifact(f"configuration files of {folder.name!r}: {_first(error)}") from error


CONTROL_TYPES = "control_types.json"


def controlnet_folders(folder: Path) -> dict[str, Path]:
    """The ControlNets of a model folder, by name: those in `controlnet/<name>/`; or `controlnet/` itself, diffusers' own layout, which is
    called "controlnet"."""
    place = folder / "controlnet"
    if (place / "config.json").is_file():
        return {"controlnet": place}
    return {path.parent.name: path.parent for path in sorted(place.glob("*/config.json"))}


def control_types(folder: Path) -> tuple[str, ...]:
    """The control types that a ControlNet's folder says it knows. Raises CorruptArtifact when what it says is no list of names."""
    if not (folder / CONTROL_TYPES).is_file():
        return ()
    found: Any = read_config(folder, CONTROL_TYPES)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CorruptArtifact(f"{CONTROL_TYPES} of ControlNet {folder.name!r} is not a list of names")
    return tuple(found)


def accepted(name: str) -> bool:
    """Whether a bundle may hold a file of that path."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and "\\" not in name and name.isprintable()
    return plain and name != MANIFEST and path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def slug(name: str) -> str:
    """A folder's name as a bundle's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip("._-")[:64] or "unnamed"


def _upsampling(vae: dict[str, Any]) -> int:
    """Pixels per latent element and side: AutoencoderTiny says the factor of a level, AutoencoderKL's is 2."""
    levels = vae.get("decoder_block_out_channels") or vae["block_out_channels"]
    factor: int = vae.get("upsampling_scaling_factor", 2) ** (len(levels) - 1)
    return factor


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder. Raises CorruptArtifact when it is missing or not JSON."""
    try:
        data: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{name} is missing: not a diffusers text-to-image folder") from error
    except ValueError as error:
        raise CorruptArtifact(f"{name} is not JSON: {error}") from error
    return data


def check_is_model(folder: Path, name: str) -> None:
    """Raises InvalidRequest for the folder of a lone ControlNet, which is published in the same way."""
    if (folder / "unet").exists() or not (folder / "config.json").is_file():
        return
    if "ControlNet" in str(read_config(folder, "config.json").get("_class_name")):
        raise InvalidRequest("model", name, "a model; this is a ControlNet alone, for MODEL?controlnet=...")


def _one_step(folder: Path) -> OneStepConstants:
    """The constants of the folder's scheduler. One of a model of many steps, with `timestep_spacing` leading, takes its only step at the
    clean end, where a one-step model was never trained. Raises InvalidRequest for such, and what `probe_folder` does.
    """
    found = probe_folder(folder)
    config = read_config(folder, "scheduler/scheduler_config.json")
    last = config.get("num_train_timesteps", 1000) - 1
    if found.timestep < last:
        allowed = (
            f"one whose single step begins at the last timestep, {last}, as with trailing spacing, not at {found.timestep}"
        )
        raise InvalidRequest("scheduler", config["_class_name"], allowed)
    return found


def _check_fits(unet: dict[str, Any], vae: dict[str, Any], text_width: int) -> None:
    """Raises CorruptArtifact when autoencoder or text encoder is not one for the U-Net, or an image is not square."""
    size, channels, width = unet["sample_size"], unet["in_channels"], unet["cross_attention_dim"]
    if not isinstance(size, int):
        raise CorruptArtifact(f"unet/config.json: sample_size is {size}; a model draws images of one size, height as width")
    if vae["latent_channels"] != channels:
        raise CorruptArtifact(f"unet/config.json: in_channels is {channels}, but vae/ has latents of {vae['latent_channels']}")
    if isinstance(width, int) and width != text_width and not unet.get("encoder_hid_dim_type"):
        raise CorruptArtifact(f"unet/config.json: cross_attention_dim is {width}, but the text encoder's width is {text_width}")


def _text_facts(folder: Path, unet: dict[str, Any]) -> dict[str, int]:
    """Widths and length of what the U-Net is conditioned on. SDXL's (`text_time`) are those of two text encoders side by side.

    Raises:
        CorruptArtifact: a file is missing, or the tokenizers read different lengths.
    """
    sdxl = unet.get("addition_embed_type") == "text_time"
    suffixes = ("", "_2") if sdxl else ("",)
    encoders = [read_config(folder, f"text_encoder{suffix}/config.json") for suffix in suffixes]
    lengths = [read_config(folder, f"tokenizer{suffix}/tokenizer_config.json")["model_max_length"] for suffix in suffixes]
    if len(set(lengths)) > 1:
        raise CorruptArtifact(f"the tokenizers of {folder.name!r} read {' and '.join(map(str, lengths))} tokens, not as many")
    facts = {"text_width": sum(encoder["hidden_size"] for encoder in encoders), "max_prompt_tokens": lengths[0]}
    most = min(encoder.get("max_position_embeddings", 77) for encoder in encoders)
    if lengths[0] > most:
        raise CorruptArtifact(
            f"tokenizer_config.json: model_max_length is {lengths[0]}, but the text encoder reads {most} tokens"
        )
    return facts | ({"pooled_width": encoders[1]["projection_dim"]} if sdxl else {})


def _dtype(folder: Path) -> str:
    """Storage type of the U-Net's weights, read from the safetensors header."""
    path = next(iter(sorted((folder / "unet").glob("*.safetensors"))), None)
    if path is None:
        raise CorruptArtifact("unet/diffusion_pytorch_model.safetensors is missing; other formats are not read")
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(next(entry["dtype"] for key, entry in header.items() if key != "__metadata__"))


def _hash(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _files(folder: Path) -> list[str]:
    """Relative paths of everything in the folder but its manifest, sorted."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in paths if path not in (MANIFEST, _PART))


def seal(folder: Path, name: str, **facts: Any) -> Manifest:
    """Hash everything in `folder` and write its manifest, last and atomically.

    Args:
        facts: recipe_hash, metrics, lineage.

    Raises:
        InvalidRequest: the folder holds something that a bundle cannot.
        CorruptArtifact: it is not a whole diffusers text-to-image folder.
    """
    for file in _files(folder):
        if not accepted(file) or (folder / file).is_symlink():
            raise InvalidRequest("bundle", file, f"plain files ending in {', '.join(sorted(SUFFIXES))}")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest.from_diffusers(folder, name, created=created, **facts)
    part = folder / _PART
    part.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf8")
    part.replace(folder / MANIFEST)
    return manifest


def parse(text: str | bytes) -> Manifest:
    """A manifest from its JSON. Raises CorruptArtifact that names the field."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise CorruptArtifact(f"{MANIFEST}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """The first field at fault, and why."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


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
        check(folder, manifest)
    return manifest


def check(folder: Path, manifest: Manifest) -> None:
    """Hash every file. Raises CorruptArtifact that names the first one that is missing or differs."""
    for name, entry in manifest.files.items():
        if not (folder / name).is_file():
            raise CorruptArtifact(f"{name} is missing from bundle {manifest.name!r}")
        if _hash(folder / name) != entry:
            raise CorruptArtifact(f"{name} of bundle {manifest.name!r} is not the file that was sealed")


def facts(folder: Path) -> Manifest:
    """The manifest, without hashing anything; of a folder that is not sealed, what its configuration files say."""
    if (folder / MANIFEST).is_file():
        return read(folder, verify=False)
    return Manifest.from_diffusers(folder, files={})
