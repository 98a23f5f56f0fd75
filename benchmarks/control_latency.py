"""What a ControlNet adds to one step at full size: ControlNet + U-Net + decoder beside U-Net + decoder, SDXS-512 with random weights.

    python -m benchmarks.control_latency                                          float32 on this CPU
    python -m benchmarks.control_latency --device cuda --dtype float16 --compile  as a GPU would serve it

In turns, medians, batch 1; the text is given. With and without the mid block of the published ControlNets. Writes
benchmarks/results/control_latency.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.machine import machine, write
from sdxs.controlnet import StudentControlNetModel, config_for
from trainer.models.families import family
from trainer.models.students import decoder_config, student_config

TEXT = (77, 1024)


@dataclass(frozen=True)
class Place:
    """Where and in what the networks compute."""

    device: str
    dtype: torch.dtype
    compiled: bool

    def of(self, network: Any) -> Any:
        """The network there, frozen."""
        placed = network.to(self.device, self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        return torch.compile(placed, mode="max-autotune") if self.compiled else placed

    def tensor(self, *shape: int) -> Tensor:
        """Random numbers there."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def wait(self) -> None:
        """For all that was asked of the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


class Chain(nn.Module):
    """One step from noise to an image; x0 is combined in float32."""

    def __init__(self, unet: Any, decoder: Any, controlnet: Any = None) -> None:
        super().__init__()
        self.unet, self.decoder, self.controlnet = unet, decoder, controlnet

    @torch.inference_mode()
    def forward(self, noise_BCHW: Tensor, text_BLD: Tensor, map_BCHW: Tensor) -> Tensor:
        """float image (B, 3, H, W)."""
        added: dict[str, Any] = {}
        if self.controlnet is not None:
            down, mid = self.controlnet(noise_BCHW, 999, text_BLD, controlnet_cond=map_BCHW, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        output = self.unet(noise_BCHW, 999, text_BLD, return_dict=False, **added)[0].float()
        latent = 14.6146 * (noise_BCHW.float() - output)
        image: Tensor = self.decoder(latent.to(noise_BCHW.dtype))
        return image


def chains(place: Place) -> dict[str, Chain]:
    """Without a ControlNet, with a mid-free one, with one of the published kind."""
    config = student_config(family("sd21").unet, "sdxs")
    unet, vae = place.of(UNet2DConditionModel(**config)), AutoencoderTiny(**decoder_config(4))
    decoder = place.of(vae.decoder)
    free = config_for(config, 8)
    mid = {name: value for name, value in free.items() if name != "time_embedding_dim"} | {
        "mid_block_type": "UNetMidBlock2DCrossAttn"
    }
    return {
        "U-Net + decoder": Chain(unet, decoder),
        "with the ControlNet without a mid block": Chain(unet, decoder, place.of(StudentControlNetModel(**free))),
        "with the published kind": Chain(unet, decoder, place.of(ControlNetModel(**mid))),
    }


def call_ms(run: Callable[[], object], place: Place) -> float:
    """Of one call, the device waited for."""
    place.wait()
    start = time.perf_counter()
    run()
    place.wait()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile with CUDA graphs")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    place = Place(chosen.device, getattr(torch, chosen.dtype), chosen.compile)
    side = chosen.pixels // 8
    inputs = place.tensor(1, 4, side, side), place.tensor(1, *TEXT), place.tensor(1, 3, chosen.pixels, chosen.pixels)
    ways = chains(place)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(chosen.rounds + 1):
        for name, chain in ways.items():
            ms = call_ms(partial(chain, *inputs), place)
            if turn:
                times[name].append(ms)
    alone = statistics.median(times["U-Net + decoder"])
    lines = []
    for name, found in times.items():
        ms = statistics.median(found)
        lines.append(
            {
                "way": name,
                "pixels": chosen.pixels,
                "device": chosen.device,
                "dtype": chosen.dtype,
                "ms": round(ms, 2),
                "times": round(ms / alone, 3),
            }
        )
        print(f"{name:42} {ms:10.1f} ms {ms / alone:6.2f} times")
    print(write("control_latency", [{"machine": machine(), **line} for line in lines]))


if __name__ == "__main__":
    main()
