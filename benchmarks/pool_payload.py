"""What a request to the teacher pool costs besides the teacher: round trips of a member that computes nothing.

    python -m benchmarks.pool_payload

Alternating turns of every payload, medians; numpy float16 and float32, torch float16; through Ray's object store, and with replies
inlined in the answer up to 100 MB (a second Ray with another limit). Sizes are those of SD 2.1: 4x64x64 latents, and in knowledge
distillation six features. Writes benchmarks/results/pool_payload.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, write
from trainer.pool.client import Limits, PoolClient
from trainer.pool.member import members
from trainer.session import ray_session

LATENT = (4, 64, 64)
FEATURES = ((320, 32, 32), (640, 16, 16), (1280, 16, 16), (1280, 32, 32), (640, 64, 64), (320, 64, 64))
ROUNDS = 25
INLINE_BYTES = 100_000_000


@dataclass(frozen=True)
class Blob:
    """Rows of latents to the member; back come latents alone, or features too, of the same element type."""

    rows: Any
    featured: bool = False
    index_B: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))


class Echo:
    """A teacher that has computed everything already."""

    def __init__(self, device: str) -> None:
        self.replies: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, request: Blob) -> list[Any]:
        rows, shapes = request.rows, (LATENT, *FEATURES) if request.featured else (LATENT,)
        key = (type(rows), rows.dtype, len(rows), request.featured)
        if key not in self.replies:
            zeros = torch.zeros if isinstance(rows, torch.Tensor) else np.zeros
            self.replies[key] = [zeros((len(rows), *shape), dtype=rows.dtype) for shape in shapes]
        return self.replies[key]


def payloads() -> dict[str, Blob]:
    """What is sent, by name."""
    found: dict[str, Blob] = {}
    for batch, featured in ((1, False), (8, False), (32, False), (1, True), (8, True)):
        what = f"batch {batch}{', features' if featured else ''}"
        shape = (batch, *LATENT)
        found[f"{what}: numpy float16"] = Blob(np.zeros(shape, np.float16), featured)
        found[f"{what}: numpy float32"] = Blob(np.zeros(shape, np.float32), featured)
        found[f"{what}: torch float16"] = Blob(torch.zeros(shape, dtype=torch.float16), featured)
    return found


def touch(reply: list[Any]) -> float:
    """One copy, as to a device; conversion to float32 is the device's."""
    copies = [part.clone() if isinstance(part, torch.Tensor) else part.copy() for part in reply]
    return sum(float(part[0, 0, 0, 0]) for part in copies)


def round_trips() -> list[dict[str, Any]]:
    """Median milliseconds of each payload, all in turn, in one Ray."""
    with ray_session():
        client = PoolClient(members(Echo, 1, Limits(max_batch=1), num_cpus=0), Limits())
        times: dict[str, list[float]] = {name: [] for name in payloads()}
        for turn in range(ROUNDS + 2):
            for name, blob in payloads().items():
                start = time.perf_counter()
                touch(client.submit(blob).result())  # type: ignore[arg-type]
                if turn > 1:
                    times[name].append(time.perf_counter() - start)
    return [
        {
            "payload": name,
            "ms": round(1000 * statistics.median(times[name]), 2),
            "ms_quartiles": [round(1000 * q, 2) for q in statistics.quantiles(times[name], n=4)[::2]],
            "bytes_sent": nbytes(blob, features=False),
            "bytes_received": nbytes(blob, features=blob.featured),
        }
        for name, blob in payloads().items()
    ]


def nbytes(blob: Blob, *, features: bool) -> int:
    """Of the latents of a blob, and of its features."""
    each = sum(int(np.prod(shape)) for shape in ((LATENT, *FEATURES) if features else (LATENT,)))
    return each * len(blob.rows) * int(blob.rows.dtype.itemsize)


def main() -> None:
    """Two Rays, one after the other: Ray reads its limits once a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trips", action="store_true", help="of one Ray, as JSON")
    if parser.parse_args().round_trips:
        print(json.dumps(round_trips()))
        return
    lines = []
    for transport, extra in (
        ("object store above 100 KB", {}),
        (
            "inlined",
            {"RAY_max_direct_call_object_size": str(INLINE_BYTES), "RAY_task_rpc_inlined_bytes_limit": str(INLINE_BYTES)},
        ),
    ):
        command = [sys.executable, "-m", "benchmarks.pool_payload", "--round-trips"]
        done = subprocess.run(command, env={**os.environ, **extra}, check=True, stdout=subprocess.PIPE)
        lines += [{"transport": transport, **line} for line in json.loads(done.stdout.splitlines()[-1])]
    print(write("pool_payload", [{"machine": machine(), **line} for line in lines]))


if __name__ == "__main__":
    main()
