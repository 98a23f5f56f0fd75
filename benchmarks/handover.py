"""ControlNet residuals on their way to the U-Net, every way beside the others: what the hop costs when neither network computes.

    python -m benchmarks.handover
    python -m benchmarks.handover --device cuda    # residuals of a GPU: handed over there, or by way of the host

Two processes on one machine, as the two replicas are: the sender has the residuals, the receiver is a UNetService whose network reads
every number once and answers. In turns, medians: lent in shared memory; inside the gRPC message; inside it with glibc's own memory
settings instead of the replicas'; over the gateway, as two such messages, which the design avoids; and `fused`, the same service in the
sender's process, with nothing between. With a device also `device`: lent where they are; the other ways then copy them to the host and
back. Writes benchmarks/results/handover.jsonl, with a device handover_<device>.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from benchmarks.machine import machine, write
from sdxs import tensors
from sdxs.prompts import Prompts
from sdxs.residuals import Residuals
from sdxs.stages import place
from sdxs.v1 import text_encoder_pb2, unet_pb2
from services.controlnet.sending import Sender
from services.fabric.deadline import Deadline
from services.fabric.denoising import Facts
from services.fabric.device_handover import lender_of
from services.fabric.endpoint import Endpoint
from services.fabric.environment import REPLICA_ENVIRONMENT
from services.fabric.peers import Address, PeerSet
from services.fabric.server import DataPlane
from services.settings import ServingSettings
from services.unet.receiving import residual_shapes
from services.unet.service import DESCRIPTOR, UNetService

NODE, DIGEST = "this", "sha256:0"
LIMIT = 256 << 20
WIDTHS = {"emoji, 64x64": (64, 128, 192), "SDXS-512, 512x512": (320, 640, 1280), "SDXS-512, 1024x1024": (320, 640, 1280)}
LATENT = {"emoji, 64x64": 8, "SDXS-512, 512x512": 64, "SDXS-512, 1024x1024": 128}
ROUNDS = {"emoji, 64x64": 30, "SDXS-512, 512x512": 15, "SDXS-512, 1024x1024": 5}
UNTIMED = 2  # first rounds: memory is mapped, connections are made


class Reading:
    """A U-Net of a student's shapes that reads each residual once and computes nothing."""

    def __init__(self, size: str) -> None:
        kinds: dict[str, Any] = {
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("UpBlock2D",) * 3,
            "mid_block_type": None,
        }
        with torch.device("meta"):
            self.network = UNet2DConditionModel(block_out_channels=WIDTHS[size], layers_per_block=1, **kinds)

    def denoise(
        self, noise_BCHW: np.ndarray, prompts: Prompts, residuals: Residuals | None = None, inits: Sequence[Any] = ()
    ) -> np.ndarray:
        """The noise."""
        read(residuals)
        return noise_BCHW


def read(residuals: Residuals | None) -> None:
    """Every number once, where the networks compute."""
    if residuals is None:
        return
    device, _ = place(ServingSettings())
    for part in residuals.parts:
        (part if device.type == "cpu" and residuals.on_host else torch.as_tensor(part, device=device)).max()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def latent(size: str) -> tuple[int, int, int]:
    """Its shape."""
    return 4, LATENT[size], LATENT[size]


def service(size: str) -> UNetService:
    """The U-Net's room around it."""
    network: Any = Reading(size)
    return UNetService(
        network, Facts(DIGEST, 8 * LATENT[size], latent(size), (2, 2), 0), ServingSettings(max_message_bytes=LIMIT)
    )


def request() -> unet_pb2.DenoiseRequest:
    """Of one image."""
    text = text_encoder_pb2.EncodeResponse(text=tensors.encode(np.zeros((2, 2), np.float32)), model_digest=DIGEST)
    return unet_pb2.DenoiseRequest(text=text, seeds=[0])


