"""What the tests of a running server share: raw calls, and what an error says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from sdxs import images, rpc
from sdxs.pipeline import OneStepPipeline
from sdxs.v1 import gateway_pb2

GATEWAY = "sdxs.v1.GatewayService"


@dataclass(frozen=True)
class Refusal:
    """A failed call's code and the fields it blames."""

    code: grpc.StatusCode
    fields: tuple[str, ...]
    message: str


def refusal(address: str, method: str, payload: bytes) -> Refusal:
    """Send bytes as they are to the gateway; the call must fail."""
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(f"/{GATEWAY}/{method}")
        try:
            call(payload, timeout=30)
        except grpc.RpcError as error:
            known: Any = error
            fields = tuple(violation.field for violation in rpc.violations(known.trailing_metadata()))
            return Refusal(known.code(), fields, known.details())
    raise AssertionError(f"{method} took {payload!r}")


def message(**fields: Any) -> bytes:
    """An encoded GenerateRequest; a prompt unless another is given."""
    return gateway_pb2.GenerateRequest(**{"prompt": "red apple", **fields}).SerializeToString()


LONG = "a " * 20  # more tokens than the tiny model reads, fewer characters than the limit

INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND

# (payload of Generate, code, field)
BAD_REQUESTS = [
    (message(prompt=""), INVALID, "prompt"),
    (message(prompt=" \n"), INVALID, "prompt"),
    (message(prompt=LONG), INVALID, "prompt"),
    (message(prompt="a" * 5000), INVALID, "prompt"),
    (message(model="nobody"), MISSING, "model"),
    (message(width=33), INVALID, "width"),
    (message(height=512), INVALID, "height"),
    (message(seed=-1), INVALID, "seed"),
    (message(seed=2**63 - 1, n=2), INVALID, "seed"),
    (message(n=17), INVALID, "n"),
    (message(format=99), INVALID, "format"),
    (b"\x0a\x02\xff\xfe", INVALID, "prompt"),
    (b"\x0a\x7f", INVALID, "prompt"),
    (b"\x0a\x01a\x12\x01\xff", INVALID, "model"),
    (b"\xff" * 20, INVALID, "request"),
]


def in_process(folder: Path, prompt: str, seed: int, image_format: int) -> bytes:
    """The file the library makes without a server, receipt included."""
    pipeline = OneStepPipeline.from_bundle(folder)
    receipt = images.receipt(prompt, seed, pipeline.manifest.name, pipeline.manifest.digest)
    return images.encode(np.asarray(pipeline(prompt, seed=seed)[0]), image_format, receipt)
