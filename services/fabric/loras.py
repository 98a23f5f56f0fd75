"""LoRAs on a stage's replica: fetched by digest, attached between two batches, the least recently used detached.

What takes time (the store, the file, the check, PEFT) happens in threads of its own: requests with other LoRAs or none go on meanwhile.
"""

import asyncio
import contextlib
import copy
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sdxs.errors import InvalidRequest, SdxsError, Unavailable
from sdxs.lora import check_distinct, check_number, check_scale
from sdxs.v1 import lora_pb2

if TYPE_CHECKING:
    from sdxs.lora.adapters import Adapters, Fitted, Use
    from services.settings import ServingSettings

Between = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a function while the device computes nothing."""


class Networks(Protocol):
    """What `ReplicaLoras` needs of sdxs.lora.adapters.Adapters."""

    def attached(self, name: str, fitted: "Fitted") -> Any:
        """With one more."""
        ...

    def detached(self, name: str) -> Any:
        """With one less."""
        ...

    def put(self, dressed: Any) -> None:
        """Compute with what one of the two gave."""
        ...


@dataclass(eq=False)
class _Held:
    """One that is attached, or about to be."""

    loading: "asyncio.Task[None]"
    in_use: int = 0
    nbytes: int = 0
    """Once it is attached."""


class ReplicaLoras:
    """Those of one replica.

    Args:
        stage: as a StageTime calls it.
        networks: where they are attached.
        read: a LoRA of a digest that fits them; called in a thread.
        between: see Between.
        most: how many stay attached; those in use do, however many.
        most_bytes: of theirs on the device.
    """

    def __init__(
        self, stage: str, networks: Networks, read: "Callable[[str], Fitted]", between: Between, most: int, most_bytes: int
    ) -> None:
        self.stage = stage
        self.hits = self.misses = 0
        """How often one was there, or was not."""
        self._networks, self._read, self._between = networks, read, between
        self._most, self._most_bytes = most, most_bytes
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._leaving: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def hold(self, asked: Sequence[lora_pb2.LoraUse]) -> "AsyncIterator[tuple[Use, ...]]":
        """Those that a request asks for, attached until the block ends, as `Adapters.use` takes them.

        Raises InvalidRequest, NotFound and CorruptArtifact in the field `loras[i]`, and Unavailable.
        """
        _check(asked)
        held = [self._take(use.digest) for use in asked]
        try:
            for i, each in enumerate(held):
                try:
                    await asyncio.shield(each.loading)
                except Unavailable:
                    raise  # that is nobody's field
                except SdxsError as error:
                    raise _named(error, f"loras[{i}]") from error
            yield tuple((key(use.digest), use.scale) for use in asked)
        finally:
            for each in held:
                each.in_use -= 1
            self._make_room()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Of those that are attached."""
        return sum(each.nbytes for each in self._held.values())

    def close(self) -> None:
        """After the last call."""
        for each in self._held.values():
            each.loading.cancel()

    def _take(self, digest: str) -> _Held:
        """One load at a time for each digest."""
        held = self._held.get(digest)
        if held is None:
            self.misses += 1
            held = self._held[digest] = _Held(asyncio.create_task(self._load(digest)))
            held.loading.add_done_callback(lambda task: self._forget_failed(digest, task))
        else:
            self.hits += 1
            self._held.move_to_end(digest)
        held.in_use += 1
        return held

    async def _load(self, digest: str) -> None:
        fitted = await asyncio.to_thread(self._read, digest)
        await self._change(lambda: self._networks.attached(key(digest), fitted))
        self._held[digest].nbytes = fitted.nbytes

    async def _change(self, dress: Callable[[], Any]) -> None:
        """Dress the networks in a thread, and put them in place between two batches; one change at a time."""
        async with self._changing:
            dressed = await asyncio.to_thread(dress)
            await self._between(lambda: self._networks.put(dressed))

    def _forget_failed(self, digest: str, task: "asyncio.Task[None]") -> None:
        """Whoever asks next tries again."""
        if task.cancelled() or task.exception() is not None:
            self._held.pop(digest, None)

    def _make_room(self) -> None:
        """Detach the least recently used that nobody uses."""
        for digest, each in list(self._held.items()):
            if len(self) <= self._most and self.nbytes <= self._most_bytes:
                return
            if not each.in_use and each.loading.done():
                del self._held[digest]
                self._detach(digest)

    def _detach(self, digest: str) -> None:
        leaving = asyncio.create_task(self._change(lambda: self._networks.detached(key(digest))))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)


def replica_loras(stage: str, adapters: "Adapters", between: Between, settings: "ServingSettings") -> ReplicaLoras:
    """Those of the store of models, for a stage's networks; imports torch."""
    from sdxs.lora import published
    from sdxs.lora.files import read
    from sdxs.store import open_store

    def fitting(digest: str) -> "Fitted":
        file, manifest = published.fetch(digest, open_store(settings, "models"), settings.cache_dir, settings.max_lora_bytes)
        try:
            weights = read(file, "", most=settings.max_lora_bytes)
        except InvalidRequest as error:
            raise InvalidRequest("", manifest.name, error.allowed) from error  # the file's place is nobody's business
        return adapters.fit(weights, "", manifest.name)

    return ReplicaLoras(stage, adapters, fitting, between, settings.max_loras, settings.lora_cache_bytes)


def key(digest: str) -> str:
    """Under which it is attached: PEFT's names have no colon."""
    return digest.removeprefix("sha256:")


def _check(asked: Sequence[lora_pb2.LoraUse]) -> None:
    """Raises InvalidRequest."""
    check_number(asked)
    for i, use in enumerate(asked):
        check_scale(use.scale, f"loras[{i}]")
    check_distinct(use.digest for use in asked)


def _named(error: SdxsError, field: str) -> SdxsError:
    """The same about a field; several may wait for the one that failed."""
    if isinstance(error, InvalidRequest):
        return InvalidRequest(field, error.value, error.allowed)
    named = copy.copy(error)
    named.field = field
    return named
