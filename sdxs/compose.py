"""A bundle of parts that lie elsewhere: another autoencoder in place of the model's own, ControlNets of others, weights under plain names.

It is a folder of links in the cache of bundles, with a manifest; a part that changes makes it another bundle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sdxs import bundle, cached
from sdxs.bundle import CONTROL_TYPES, MANIFEST, Manifest
from sdxs.errors import InvalidRequest

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "controlnet")
_INDEX = "model_index.json"
_WEIGHTS, _FP16 = ".safetensors", ".fp16.safetensors"
_TINY, _KL = "AutoencoderTiny", "AutoencoderKL"
_ALIKE = ("cross_attention_dim", "in_channels", "block_out_channels", "layers_per_block", "addition_embed_type")
"""Settings that a ControlNet shares with the U-Net whose features it adds to."""


@dataclass(frozen=True)
class Changes:
    """What a model is to have that its folder does not say."""

    name: str
    vae: str = ""
    """Folder of the autoencoder."""
    controlnets: Mapping[str, Path] = field(default_factory=dict)
    """Folders of further ControlNets by name."""
    lineage: Mapping[str, str] = field(default_factory=dict)


def compose(folder: Path, changes: Changes, cache: Path) -> tuple[Path, Manifest]:
    """The bundle of a model's folder with the changes: a folder in the cache, and its manifest.

    Raises:
        InvalidRequest: it has no such autoencoder; a ControlNet is none, has the name of another or is not made for the U-Net; and as
            `Manifest.from_diffusers`.
        CorruptArtifact: a part is not whole.
    """
    bundle.check_is_model(folder, changes.name)
    links = _links(folder, changes)
    sealed = bundle.read(folder, verify=False) if (folder / MANIFEST).is_file() else None
    kept = {"recipe_hash": sealed.recipe_hash, "metrics": sealed.metrics} if sealed else {}
    lineage = {**(sealed.lineage if sealed else {}), **changes.lineage}

    def build(target: Path) -> Manifest:
        for name, path in links.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(path.resolve())
        _write_index(target, changes.vae)
        manifest = Manifest.from_diffusers(target, changes.name, lineage=lineage, **kept)
        _check_controlnets(target, changes.controlnets)
        (target / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf8")
        return manifest

    return cached.keep(cache, build)


def loads_as_it_lies(folder: Path) -> bool:
    """Whether all its files have the names that they are loaded by."""
    return all(folder / name == path for name, path in _links(folder, Changes("")).items())


def _links(folder: Path, changes: Changes) -> dict[str, Path]:
    """Where each file of the bundle is."""
    found = {_INDEX: folder / _INDEX} if (folder / _INDEX).is_file() else {}
    for part in PARTS:
        source = _autoencoder(folder, changes.vae) if part == "vae" and changes.vae else folder / part
        found |= {f"{part}/{name}": path for name, path in _part(source).items()}
    if changes.controlnets and "controlnet/config.json" in found:  # diffusers' layout of a single one
        found = {re.sub("^controlnet/", "controlnet/controlnet/", name): path for name, path in found.items()}
    for name, source in changes.controlnets.items():
        if f"controlnet/{name}/config.json" in found:
            raise InvalidRequest("controlnet", name, "another name: the model has a ControlNet that is called so")
        found |= {f"controlnet/{name}/{path}": file for path, file in _lone_controlnet(name, source).items()}
    return found


def _part(folder: Path) -> dict[str, Path]:
    """Files of a part that a bundle may hold, by the path in it that they are loaded from."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path for name, path in paths.items() if bundle.accepted(name) and not _is_variant(name)}
    for name, path in paths.items():
        if _FP16 in name:
            found.setdefault(name.replace(_FP16, _WEIGHTS), path)
    return found


def _is_variant(name: str) -> bool:
    """Of weights: whether they are another form of those whose name has a dot less."""
    file = PurePosixPath(name)
    return file.suffix == _WEIGHTS and "." in file.stem


def _autoencoder(folder: Path, name: str) -> Path:
    """The folder of one. Raises InvalidRequest."""
    found = [path.parent.name for path in sorted(folder.glob("*/config.json")) if _class(path.parent) in (_TINY, _KL)]
    if name not in found:
        raise InvalidRequest("vae", name, f"one of the model's autoencoders: {', '.join(found) or 'it has none'}")
    return folder / name


def _lone_controlnet(name: str, folder: Path) -> dict[str, Path]:
    """The files of a ControlNet. Raises InvalidRequest when it is none."""
    if not (folder / "config.json").is_file() or "ControlNet" not in _class(folder):
        raise InvalidRequest(
            "controlnet", name, f"a ControlNet's folder in diffusers' format; this has {_class(folder) or 'no config.json'}"
        )
    wanted = {"config.json", CONTROL_TYPES}
    return {file: path for file, path in _part(folder).items() if "/" not in file and (file in wanted or _WEIGHTS in file)}


def _class(folder: Path) -> str:
    """What a network's configuration says it is."""
    return str(bundle.read_config(folder, "config.json").get("_class_name")) if (folder / "config.json").is_file() else ""


def _write_index(folder: Path, vae: str) -> None:
    """Let diffusers load the other autoencoder too."""
    index = folder / _INDEX
    if vae and index.exists():
        said = bundle.read_config(folder, _INDEX) | {"vae": ["diffusers", _class(folder / "vae")]}
        index.unlink()  # it is a link
        index.write_text(json.dumps(said, indent=1) + "\n", encoding="utf8")


def _check_controlnets(folder: Path, names: Iterable[str]) -> None:
    """Raises InvalidRequest for one that was made for another U-Net."""
    unet = bundle.read_config(folder, "unet/config.json")
    for name in names:
        config = bundle.read_config(folder, f"controlnet/{name}/config.json")
        for setting in _ALIKE:
            if config.get(setting) != unet.get(setting):
                allowed = f"one for this U-Net, whose {setting} is {unet.get(setting)}; this one's is {config.get(setting)}"
                raise InvalidRequest("controlnet", name, allowed)
