"""LoRAs of a gateway's requests: what a name means is settled here, once, so that replicas and receipts agree.

A settled request names its LoRAs by digest. Manifests never change and are kept; where a name points is asked again and again.
"""

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from sdxs.errors import DeadlineExceeded, InvalidRequest, NotFound, SdxsError, Unavailable
from sdxs.lora import check_distinct, check_number, check_scale, published
from sdxs.lora.manifest import LoraManifest
from sdxs.pointers import DIGEST
from sdxs.store import ObjectStore, open_store
from sdxs.v1 import gateway_pb2, lora_pb2
from services.fabric.deadline import Deadline
from services.gateway.names import copied
from services.settings import ServingSettings

_KEPT = 4096


class LoraNames:
    """Names and digests of LoRAs.

    Args:
        store: of models; opened when it is first needed.
        fresh_s: for how long a name means what it meant. While the store is away it does on.
    """

    def __init__(self, store: Callable[[], ObjectStore], fresh_s: float) -> None:
        self._store = functools.cache(store)
        self._fresh_s = fresh_s
        self._manifests: OrderedDict[str, LoraManifest] = OrderedDict()
        self._names: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def known(self, digest: str) -> LoraManifest:
        """Of a LoRA that was settled. Raises NotFound."""
        if digest not in self._manifests:
            raise NotFound(f"LoRA {digest!r} is not known")
        self._manifests.move_to_end(digest)
        return self._manifests[digest]

    async def settled(self, request: gateway_pb2.GenerateRequest, deadline: Deadline) -> gateway_pb2.GenerateRequest:
        """The request with digests in place of the names of its LoRAs.

        Raises InvalidRequest and NotFound that name the field, DeadlineExceeded, and what the store does.
        """
        if not request.loras:
            return request
        settled = copied(request)
        del settled.loras[:]
        settled.loras.extend(await self.settle(request.loras, deadline))
        return settled

    async def settle(self, asked: Sequence[lora_pb2.Lora], deadline: Deadline) -> list[lora_pb2.Lora]:
        """The same for a list of LoRAs."""
        check_number(asked)
        for i, each in enumerate(asked):
            if each.HasField("scale"):
                check_scale(each.scale, f"loras[{i}]")
        digests = [await self._digest(each.name, f"loras[{i}].name", deadline) for i, each in enumerate(asked)]
        check_distinct(digests)
        return [
            lora_pb2.Lora(name=digest, scale=each.scale if each.HasField("scale") else 1.0)
            for digest, each in zip(digests, asked, strict=True)
        ]

    async def listing(self, model: str) -> gateway_pb2.ListLorasResponse:
        """Those of one model, or all. Raises what the store does."""
        found = await asyncio.to_thread(lambda: published.listing(self._store()))
        return gateway_pb2.ListLorasResponse(
            loras=[
                gateway_pb2.PublishedLora(
                    name=each.name,
                    pointer=each.pointer,
                    digest=each.digest,
                    model=each.manifest.model,
                    rank=each.manifest.rank,
                    trigger_words=each.manifest.trigger_words,
                    description=each.manifest.description,
                )
                for each in found
                if model in ("", each.manifest.model)
            ]
        )

    async def _digest(self, name: str, field: str, deadline: Deadline) -> str:
        """What a name or the beginning of a digest means now."""
        if name in self._manifests:
            self._manifests.move_to_end(name)
            return name
        at, digest = self._names.get(name, (-float("inf"), ""))
        if digest in self._manifests and (DIGEST.fullmatch(name) or time.monotonic() - at < self._fresh_s):
            return digest
        try:
            async with asyncio.timeout(deadline.remaining()):
                manifest = await asyncio.to_thread(lambda: published.read_manifest(name, self._store(), field))
        except TimeoutError:
            raise DeadlineExceeded(f"{field}: the store did not answer in time") from None
        except Unavailable:
            if digest in self._manifests:
                return digest
            raise
        except InvalidRequest as error:
            raise InvalidRequest(field, error.value, error.allowed) from None
        except SdxsError as error:
            error.field = field
            raise
        _keep(self._manifests, manifest.digest, manifest)
        _keep(self._names, name, (time.monotonic(), manifest.digest))
        return manifest.digest


def _keep(kept: OrderedDict[str, Any], key: str, value: Any) -> None:
    """The oldest leave."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > _KEPT:
        kept.popitem(last=False)


def open_loras(settings: ServingSettings) -> LoraNames:
    """Those of the settings' store of models."""
    return LoraNames(lambda: open_store(settings, "models"), settings.models_watch_s)
