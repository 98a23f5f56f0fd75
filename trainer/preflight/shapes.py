"""What a recipe's networks look like before any weight is read: a teacher's configurations, and networks of them without memory.

A teacher on this machine is described by its own files. Of one that is not, a hub gives the configurations; where there is no
hub, those of its family are taken as published.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxs.controlnet import config_for
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound
from trainer.models.families import family
from trainer.models.students import student_config
from trainer.sections import FeatureSection
from trainer.sources import ASSETS, PARTS

Config = Mapping[str, Any]
FILES = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json", "text_encoder": "config.json"}
PUBLISHED = {
    "stable-diffusion-2-1-base": "sd21",
    "sd-turbo": "sd21",
    "stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-4": "sd15",
    "dreamshaper-8": "sd15",
    "stable-diffusion-xl-base-1.0": "sdxl",
    "sdxl-turbo": "sdxl",
    "segmind-vega": "vega",
}
"""Families by the last part of a hub id."""
PUBLISHED_CONTROLNETS = {
    **{f"controlnet-sd21-{kind}-diffusers": "sd21" for kind in ("canny", "hed", "lineart", "scribble")},
    **{f"sd-controlnet-{kind}": "sd15" for kind in ("canny", "hed", "scribble")},
    **{f"control_v11p_sd15_{kind}": "sd15" for kind in ("canny", "lineart", "scribble", "softedge")},
    "controlnet-canny-sdxl-1.0": "sdxl",
}
"""The same of ControlNets that read lines; each has the shapes of its family's U-Net."""


@dataclass(frozen=True)
class TeacherShapes:
    """A teacher's configurations. `folder` is None where only they are known; `texts` has one entry, or SDXL's two."""

    source: str
    unet: Config
    vae: Config
    scheduler: Config
    texts: tuple[Config, ...]
    folder: Path | None = None

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.unet["in_channels"], self.unet["sample_size"], self.unet["sample_size"]

    @property
    def factor(self) -> int:
        """Pixels of a side to one element of a latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def tokens(self) -> int:
        """Length of a prompt's hidden states."""
        return int(self.texts[0].get("max_position_embeddings", 77))

    @property
    def text_width(self) -> int:
        """Width of what the U-Net's cross-attention reads."""
        width = self.unet["cross_attention_dim"]
        return int(width if isinstance(width, int) else width[0])

    @property
    def sdxl(self) -> bool:
        """Whether the U-Net takes SDXL's added conditioning."""
        return bool(self.unet.get("addition_embed_type") == "text_time")


def local_folder(source: str) -> Path | None:
    """Where a teacher's files are on this machine without asking anybody; None if they are not."""
    embedded = ASSETS / source.removesuffix("-teacher") / "teacher"
    if source.endswith("-teacher") and embedded.is_dir():
        return embedded
    return _here(source, PARTS)


def _here(source: str, parts: tuple[str, ...]) -> Path | None:
    """A folder, or a hub snapshot with these parts that was downloaded before."""
    if Path(source).is_dir():
        return Path(source).resolve()
    return _cached(source, parts) if source.count("/") == 1 else None


def _cached(source: str, parts: tuple[str, ...]) -> Path | None:
    """A hub snapshot that was downloaded before, whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if all((folder / part).exists() for part in parts) else None


def teacher_shapes(source: str) -> TeacherShapes:
    """The configurations of a teacher, from its folder or as published.

    Raises:
        NotFound: it is not on this machine, and not of a family that is known by name.
        CorruptArtifact: a configuration is missing or not JSON.
    """
    folder = local_folder(source)
    if folder is not None:
        return read_shapes(source, folder)
    name = PUBLISHED.get(source.partition("@")[0].rpartition("/")[2].lower())
    if name is None:
        known = ", ".join(PUBLISHED)
        raise NotFound(f"teacher {source!r}: not on this machine, and its shapes are unknown; known by name: {known}")
    found = family("sdxl" if name == "vega" else name)
    unet = student_config(found.unet, "vega") if name == "vega" else found.unet
    return TeacherShapes(source, unet, found.vae, found.scheduler, found.text_encoders)


def read_shapes(source: str, folder: Path) -> TeacherShapes:
    """Those of a folder. Raises CorruptArtifact with the file's name."""
    configs = {part: _read(folder, f"{part}/{name}") for part, name in FILES.items()}
    second = [_read(folder, "text_encoder_2/config.json")] if (folder / "text_encoder_2").is_dir() else []
    texts = (configs["text_encoder"], *second)
    return TeacherShapes(source, configs["unet"], configs["vae"], configs["scheduler"], texts, folder)


