"""What LoRAs cost a replica: attached, switched, one forward for each set of them, and PEFT's mixed batches beside it.

python -m benchmarks.lora --model emoji
python -m benchmarks.lora --config out/sdxs-512/unet/config.json --batch 4 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxs import registry
from sdxs.lora.adapters import Adapters
from sdxs.lora.files import LoraWeights
from sdxs.settings import Settings

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def main() -> None:
    """Print one JSON line of medians, in milliseconds of this process's own time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--config", type=Path, help="a U-Net's config.json: random weights of that shape in place of a model's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(Settings().torch_threads)
    unet = _network(given.config or registry.open_model(given.model, Settings())[0] / "unet" / "config.json")
    print(json.dumps(measure(unet, given.rank, given.batch, given.repeats)))


@torch.inference_mode()
def measure(unet: Any, rank: int, batch: int, repeats: int) -> dict[str, float]:
    """Medians of `repeats`, in milliseconds."""
    inputs, adapters = _inputs(unet, batch), Adapters({"unet": unet})

    def forward(part: slice = slice(None)) -> None:
        adapters.networks["unet"](inputs[0][part], 999, inputs[1][part], return_dict=False)

    found = {"batch without LoRAs": _median(forward, repeats)}
    names = [f"style{i}" for i in range(4)]
    fitted = [adapters.fit(_random(unet, rank, seed), "", "") for seed in range(len(names))]
    for name, part in zip(names, fitted, strict=True):
        began = _clock()
        dressed = adapters.attached(name, part)
        found["attach the fourth, in a thread"] = (_clock() - began) * 1e3
        began = _clock()
        adapters.put(dressed)
        found["put in place"] = (_clock() - began) * 1e3
    found["batch, all attached, none used"] = _median(forward, repeats)

    def switch() -> None:
        with adapters.use([(names[0], 1.0)]):
            pass

    found["switch on and off"] = _median(switch, repeats)

    def grouped(groups: Sequence[str]) -> None:
        size = batch // len(groups)
        for i, name in enumerate(groups):
            with adapters.use([(name, 1.0)]):
                forward(slice(i * size, (i + 1) * size))

    found["batch of 1 LoRA"] = _median(lambda: grouped(names[:1]), repeats)
    found["batch of 4 LoRAs, a forward each"] = _median(lambda: grouped(names), repeats)
    with (
        adapters.use([(name, 1.0) for name in names]),
        _Mixed(adapters.networks["unet"], [names[i * 4 // batch] for i in range(batch)]),
    ):
        found["batch of 4 LoRAs, mixed by PEFT"] = _median(forward, repeats)
    return {name: round(value, 2) for name, value in found.items()}


class _Mixed:
    """PEFT's own way to have another LoRA for each image of a batch: one each, and no scale of its own."""

    def __init__(self, unet: Any, names: Sequence[str]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers: list[Any] = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self._names = list(names)

    def __enter__(self) -> None:
        def told(_: Any, arguments: Any, options: dict[str, Any]) -> Any:
            return arguments, {**options, "adapter_names": self._names}

        self._hooks = [layer.register_forward_pre_hook(told, with_kwargs=True) for layer in self._layers]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _network(config: Path) -> Any:
    torch.manual_seed(0)
    network: Any = UNet2DConditionModel.from_config(json.loads(config.read_text()))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _inputs(unet: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = unet.config
    noise = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    return noise.contiguous(memory_format=torch.channels_last), torch.randn(batch, 77, config.cross_attention_dim)


def _random(unet: Any, rank: int, seed: int) -> LoraWeights:
    torch.manual_seed(seed)
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith(TARGETS):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, module.in_features) / 100
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, rank) / 100
    return LoraWeights(tensors)


def _median(function: Callable[[], Any], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        began = _clock()
        function()
        seconds.append(_clock() - began)
    return statistics.median(seconds) * 1e3


_clock = time.process_time  # of this process alone: others do not count


if __name__ == "__main__":
    main()
