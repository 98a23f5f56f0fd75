"""Addresses of a room's replicas, from Ray Serve."""

from typing import Any

from services.fabric.peers import Address, Resolver

_TIMEOUT_S = 3.0


def broadcast(handle: Any) -> Resolver:
    """A resolver that asks every running replica behind a DeploymentHandle; those that do not answer are not listed."""

    async def resolve() -> list[Address]:
        answers = await handle.broadcast("addr").results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, Address)]

    return resolve