@dataclass(frozen=True)
class ControlNetShapes:
    """A ControlNet's configuration. `folder` is None where only that is known."""

    source: str
    config: Config
    folder: Path | None = None

    @property
    def factor(self) -> int:
        """Pixels of a side of the control image to one element of a latent."""
        return int(2 ** (len(self.config.get("conditioning_embedding_out_channels", (0,) * 4)) - 1))


def local_controlnet(source: str) -> Path | None:
    """Where a ControlNet's files are on this machine without asking anybody; None if they are not."""
    embedded = ASSETS / source.removesuffix("-teacher-controlnet") / "controlnet"
    if source.endswith("-teacher-controlnet") and embedded.is_dir():
        return embedded
    return _here(source, ("config.json",))


def controlnet_shapes(source: str, teacher: TeacherShapes, folder: Path | None = None) -> ControlNetShapes:
    """The configuration of a ControlNet: that of its folder; else that of its family as published; else that of one made from the
    teacher's U-Net, which any that fits has.

    Raises:
        CorruptArtifact: its configuration is missing or not JSON.
    """
    folder = folder or local_controlnet(source)
    if folder is not None:
        return ControlNetShapes(source, _read(folder, "config.json"), folder)
    name = PUBLISHED_CONTROLNETS.get(source.partition("@")[0].rpartition("/")[2].lower())
    if name is None:
        return ControlNetShapes(source, config_for(teacher.unet, teacher.factor))
    return ControlNetShapes(source, config_for(family(name).unet, 8))


def _read(folder: Path, name: str) -> Config:
    try:
        config: Config = json.loads((folder / name).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"{folder / name} is missing or not JSON") from error
    return config


def dinov2_config(source: str) -> transformers.Dinov2Config:
    """Of a DINOv2 on this machine; of any other that of ViT-B/14."""
    if (Path(source) / "config.json").is_file():
        found: transformers.Dinov2Config = transformers.Dinov2Config.from_pretrained(source)
        return found
    return transformers.Dinov2Config(patch_size=14, image_size=518)


def feature_maps(section: FeatureSection, teacher: TeacherShapes) -> int:
    """How many maps a section's encoder gives: of a U-Net the latent and each down block, of VGG16 one a level, of DINOv2 one a quarter
    of its layers."""
    if section.encoder == "unet":
        return 1 + len(teacher.unet["down_block_types"])
    return 5 if section.encoder == "vgg" else min(4, dinov2_config(section.encoder_source or "").num_hidden_layers)


def family_of(shapes: TeacherShapes) -> str:
    """The family a teacher's configuration is nearest to."""
    if shapes.sdxl:
        return "sdxl"
    return "sd21" if shapes.unet.get("use_linear_projection") else "sd15"


@contextmanager
def weightless() -> Iterator[None]:
    """Networks and tensors made inside have shapes and no memory. They take the paths of a CPU: attention is fused, as on a GPU.

    Networks are not moved inside: where they are and how they are laid out does not matter, and torch cannot move such ones.
    """
    with FakeTensorMode(), torch.device("cpu"), patch.object(nn.Module, "to", lambda module, *_, **__: module):
        yield


def build(kind: Any, config: Config, field: str) -> Any:
    """A network of a configuration. Raises InvalidRequest(field) when there is no such network."""
    try:
        return kind.from_config(dict(config))
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
        raise InvalidRequest(field, dict(config), f"a configuration of {kind.__name__} ({error})") from error
