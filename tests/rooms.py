"""Rooms in processes of their own, without Ray: a U-Net's, and a ControlNet's that hands it residuals.

    python -m tests.rooms unet FOLDER DIGEST
    python -m tests.rooms controlnet FOLDER DIGEST TARGET PID

Each prints its address and process, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxs.v1 import unet_pb2
from services.controlnet import service as controlnet
from services.fabric.deadline import Deadline
from services.fabric.endpoint import Endpoint
from services.fabric.peers import Address, PeerSet
from services.fabric.server import DataPlane
from services.settings import ServingSettings
from services.unet import service as unet

NODE = "this"


class Room:
    """One such process, as those who call it see it."""

    def __init__(self, *arguments: str | Path, variables: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.rooms", *map(str, arguments)]
        environment = {**os.environ, **variables}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = json.loads(self._process.stdout.readline())
        self.target, self.pid = str(found["target"]), int(found["pid"])

    def kill(self) -> None:
        """At once."""
        self._process.kill()
        self._process.communicate()

    def close(self) -> int:
        """In good order; its exit code."""
        if self._process.poll() is None:
            self._process.communicate(timeout=60)
        return int(self._process.returncode)

    def opened(self, name: str) -> int:
        """How many lenders' memory of that name it has mapped."""
        maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return len({line.split()[4] for line in maps if name in line})


def peers(kind: str, target: str, pid: int, digest: str) -> PeerSet:
    """That one room, not yet opened."""

    async def resolve() -> Sequence[Address]:
        return [Address(target, digest, pid, NODE)]

    return PeerSet(f"sdxs.v1.{kind}Service", resolve, digest, patience_s=2, refresh_s=1)


async def denoise(kind: str, room: Room, digest: str, requests: Sequence[unet_pb2.DenoiseRequest]) -> list[Any]:
    """The room's answers to all at once; an error is an answer."""
    stage = peers(kind, room.target, room.pid, digest)
    stage.open()
    try:
        calls = [stage.call("Denoise", request.SerializeToString(), Deadline.after(60)) for request in requests]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        await stage.close()
    return [unet_pb2.DenoiseResponse.FromString(each) if isinstance(each, bytes) else each for each in answers]


async def main(kind: str, folder: str, digest: str, *unet_room: str) -> None:
    settings, stage = ServingSettings(), None
    room: Any
    if kind == "unet":
        room, descriptor = unet.load(Path(folder), digest, settings), unet.DESCRIPTOR
    else:
        stage = peers("UNet", unet_room[0], int(unet_room[1]), digest)
        stage.open()
        room, descriptor = controlnet.load(Path(folder), digest, settings, stage, NODE), controlnet.DESCRIPTOR
    plane = DataPlane(Endpoint(descriptor, room, settings.max_in_flight), settings.max_message_bytes, lines=True)
    await plane.start("127.0.0.1:0")
    print(json.dumps({"target": plane.address, "pid": os.getpid()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await plane.drain(1)
    room.close()
    if stage is not None:
        await stage.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
