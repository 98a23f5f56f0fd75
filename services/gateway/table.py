"""The models a gateway serves: which bundle answers to a name, and when the one it took over from may go.

All of it runs in one event loop. A call takes a bundle's chain for as long as it needs it; a switch is one assignment, so that every call
is drawn by one bundle from its beginning to its end.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sdxs import sizes
from sdxs.errors import Unavailable
from sdxs.v1 import gateway_pb2
from services.fabric.models import Plan, ServedModel, Wanted
from services.gateway import checks
from services.gateway.chain import Chain
from services.gateway.checks import Order
from services.gateway.loras import LoraNames

_STARTING_RETRY_S = 5.0


class Wakes(Protocol):
    """Has the stages of a model that may sleep started."""

    def touch(self) -> None:
        """Somebody asks for the model."""
        ...


@dataclass(eq=False)
class Entry:
    """One bundle that is open: its chain, and the calls on it."""

    application: str
    model: ServedModel
    chain: Chain
    closing: Callable[[], Awaitable[None]] | None = None
    """Hangs up."""
    waker: Wakes | None = None
    """Of a model that may sleep."""
    in_use: int = 0
    _unused: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def asleep(self) -> bool:
        """Whether nobody answers, and nobody needs to."""
        return self.waker is not None and not self.chain.ready

    @contextlib.contextmanager
    def use(self) -> Iterator[Chain]:
        """The chain, which is not closed before the block ends."""
        self.in_use += 1
        if self.waker is not None:
            self.waker.touch()
        try:
            yield self.chain
        finally:
            self.in_use -= 1
            if not self.in_use:
                self._unused.set()

    async def close(self) -> None:
        """Hang up after the last call that uses it."""
        while self.in_use:
            self._unused.clear()
            await self._unused.wait()
        if self.closing is not None:
            await self.closing()


class ModelTable:
    """Bundles by the reference they are served under, in the order of the plan."""

    def __init__(self, max_image_bytes: int, loras: LoraNames) -> None:
        self.loras = loras
        self._max_image_bytes = max_image_bytes
        self._plan: Plan = ()
        self._entries: dict[str, Entry] = {}
        self._models: dict[str, ServedModel] = {}
        self._begun = False

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """Those that are served, by name, the default first."""
        return self._models

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is served, by reference."""
        return self._entries

    @property
    def settled(self) -> bool:
        """Whether each model of the plan has drawn its first image, or cannot."""
        return bool(self._plan) and all(line.reference in self._entries or line.error for line in self._plan)

    @property
    def ready(self) -> bool:
        """Whether any model can be drawn; none is said to be before all are settled once."""
        self._begun = self._begun or self.settled
        return self._begun and any(entry.chain.ready or entry.asleep for entry in self._entries.values())

    def expect(self, plan: Plan) -> list[Entry]:
        """What is to be served, and in what order. Gives what is no longer: close it."""
        self._plan = plan
        gone = set(self._entries) - {line.reference for line in plan}
        left = [self._entries.pop(reference) for reference in gone]
        self._order()
        return left

    def switch(self, reference: str, entry: Entry) -> Entry | None:
        """From now on the name means this bundle. Gives the one before: close it."""
        before = self._entries.get(reference)
        self._entries[reference] = entry
        self._order()
        return before

    def order(self, request: gateway_pb2.GenerateRequest) -> Order:
        """The order that a request with settled LoRAs makes of the bundle served now. Raises InvalidRequest, NotFound, or Unavailable for
        a model that starts."""
        first = self._plan[0] if self._plan else None
        if not request.model and first is not None and first.reference not in self._entries:
            raise _starting(first)
        if not self._models and not request.model:
            raise Unavailable("no model is served yet", retry_after_s=_STARTING_RETRY_S)
        try:
            return checks.order(request, self._models, self._max_image_bytes, self.loras.known)
        except checks.UnknownModel:
            for line in self._plan:
                digest = line.version.model.digest if line.version else ""
                if line.reference not in self._entries and request.model in (line.name, line.reference, digest):
                    raise _starting(line) from None
            raise

    @contextlib.contextmanager
    def take(self, request: gateway_pb2.GenerateRequest) -> Iterator[tuple[Order, Chain]]:
        """The order a request makes, and the chain to draw it. Raises as `order` does."""
        order = self.order(request)
        with self._entry(order.model).use() as chain:
            yield order, chain

    @contextlib.contextmanager
    def retake(self, order: Order, request: gateway_pb2.GenerateRequest) -> Iterator[tuple[Order, Chain]]:
        """The same for an order made earlier: as it is, or made again when another bundle has taken over. Raises as `order` does."""
        if self._models.get(order.model.name) is not order.model:
            order = self.order(request)
        with self._entry(order.model).use() as chain:
            yield order, chain

    def listing(self) -> list[gateway_pb2.Model]:
        """All models of the plan, those that start included."""
        return [_listed(line, self._entries.get(line.reference)) for line in self._plan]

    def _entry(self, model: ServedModel) -> Entry:
        """That which serves the model."""
        return next(entry for entry in self._entries.values() if entry.model is model)

    def _order(self) -> None:
        """The plan's order; references that are in no plan, at the end."""
        places = {line.reference: place for place, line in enumerate(self._plan)}
        self._entries = dict(sorted(self._entries.items(), key=lambda item: places.get(item[0], len(places))))
        self._models = {entry.model.name: entry.model for entry in self._entries.values()}


def _starting(line: Wanted) -> Unavailable:
    """What callers of a model are told that is to be served and is not yet."""
    why = f": {line.error}" if line.error else ""
    return Unavailable(f"model {line.name!r} is starting{why}", retry_after_s=_STARTING_RETRY_S)


def _listed(line: Wanted, entry: Entry | None) -> gateway_pb2.Model:
    """One model as ListModels tells of it."""
    status = gateway_pb2.ModelStatus(reference=line.reference, error=line.error)
    if line.version is not None and (entry is None or entry.application != line.version.application):
        status.next_digest = line.version.model.digest
    if entry is None:
        status.state = gateway_pb2.MODEL_STATE_STARTING
        return gateway_pb2.Model(name=line.name, digest=status.next_digest, status=status)
    if entry.asleep:
        status.state = gateway_pb2.MODEL_STATE_ASLEEP
    else:
        status.state = gateway_pb2.MODEL_STATE_SERVING if entry.chain.ready else gateway_pb2.MODEL_STATE_BROKEN
    model = entry.model
    shortest, longest = sizes.bounds(model.width, model.size_step)
    return gateway_pb2.Model(
        name=model.name,
        digest=model.digest,
        width=model.width,
        height=model.height,
        max_prompt_tokens=model.max_prompt_tokens,
        controlnets=[gateway_pb2.ControlNet(name=name, types=types) for name, types in model.controlnets.items()],
        status=status,
        size_step=model.size_step,
        min_side=shortest,
        max_side=longest,
        max_pixels=int(sizes.MAX_AREA * model.width * model.height),
    )
