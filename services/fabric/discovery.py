"""A room's replicas, found through Ray Serve."""

from typing import Any

from services.fabric.peers import Address, PeerSet, Resolver
from services.settings import ServingSettings

_TIMEOUT_S = 3.0


def broadcast(handle: Any) -> Resolver:
    """A resolver that asks every running replica behind a DeploymentHandle; those that do not answer are not listed."""

    async def resolve() -> list[Address]:
        answers = await handle.broadcast("addr").results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, Address)]

    return resolve


def replicas(
    service: str, handle: Any, model_digest: str, settings: ServingSettings, near: str = "", hurried: bool = True
) -> PeerSet:
    """The replicas behind a DeploymentHandle as callers see them, not yet opened; see PeerSet."""
    limits = (settings.refresh_s, settings.patience_s, settings.max_message_bytes)
    return PeerSet(service, broadcast(handle), model_digest, *limits, near=near, hurried=hurried)