async def serve(size: str) -> None:
    """The receiving process: prints its address, ends with its standard input."""
    plane = DataPlane(Endpoint(DESCRIPTOR, service(size), 8), LIMIT)
    await plane.start("127.0.0.1:0")
    print(json.dumps({"target": plane.address, "pid": os.getpid()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await plane.drain(0)


async def measure(size: str, target: str, pid: int) -> list[dict[str, Any]]:
    """Milliseconds of every way, from this process to the receiver."""

    async def resolve() -> list[Address]:
        return [Address(target, DIGEST, pid, NODE)]

    peers = PeerSet("sdxs.v1.UNetService", resolve, DIGEST, max_message_bytes=LIMIT)
    peers.open()
    settings = ServingSettings(max_message_bytes=LIMIT)
    device, dtype = place(settings)
    shared, inline = Sender(peers, NODE, LIMIT, LIMIT), Sender(peers, NODE, 0, LIMIT)
    lender = lender_of(settings)
    lent = Sender(peers, NODE, LIMIT, LIMIT, lender)
    rng, reading = np.random.default_rng(0), Reading(size)
    shapes = residual_shapes(reading.network, latent(size))
    residuals = Residuals(tuple(rng.normal(size=(1, *shape)).astype(np.float32) for shape in shapes))
    if lender is not None:
        residuals = Residuals(tuple(torch.from_numpy(part).to(device, dtype) for part in residuals.parts))
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "shared memory": partial(through, shared, residuals),
        "message": partial(through, inline, residuals),
        "two messages": partial(through, inline, residuals, 2),
        "fused": partial(inside, reading, residuals),
    }
    if lender is not None:
        ways = {"device": partial(through, lent, residuals)} | ways
    lines = await _rounds(size, ways, sum(part.nbytes for part in residuals.parts))
    assert set(lent.sent) == ({"device"} if lender is not None else set())
    assert set(shared.sent) == {"shared"}
    assert set(inline.sent) == {"inline"}
    await peers.close()
    for sender in (shared, inline, lent):
        sender.close()
    return lines


async def through(sender: Sender, residuals: Residuals, times: int = 1) -> None:
    """So many hops, one after the other."""
    for _ in range(times):
        await sender.send(request(), [residuals], Deadline())


async def inside(reading: Reading, residuals: Residuals) -> None:
    """What is left when there is nobody to hand anything to: the network's own thread reads the residuals."""
    noise_BCHW, prompts = np.zeros((1, 4, 8, 8), np.float32), Prompts(np.zeros((1, 2, 2), np.float32))
    await asyncio.to_thread(reading.denoise, noise_BCHW, prompts, residuals)


async def _rounds(size: str, ways: dict[str, Callable[[], Awaitable[None]]], nbytes: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(UNTIMED + ROUNDS[size]):
        for name, call in ways.items():
            start = time.perf_counter()
            await call()
            if turn >= UNTIMED:
                times[name].append(1000 * (time.perf_counter() - start))
    return [
        {"size": size, "way": name, "bytes": nbytes, "ms": round(statistics.median(found), 3), "worst_ms": round(max(found), 3)}
        for name, found in times.items()
    ]


def pair(size: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Receiver and sender of a size, both with these variables."""
    command, env = [sys.executable, "-m", "benchmarks.handover"], {**os.environ, **environment}
    with subprocess.Popen(
        [*command, "--serve", size], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        found = json.loads(server.stdout.readline())
        address = [size, found["target"], str(found["pid"])]
        done = subprocess.run([*command, "--measure", *address], env=env, check=True, stdout=subprocess.PIPE, text=True)
        server.stdin.close()
    lines = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(lines, list)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", metavar="SIZE", help="be the receiver")
    parser.add_argument("--measure", nargs=3, metavar=("SIZE", "TARGET", "PID"), help="be the sender; prints JSON")
    parser.add_argument(
        "--device", help="where the networks compute, as SDXS_TORCH_DEVICE; `cpu` tries the device's way without one"
    )
    chosen = parser.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.serve))
    elif chosen.measure:
        size, target, pid = chosen.measure
        print(json.dumps(asyncio.run(measure(size, target, int(pid)))))
    else:
        lines, name = [], "handover"
        on_device = {}
        if chosen.device:
            on_device = {"SDXS_TORCH_DEVICE": chosen.device, "SDXS_HANDOVER_DEVICE": "always"}
            name += f"_{chosen.device.partition(':')[0]}"
        for memory, environment in (("replicas' settings", dict(REPLICA_ENVIRONMENT)), ("glibc's settings", {})):
            lines += [{"memory": memory, **line} for size in WIDTHS for line in pair(size, environment | on_device)]
        print(write(name, [{"machine": machine(), **line} for line in lines]))
        for line in lines:
            print(f"{line['memory']:20} {line['size']:22} {line['way']:14} {line['bytes'] / 1e6:6.1f} MB {line['ms']:8.2f} ms")


if __name__ == "__main__":
    main()
