"""Calls to a room's replicas: who they are, which one to take, what to do when it is gone.

Addresses come from a resolver (Ray Serve's broadcast, or a fixed list), asked every few seconds and at once when a peer fails.
Between two peers drawn at random the one with fewer calls in flight is taken; calls with an affinity (those with the same LoRA) go to the
same one, unless it is much busier. A call whose peer is gone goes to another;
that is safe because every stage is a pure function of its request.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from sdxs import rpc
from sdxs.errors import DeadlineExceeded, Overloaded, Unavailable
from services.fabric.deadline import Deadline
from services.fabric.endpoint import Endpoint
from services.fabric.lines import MAX_PAYLOAD, BrokenLine, Line, NoLine

logger = logging.getLogger(__name__)

_PACE_S = 0.1  # between two questions to the resolver
_BUSIER = 4
"""How many more calls than the least busy peer the preferred one may have: to wait for them takes less than to load a LoRA."""


@dataclass(frozen=True)
class Address:
    """One replica as it announces itself. `model_digest` keeps a caller from mixing two models during a roll-out."""

    target: str
    model_digest: str
    pid: int
    node: str = ""
    """Ray's id of the node; empty: unknown."""


Resolver = Callable[[], Awaitable[Sequence[Address]]]
Payload = bytes | Callable[[Address], bytes]
"""An encoded request, or what makes one for the peer that is to get it; a call that is tried again asks anew."""


class Stage(Protocol):
    """One room as its callers see it, wherever it runs."""

    @property
    def ready(self) -> bool:
        """Whether there is somebody to call."""
        ...

    async def call(self, name: str, payload: Payload, deadline: Deadline, affinity: str = "") -> bytes:
        """One rpc of the room's service, encoded request to encoded response. Raises SdxsError, and what `payload` raises.

        Args:
            affinity: calls that share it had best go to the same replica.
        """
        ...


@dataclass(frozen=True)
class LocalStage:
    """A room in this process."""

    endpoint: Endpoint
    ready: bool = True
    address: Address = Address("this process", "", os.getpid())

    async def call(self, name: str, payload: Payload, deadline: Deadline, affinity: str = "") -> bytes:
        """See Stage."""
        try:
            async with asyncio.timeout(deadline.remaining()):
                return await self.endpoint.call(name, _for(self.address, payload), deadline)
        except TimeoutError:
            raise DeadlineExceeded(f"{name} did not end in time") from None


@dataclass(eq=False)
class _Peer:
    """An open channel and the number of our calls on it."""

    address: Address
    channel: grpc.aio.Channel
    max_message_bytes: int
    in_flight: int = 0
    watching: "asyncio.Task[None] | None" = None
    has_lines: bool = True
    """Until its server says otherwise."""
    _line: Line | None = None

    def line(self) -> Line:
        """Open."""
        if self._line is None or self._line.ended:
            self._line = Line(self.channel, self.max_message_bytes)
        return self._line

    async def close(self, grace_s: float) -> None:
        """Hang up once the calls have ended: a server that drains still answers those it has."""
        if self._line is not None:
            await self._line.hang_up(grace_s)
        await self.channel.close(grace=grace_s if self.in_flight else None)


