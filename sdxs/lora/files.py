"""Files of LoRAs: what diffusers and PEFT save, and kohya's form for SD 1.x and 2.x; and whether one fits a model. Imports torch.

A LoRA's tensors go by PEFT's names here, after that of the network: `unet.<layer>.lora_A.weight`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxs.errors import InvalidRequest
from sdxs.lora.published import FILE

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
MAX_BYTES = 1 << 30
MAX_RANK = 512
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration in a file."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT = "base_model.model."
_UNDERSTOOD = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "lora_bias")
"""Of PEFT's configuration. All else is about training."""

_PART = re.compile(r"\.lora_(A\.weight|B\.weight|B\.bias|magnitude_vector(\.weight)?)$")

Sizes = tuple[torch.Size | None, torch.Size | None]


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as it was read."""

    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None = None
    config: Mapping[str, Any] | None = None
    """PEFT's, each entry after the name of its network."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of what was read, whatever files it was in."""
        told = json.dumps([dict(self.alphas or {}), dict(self.config or {})], sort_keys=True, default=str)
        hashed = hashlib.sha256(told.encode())
        for name, tensor in sorted(self.tensors.items()):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()

    @property
    def rank(self) -> int:
        """The largest of any layer."""
        return max(down[0] for down, _ in layers(self.tensors).values() if down)

    @property
    def networks(self) -> dict[str, int]:
        """How many layers of which network it changes."""
        names = [layer.partition(".")[0] for layer in layers(self.tensors)]
        return {network: names.count(network) for network in sorted(set(names))}

    def of(self, networks: Collection[str]) -> LoraWeights:
        """Its part for some networks."""
        tensors = {name: value for name, value in self.tensors.items() if name.partition(".")[0] in networks}
        return LoraWeights(tensors, self.alphas, self.config)


def read(path: Path, field: str = "lora.path", *, most: int = MAX_BYTES) -> LoraWeights:
    """A LoRA's file, or its folder.

    Args:
        path: a .safetensors file; a folder with one that diffusers saved; a folder that PEFT saved, or one with such folders named as
            the networks they are for.
        field: what it is called in errors.
        most: bytes of its files together.

    Raises:
        InvalidRequest: there is no such file, it is too large, or it is not a LoRA of a diffusion model.
    """
    found = dict(_adapter_folders(path))
    files = [place / _WEIGHTS for place in found.values()] or [path / FILE if path.is_dir() else path]
    for file in files:
        _check_file(file, field)
    if (size := sum(file.stat().st_size for file in files)) > most:
        raise InvalidRequest(field, f"{size} bytes", f"a LoRA of at most {most} bytes")
    try:
        weights = _of_folders(found) if found else _of_file(files[0])
        fault = _fault(weights)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidRequest(field, str(path), f"a LoRA that diffusers reads ({error})") from error
    if fault:
        raise InvalidRequest(field, str(path), f"a LoRA; {fault}")
    return weights


def save(weights: LoraWeights, file: Path) -> None:
    """As diffusers does."""
    from safetensors.torch import save_file

    told = {METADATA: json.dumps(dict(weights.config), sort_keys=True)} if weights.config else {}
    save_file({name: value.contiguous() for name, value in weights.tensors.items()}, file, {"format": "pt", **told})


def is_plain(path: Path) -> bool:
    """Whether it is a single file already, which can be kept as it is."""
    return not dict(_adapter_folders(path))


def layers(tensors: Mapping[str, Tensor]) -> dict[str, Sizes]:
    """Each layer that a LoRA changes, its network first, with the shapes of its matrices, down and up."""
    shapes: dict[str, dict[str, torch.Size]] = {}
    for name, value in tensors.items():
        layer, _, matrix = name.rpartition(".lora_")
        if matrix in ("A.weight", "B.weight"):
            shapes.setdefault(layer, {})[matrix[0]] = value.shape
    return {layer: (found.get("A"), found.get("B")) for layer, found in shapes.items()}


def misfits(weights: LoraWeights, networks: Mapping[str, nn.Module], *, elsewhere: Collection[str] = ()) -> Iterator[str]:
    """What of a LoRA does not fit, told by shapes alone: networks on the meta device do.

    Args:
        networks: by the names in `NETWORKS`.
        elsewhere: names of networks that are somebody else's to check.
    """
    modules = {name: dict(network.named_modules()) for name, network in networks.items()}
    for layer, (down, up) in layers(weights.tensors).items():
        network, _, rest = layer.partition(".")
        if network in modules:
            fault = _misfit(down, up, _module(modules[network], rest), "U-Net" if network == "unet" else "text encoder")
        else:
            fault = None if network in elsewhere else f"is of a network that this model does not have: {network!r}"
        if fault:
            yield f"{layer} {fault}"
    yield from (f"{name} is no part of a LoRA" for name in weights.tensors if not _PART.search(name))


def check_fit(
    weights: LoraWeights, networks: Mapping[str, nn.Module], field: str, shown: str, elsewhere: Collection[str] = ()
) -> None:
    """Raises InvalidRequest that tells of the first that does not fit, and how many do not."""
    found = list(misfits(weights, networks, elsewhere=elsewhere))
    if found:
        more = f", and {len(found) - 1} more do not fit" if len(found) > 1 else ""
        raise InvalidRequest(field, shown, f"a LoRA made for this model: {found[0]}{more}")


