"""The served chain under load: what it adds to one image, how many it makes with 32 callers, what it does when twice as many come.

    python -m benchmarks.load                    `sdxs serve` on Ray, the emoji model, this machine
    python -m benchmarks.load --local            one process

Against the same networks in this process, the prompt encoded once, as the gateway's cache has it: one image after the other, and in
batches as large as the server's, on one and on two threads. Writes benchmarks/results/load.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, write
from benchmarks.served import server
from sdxs import images, registry
from sdxs.client import AsyncClient
from sdxs.errors import SdxsError
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.prompts import Prompts
from services.settings import ServingSettings

PROMPT, CALLERS, DEADLINE_S = "red apple", 32, 2.0


class InProcess:
    """The networks without a server."""

    def __init__(self, model: str) -> None:
        folder, manifest = registry.open_model(model, ServingSettings())
        self._pipeline = OneStepPipeline.from_bundle(folder)
        self._text = self._pipeline.text_encoder.encode([PROMPT])
        self._receipt = images.receipt(PROMPT, 7, manifest.name, manifest.digest)

    def draw(self, count: int) -> None:
        """So many images in one batch, encoded as the server's are."""
        noise_BCHW = np.stack([latent_noise(7, self._pipeline.unet.latent_shape)] * count)
        latent_BCHW = self._pipeline.unet.denoise(noise_BCHW, Prompts.stack([self._text] * count))
        for image_HWC in self._pipeline.decoder.decode(latent_BCHW):
            images.encode(image_HWC, images.JPEG, self._receipt)

    def rate(self, batch: int, threads: int, seconds: float) -> float:
        """Images a second."""
        torch.set_num_threads(threads)
        for _ in range(3):
            self.draw(batch)
        began, made = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            self.draw(batch)
            made += batch
        torch.set_num_threads(1)
        return made / (time.perf_counter() - began)


async def one_by_one(address: str, here: InProcess, rounds: int) -> list[dict[str, Any]]:
    """In turns, so that both meet the same machine."""
    mine, theirs = list[float](), list[float]()
    async with AsyncClient(address) as client:
        for i in range(rounds + 10):
            began = time.perf_counter()
            here.draw(1)
            between = time.perf_counter()
            await client.generate(PROMPT, seed=7)
            if i >= 10:
                mine.append(1e3 * (between - began))
                theirs.append(1e3 * (time.perf_counter() - between))
    added = statistics.median(theirs) - statistics.median(mine)
    facts = {"in_process_ms": statistics.median(mine), "served_ms": statistics.median(theirs), "added_ms": added}
    share = statistics.median(mine) / statistics.median(theirs)
    return [
        {"what": "one caller", **{k: round(v, 2) for k, v in facts.items()}, "model_share": round(share, 3), "rounds": rounds}
    ]


async def throughput(address: str, here: InProcess, seconds: float) -> list[dict[str, Any]]:
    """32 callers, each with one request at a time, against batches in this process."""
    loop = {threads: here.rate(ServingSettings().max_batch, threads, seconds) for threads in (1, 2)}
    ends, batches = time.perf_counter() + seconds, list[int]()

    async def call() -> int:
        made = 0
        async with AsyncClient(address) as client:
            while time.perf_counter() < ends:
                batches.append((await client.generate(PROMPT, seed=7)).receipt.unet_batch)
                made += 1
        return made

    began = time.perf_counter()
    made = sum(await asyncio.gather(*(call() for _ in range(CALLERS))))
    rate = made / (time.perf_counter() - began)
    return [
        {
            "what": f"{CALLERS} callers", "served_per_s": round(rate, 1), "in_process_per_s": {k: round(v, 1) for k, v in loop.items()},
            "share": round(rate / max(loop.values()), 3), "mean_batch": round(statistics.mean(batches), 2),
        }
    ]  # fmt: skip


async def watch(lags: list[float]) -> None:
    """How late this process itself is: it shares the cores with the server, and what it measures has its lag in it."""
    while True:
        due = time.perf_counter() + 0.005
        await asyncio.sleep(0.005)
        lags.append(time.perf_counter() - due)


async def overload(address: str, rate: float, seconds: float) -> list[dict[str, Any]]:
    """Requests at twice what 32 callers got, each with a deadline, whatever comes back."""
    outcomes, latencies, refusals = Counter[str](), list[float](), list[float]()

    async def call(client: AsyncClient) -> None:
        began = time.perf_counter()
        try:
            await client.generate(PROMPT, seed=7, timeout=DEADLINE_S)
        except SdxsError as error:
            outcomes[error.code] += 1
            if error.code == "RESOURCE_EXHAUSTED":
                refusals.append(time.perf_counter() - began)
        else:
            outcomes["OK"] += 1
            latencies.append(time.perf_counter() - began)

    lags = list[float]()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        began, sent, watching = time.perf_counter(), 0, group.create_task(watch(lags))
        while time.perf_counter() - began < seconds:
            group.create_task(call(client))
            sent += 1
            await asyncio.sleep(max(0.0, sent / rate - (time.perf_counter() - began)))
        watching.cancel()

    def ms(values: list[float], percent: float) -> float | None:
        return round(1e3 * float(np.percentile(values, percent)), 1) if values else None

    return [
        {
            "what": "twice as many", "asked_per_s": round(rate, 1), "deadline_ms": 1e3 * DEADLINE_S, **outcomes,
            "p50_ms": ms(latencies, 50), "p99_ms": ms(latencies, 99), "refused_p50_ms": ms(refusals, 50),
            "refused_p99_ms": ms(refusals, 99), "own_lag_p50_ms": ms(lags, 50), "own_lag_p99_ms": ms(lags, 99),
        }
    ]  # fmt: skip


async def measure(model: str, local: bool, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """All rows."""
    here = InProcess(model)
    with server("--model", model, *(["--local"] if local else [])) as address:
        rows = [*await one_by_one(address, here, rounds), *await throughput(address, here, seconds)]
        rows += await overload(address, 2 * rows[-1]["served_per_s"], seconds)
    return [{"server": "one process" if local else "Ray Serve", **row} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--local", action="store_true", help="`sdxs serve --local`")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=200, help="images one by one")
    options = parser.parse_args(arguments)
    rows = asyncio.run(measure(options.model, options.local, options.seconds, options.rounds))
    for row in rows:
        print(row)
    print(write("load_local" if options.local else "load", [{**row, "machine": machine()} for row in rows]))


if __name__ == "__main__":
    main()