@dataclass(eq=False)
class PeerSet:
    """The replicas of one room. Open it before the first call, close it after the last.

    `model_digest` keeps replicas of another model out; empty, any will do. With `near`, the id of a node, replicas there are taken
    as long as there are any that are not full. While there are none the resolver is asked often; unless not `hurried`: then somebody
    else knows when to `look`.
    """

    service: str
    resolve: Resolver
    model_digest: str
    refresh_s: float = 5.0
    patience_s: float = 30.0
    max_message_bytes: int = 64 << 20
    near: str = ""
    hurried: bool = True
    _peers: dict[Address, _Peer] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _stale: asyncio.Event = field(default_factory=asyncio.Event)
    _closing: "set[asyncio.Task[None]]" = field(default_factory=set)
    _refreshing: "asyncio.Task[None] | None" = None

    @property
    def ready(self) -> bool:
        """Whether any replica is known."""
        return bool(self._peers)

    def open(self) -> None:
        """Begin to look for peers."""
        self._refreshing = asyncio.create_task(self._refresh_forever())

    def look(self) -> None:
        """Ask the resolver now."""
        self._stale.set()

    async def close(self) -> None:
        """Stop looking and hang up."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refreshing
        self._replace([])
        await asyncio.gather(*self._closing)

    async def call(self, name: str, payload: Payload, deadline: Deadline, affinity: str = "") -> bytes:
        """See Stage. Waits for a peer, and for those that it needs in turn, at most `patience_s`; then raises Unavailable."""
        patience = deadline.within(self.patience_s)
        full: set[_Peer] = set()
        while True:
            peer = await self._choose(full, patience, deadline, affinity)
            try:
                return await self._call(peer, name, _for(peer.address, payload), deadline)
            except BrokenLine:
                self._drop(peer)
            except Unavailable:
                if patience.passed:
                    raise
                await asyncio.sleep(_PACE_S)  # whom it needs itself may come
            except Overloaded:
                if len(full) + 1 >= len(self._peers):
                    raise
                full.add(peer)

    async def _call(self, peer: _Peer, name: str, payload: bytes, deadline: Deadline) -> bytes:
        """One try on one peer. Raises SdxsError, or BrokenLine."""
        peer.in_flight += 1
        try:
            if peer.has_lines and len(payload) <= MAX_PAYLOAD:
                return await peer.line().call(name, payload, deadline)
            return await self._call_alone(peer, name, payload, deadline)
        except NoLine:
            peer.has_lines = False
            return await self._call_alone(peer, name, payload, deadline)
        finally:
            peer.in_flight -= 1

    async def _call_alone(self, peer: _Peer, name: str, payload: bytes, deadline: Deadline) -> bytes:
        """As a call of its own."""
        method: Any = peer.channel.unary_unary(f"/{self.service}/{name}")
        metadata = rpc.terms(deadline.priority.value, deadline.tenant)
        try:
            return bytes(await method(payload, timeout=deadline.remaining(), metadata=metadata))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not _told(error):
                raise BrokenLine from None
            raise rpc.from_rpc_error(error) from None

    async def _choose(self, full: set[_Peer], patience: Deadline, deadline: Deadline, affinity: str) -> _Peer:
        """The less busy of two peers drawn at random, or the one that the affinity says; waits while there is none."""
        while True:
            able = [peer for peer in self._peers.values() if peer not in full] or list(self._peers.values())
            if able:
                able = [peer for peer in able if self.near and peer.address.node == self.near] or able
                if affinity:
                    return _preferred(able, affinity)
                return min(random.sample(able, min(2, len(able))), key=lambda peer: peer.in_flight)
            self._changed.clear()
            try:
                async with asyncio.timeout(patience.remaining()):
                    await self._changed.wait()
            except (TimeoutError, DeadlineExceeded):
                if patience.at == deadline.at:  # not by the clock: a loop's timer may go off just before it
                    raise DeadlineExceeded(f"no replica of {self.service} came in time") from None
                raise Unavailable(f"no replica answers for {self.service}") from None

    def _drop(self, peer: _Peer) -> None:
        """Forget a peer that does not answer, and ask at once who is there now."""
        if self._peers.pop(peer.address, None) is not None:
            logger.warning("%s at %s is gone", self.service, peer.address.target)
            self._stale.set()
            self._hang_up(peer)

    async def _watch(self, peer: _Peer) -> None:
        """Drop the peer when its connection breaks, whether or not anybody is calling."""
        state = peer.channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            connected = state is grpc.ChannelConnectivity.READY
            await peer.channel.wait_for_state_change(state)
            state = peer.channel.get_state()
            if connected:
                break
        self._drop(peer)

    def _hang_up(self, peer: _Peer) -> None:
        """No new calls."""
        if peer.watching is not None and peer.watching is not asyncio.current_task():
            peer.watching.cancel()
        closing = asyncio.create_task(peer.close(self.patience_s))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _refresh_forever(self) -> None:
        """Ask the resolver: now and then while there are peers, often while there are none."""
        while True:
            self._stale.clear()
            await self._refresh()
            await asyncio.sleep(_PACE_S)  # a replica that has died may be listed for a moment longer
            if self._peers or not self.hurried:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.refresh_s):
                        await self._stale.wait()

    async def _refresh(self) -> None:
        """One question to the resolver; a failure leaves the peers as they are."""
        try:
            found = await self.resolve()
        except Exception as error:
            logger.info("cannot resolve %s: %s", self.service, error)
            return
        self._replace([address for address in found if self.model_digest in ("", address.model_digest)])

    def _replace(self, addresses: Sequence[Address]) -> None:
        """Open channels to the new addresses, let the calls on the old ones end."""
        for address in set(addresses) - set(self._peers):
            options = [*rpc.KEEPALIVE_CLIENT, ("grpc.max_receive_message_length", self.max_message_bytes)]
            channel = grpc.aio.insecure_channel(address.target, options=options)
            peer = _Peer(address, channel, self.max_message_bytes)
            peer.watching = asyncio.create_task(self._watch(peer))
            self._peers[address] = peer
        for address in set(self._peers) - set(addresses):
            self._hang_up(self._peers.pop(address))
        self._changed.set()


def _preferred(peers: Sequence[_Peer], affinity: str) -> _Peer:
    """By rendezvous hashing, so that a peer that comes or goes moves only its own share; the next in that order for one that is busy."""
    least = min(peer.in_flight for peer in peers)
    ranked = sorted(peers, key=lambda peer: hashlib.sha256(f"{affinity} {peer.address.target}".encode()).digest())
    return next(peer for peer in ranked if peer.in_flight <= least + _BUSIER)


def _for(address: Address, payload: Payload) -> bytes:
    """The request for that peer."""
    return payload if isinstance(payload, bytes) else payload(address)


def _told(error: grpc.aio.AioRpcError) -> bool:
    """Whether the room itself says so: its own error has details, that of a broken connection none."""
    return any(key == rpc.DETAILS_KEY for key, _ in error.trailing_metadata())