def _module(modules: Mapping[str, nn.Module], layer: str) -> nn.Module | None:
    """That of a network; text encoders had one more level of names before transformers 5."""
    return modules.get(layer) or modules.get(layer.removeprefix("text_model.")) or modules.get(f"text_model.{layer}")


def _misfit(down: torch.Size | None, up: torch.Size | None, module: nn.Module | None, network: str) -> str | None:
    """What is wrong with a layer's matrices."""
    if down is None or up is None:
        return "has one matrix of two"
    if module is None:
        return f"takes {down[1]}, the {network} has no such layer"
    if down[0] != up[1]:
        return f"has matrices of rank {down[0]} and {up[1]}"
    for does, made_for, ways in (("takes", down[1], "in"), ("gives", up[0], "out")):
        own = getattr(module, f"{ways}_features", getattr(module, f"{ways}_channels", None))
        if made_for != own:
            return f"{does} {made_for}, the {network} has {own} {ways}puts there"
    return None


def _adapter_folders(path: Path) -> Iterator[tuple[str, Path]]:
    """Folders that PEFT saved, by the network they are for; "" where only the tensors' names can tell."""
    for network, place in (("", path), *((name, path / name) for name in NETWORKS)):
        if (place / _CONFIG).is_file():
            yield network, place


def _check_file(file: Path, field: str) -> None:
    """Raises InvalidRequest before anything is read."""
    if not file.is_file():
        raise InvalidRequest(field, str(file), f"a .safetensors file, or a folder with {FILE} or {_CONFIG} and {_WEIGHTS}")
    if file.suffix != ".safetensors":
        raise InvalidRequest(field, str(file), "a .safetensors file: other formats can run code when they are read")


def _of_file(file: Path) -> LoraWeights:
    """By diffusers' own reader, which turns kohya's names into its own."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    with safe_open(file, framework="pt") as opened:
        config = json.loads((opened.metadata() or {}).get(METADATA, "null"))
        names = list(opened.keys())
    if not any("lora" in name for name in names):
        raise ValueError("it has no tensor of one")
    if any("dora_scale" in name for name in names):
        raise ValueError("its DoRA scales are in kohya's form, which diffusers does not know")
    tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(file), use_safetensors=True)
    prefixed = any(
        name.partition(".")[0] in NETWORKS for name in tensors
    )  # else it is of U-Nets alone, in diffusers' first form
    tensors = tensors if prefixed else {f"unet.{name}": value for name, value in tensors.items()}
    return LoraWeights(_in_pefts_names(tensors), alphas or None, None if alphas else _understood(config))


def _in_pefts_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whatever diffusers called them before it had PEFT."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    found: dict[str, Tensor] = {}
    for network in sorted({name.partition(".")[0] for name in tensors}):
        part = {name.removeprefix(f"{network}."): tensor for name, tensor in tensors.items() if name.startswith(f"{network}.")}
        if network != "unet":
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        elif not any(".lora_A." in name for name in part):
            part = convert_unet_state_dict_to_peft(part)
        found |= {f"{network}.{name}": tensor for name, tensor in part.items()}
    return found


def _of_folders(folders: Mapping[str, Path]) -> LoraWeights:
    """What PEFT saved."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for called, place in folders.items():
        told = json.loads((place / _CONFIG).read_text(encoding="utf8"))
        if told.get("peft_type") != "LORA":
            raise ValueError(f"its {_CONFIG} is of {told.get('peft_type')!r}, not of a LoRA")
        found = {name.removeprefix(_PEFT): value for name, value in load_file(place / _WEIGHTS).items()}
        network = called or _network_of(found)
        tensors |= {f"{network}.{name}": value for name, value in found.items()}
        config |= {f"{network}.{name}": value for name, value in told.items()}
    return LoraWeights(tensors, None, _understood(config))


def _network_of(tensors: Mapping[str, Tensor]) -> str:
    """U-Nets have blocks, text encoders layers."""
    return "text_encoder" if any("encoder.layers." in name for name in tensors) else "unet"


def _understood(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The entries that say what the LoRA does."""
    if not isinstance(config, Mapping):
        return None
    return {name: value for name, value in config.items() if name.rpartition(".")[2] in _UNDERSTOOD} or None


def _fault(weights: LoraWeights) -> str:
    """Why it can be no LoRA of any model; empty: it can."""
    found = layers(weights.tensors)
    if not found:
        return "it has no tensor of one"
    if not all(tensor.isfinite().all() for tensor in weights.tensors.values()):
        return "some of its numbers are infinite or none"
    ranks = [down[0] for down, _ in found.values() if down and len(down) in (2, 4)]
    if len(ranks) < len(found):
        return "a layer has no matrices"
    if max(ranks) > MAX_RANK or min(ranks) < 1:
        return f"of rank 1 to {MAX_RANK}; this has {max(ranks)}"
    return ""
