"""LoRAs on the networks of a stage, through PEFT: attached once, then switched between two forward passes. Imports torch."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdxs.errors import InvalidRequest
from sdxs.lora.files import NETWORKS, LoraWeights, check_fit

Use = tuple[str, float]
"""A LoRA by the name it was attached under, and its scale."""


@dataclass(frozen=True)
class Part:
    """What a LoRA adds to one network, as PEFT takes it."""

    config: Any
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """A LoRA for certain networks, in their type and on their device."""

    parts: Mapping[str, Part]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts.values() for tensor in part.tensors.values())


@dataclass(frozen=True)
class Dressed:
    """Networks with certain LoRAs, none in use."""

    networks: Mapping[str, Any]
    layers: tuple[Any, ...]
    """Those that PEFT has wrapped."""

    @classmethod
    def of(cls, networks: Mapping[str, Any]) -> Dressed:
        """As they are."""
        return cls(networks, tuple(layer for network in networks.values() for layer in _wrapped(network)))


class Adapters:
    """Those of one stage.

    Networks are not changed but replaced: by copies that share every weight and have a LoRA more or less. To make one takes a tenth of a
    second, in any thread; to `put` it in place and to `use` LoRAs are matters of whoever computes.

    A layer that a LoRA was ever attached to is wrapped by PEFT. With none in use it calls the layer it wraps: the same bits as before.
    """

    def __init__(self, networks: Mapping[str, Any]) -> None:
        self._elsewhere = [name for name in NETWORKS if (name == "unet") != ("unet" in networks)]
        self._dressed = Dressed(networks, ())

    @property
    def networks(self) -> Mapping[str, Any]:
        """Those in place."""
        return self._dressed.networks

    def fit(self, weights: LoraWeights, field: str, shown: str) -> Fitted:
        """Its part for these networks. Raises InvalidRequest where it does not fit them."""
        check_fit(weights, self.networks, field, shown, self._elsewhere)
        found = {name: (weights.of([name]), network) for name, network in self.networks.items()}
        try:
            return Fitted({name: _part(part, name, network) for name, (part, network) in found.items() if part.tensors})
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(field, shown, f"a LoRA that PEFT knows ({error})") from error

    def attached(self, name: str, fitted: Fitted) -> Dressed:
        """The networks with one LoRA more. Raises InvalidRequest without a field when PEFT cannot."""
        networks = {key: _copy(network) if key in fitted.parts else network for key, network in self.networks.items()}
        try:
            for key, part in fitted.parts.items():
                _attach(name, part, networks[key])
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise InvalidRequest("", "", f"a LoRA that PEFT can attach ({error})") from error
        return Dressed.of(networks)

    def detached(self, name: str) -> Dressed:
        """The networks without it."""
        networks = {key: _copy(network) for key, network in self.networks.items()}
        for network in networks.values():
            for layer in _wrapped(network):
                _switch(layer, [])
                layer.delete_adapter(name)
            getattr(network, "peft_config", {}).pop(name, None)
        return Dressed.of(networks)

    def put(self, dressed: Dressed) -> None:
        """Compute with these from now on. They must be made of those that are in place: one change at a time."""
        for layer in dressed.layers:
            _switch(layer, [])
        self._dressed = dressed

    @contextlib.contextmanager
    def use(self, loras: Sequence[Use]) -> Iterator[None]:
        """Within the block the networks compute with these, in this order; those of scale 0 are left out."""
        counting = [(name, scale) for name, scale in loras if scale]
        if not counting:
            yield
            return
        layers = self._dressed.layers
        for layer in layers:
            _switch(layer, [name for name, _ in counting])
            for name, scale in counting:
                layer.set_scale(name, scale)
        try:
            yield
        finally:
            for layer in layers:
                _switch(layer, [])


def _copy(network: Any) -> Any:
    """Modules of its own, the same weights."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def _switch(layer: Any, names: list[str]) -> None:
    """What PEFT's set_adapter and enable_adapters do, without their bookkeeping for training, which takes fifty times as long."""
    layer._active_adapter, layer._disable_adapters = names, not names


def _wrapped(network: Any) -> Iterator[Any]:
    """Its layers that PEFT has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def _part(weights: LoraWeights, prefix: str, network: Any) -> Part:
    """For one network."""
    # A level of names that transformers 5 took away.
    strip = "" if prefix == "unet" or hasattr(network, "text_model") else "text_model."

    def own(entries: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            name.removeprefix(f"{prefix}.").removeprefix(strip): _stripped(value, strip)
            for name, value in (entries or {}).items()
            if name.startswith(f"{prefix}.")
        }

    tensors = {name: value.to(network.device, network.dtype) for name, value in own(weights.tensors).items()}
    return Part(_config(tensors, own(weights.alphas), own(weights.config), prefix == "unet"), tensors)


def _config(tensors: Mapping[str, Tensor], alphas: Mapping[str, float], told: Mapping[str, Any], is_unet: bool) -> Any:
    """PEFT's, by what the file says, else by ranks and alphas, as diffusers does (loaders/peft.py, loaders/lora_base.py)."""
    from diffusers.utils import get_peft_kwargs
    from peft import LoraConfig

    ranks = {
        f"^{name}" if is_unet else name: value.shape[1]
        for name, value in tensors.items()
        if "lora_B" in name and value.ndim > 1
    }
    options = get_peft_kwargs(ranks, network_alpha_dict=dict(alphas), peft_state_dict=dict(tensors), is_unet=is_unet)
    return LoraConfig(**options | {name: value for name, value in told.items() if name != "target_modules"})


def _stripped(patterns: Any, strip: str) -> Any:
    """The names of layers in a rank_pattern or an alpha_pattern, as those of tensors."""
    return {name.removeprefix(strip): value for name, value in patterns.items()} if isinstance(patterns, dict) else patterns


def _attach(name: str, part: Part, network: Any) -> None:
    """To one network. Raises ValueError for tensors that found no place."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
        inject_adapter_in_model(part.config, network, adapter_name=name, low_cpu_mem_usage=True, state_dict=dict(part.tensors))
    found: Any = set_peft_model_state_dict(network, dict(part.tensors), adapter_name=name, low_cpu_mem_usage=True)
    lost = [*found.unexpected_keys, *(key for key in found.missing_keys if f".{name}." in key)]
    if lost:
        raise ValueError(f"{len(lost)} tensors of it have no place, among them {lost[0]}")
