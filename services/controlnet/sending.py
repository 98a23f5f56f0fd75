"""Residuals on their way to a U-Net replica: on the device or in shared memory where it can read ours, else in the message."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import numpy as np

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import stage_pb2, unet_pb2
from services.fabric.deadline import Deadline
from services.fabric.handover import Lender
from services.fabric.lending import Lends, Loan
from services.fabric.peers import Address, Stage

logger = logging.getLogger(__name__)

_ROOM = 1 << 20  # bytes of a message that are not residuals: text embeddings, an init latent


class _TooLarge(Exception):
    """The message would be larger than the receiver takes."""


class _ByHost(Exception):
    """Who is asked does not read the device's memory: the residuals must come to the host's first."""


class Sender:
    """Calls U-Net replicas.

    Args:
        unet: the replicas.
        node: Ray's id of this node: replicas of another one are not offered shared memory.
        shared_bytes: most memory lent at a time; 0: none ever.
        max_message_bytes: what a U-Net replica takes; larger requests are sent in parts.
        device: lends the device's memory, for residuals that are there; None: nothing stays there.
    """

    def __init__(self, unet: Stage, node: str, shared_bytes: int, max_message_bytes: int, device: Lends | None = None) -> None:
        self._unet = unet
        self._node = node
        self._max_message_bytes = max_message_bytes
        self._lender, self._device = _lender(shared_bytes), device
        self._blind: set[tuple[str, Address]] = set()
        self.sent: Counter[str] = Counter()
        """How many messages had residuals in which field."""

    @property
    def on_device(self) -> bool:
        """Whether residuals had best stay where they are computed."""
        return self._device is not None

    def close(self) -> None:
        """After the last call."""
        for lender in (self._device, self._lender):
            if lender is not None:
                lender.close()

    async def send(
        self, request: unet_pb2.DenoiseRequest, residuals: Sequence[Residuals], deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        """The U-Net's answer to the request with the residuals of each of its images, or with none. Raises SdxsError."""
        if not residuals:
            return await self._call(request, lambda _: request.SerializeToString(), deadline)
        if residuals[0].on_host:
            return await self._send_by_host(request, residuals, None, deadline)
        async with _lent(self._device, residuals) as loan:
            if loan is not None:
                with contextlib.suppress(_ByHost):
                    return await self._offer(request, None, [loan], deadline)
            fetched = await asyncio.to_thread(lambda: [each.host() for each in residuals])
            return await self._send_by_host(request, fetched, loan, deadline)

    async def _send_by_host(
        self, request: unet_pb2.DenoiseRequest, residuals: Sequence[Residuals], also: Loan | None, deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        """In shared memory or in the message; as the loan `also` to those who can read it."""
        async with _lent(self._lender, residuals) as loan:
            try:
                return await self._offer(request, residuals, [each for each in (also, loan) if each is not None], deadline)
            except _TooLarge:
                return await self._halves(request, residuals, deadline)

    async def _offer(
        self,
        request: unet_pb2.DenoiseRequest,
        residuals: Sequence[Residuals] | None,
        loans: Sequence[Loan],
        deadline: Deadline,
    ) -> unet_pb2.DenoiseResponse:
        """The first loan that a peer can read, else the residuals themselves. Each peer, that of a second try too, gets what it can take.

        Raises _ByHost for one that can read none, when there are no residuals, and _TooLarge.
        """
        asked: list[tuple[str, Address]] = []

        def encode(address: Address) -> bytes:
            for loan in loans:
                if address.node == self._node and (loan.field, address) not in self._blind:
                    asked.append((loan.field, address))
                    self.sent[loan.field] += 1
                    return request.SerializeToString() + loan.encoded()
            if residuals is None:
                raise _ByHost
            asked.append(("", address))
            self.sent["inline"] += 1
            return request.SerializeToString() + _inline(residuals, self._max_message_bytes)

        while True:
            try:
                return await self._call(request, encode, deadline)
            except InvalidRequest as error:
                if not asked or not error.field or error.field != asked[-1][0]:
                    raise
                logger.warning("%s cannot read `%s` residuals: they go to it another way", asked[-1][1].target, error.field)
                self._blind.add(asked[-1])  # it is offered no more of them, so this ends

    async def _halves(
        self, request: unet_pb2.DenoiseRequest, residuals: Sequence[Residuals], deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        """The request's images in two calls."""
        middle = len(request.seeds) // 2
        answers = await asyncio.gather(
            *(self.send(_only(request, part), residuals[part], deadline) for part in (slice(middle), slice(middle, None)))
        )
        latents = [tensors.decode(answer.latent, "latent") for answer in answers]
        return unet_pb2.DenoiseResponse(
            latent=tensors.encode(np.concatenate(latents)),
            model_digest=answers[0].model_digest,
            batch=max(answer.batch for answer in answers),
            times=max((answer.times for answer in answers), key=_seconds),
        )

    async def _call(
        self, request: unet_pb2.DenoiseRequest, encode: Callable[[Address], bytes], deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        affinity = request.loras[0].digest if request.loras else ""
        return unet_pb2.DenoiseResponse.FromString(await self._unet.call("Denoise", encode, deadline, affinity))


def _lender(shared_bytes: int) -> Lender | None:
    """None where there is to be no shared memory, or the system has none."""
    if not shared_bytes:
        return None
    try:
        return Lender(shared_bytes)
    except OSError as error:
        logger.warning("no shared memory: %s; residuals go in messages", error)
        return None


@contextlib.asynccontextmanager
async def _lent(lender: Lends | None, residuals: Sequence[Residuals]) -> AsyncIterator[Loan | None]:
    """A loan that holds them, None when there is no room. It ends with the context."""
    shapes = [(len(residuals), *part.shape[1:]) for part in residuals[0].parts]
    loan = lender.lend(shapes) if lender is not None else None
    if loan is None:
        yield None
        return
    writing = asyncio.create_task(asyncio.to_thread(loan.write, *residuals))
    try:
        await asyncio.shield(writing)
        yield loan
    finally:  # a caller that leaves does not stop the thread: its piece is nobody else's before it is done
        writing.add_done_callback(lambda _: loan.end())


def _inline(residuals: Sequence[Residuals], limit: int) -> bytes:
    """Raises _TooLarge for several images that do not fit a message; of one, the receiver says so."""
    nbytes = sum(part.nbytes for each in residuals for part in each.parts)
    if len(residuals) > 1 and nbytes + _ROOM > limit:
        raise _TooLarge
    stacked = Residuals.stack(residuals, residuals[0])
    parts = unet_pb2.InlineResiduals(parts=[tensors.encode(part) for part in stacked.parts])
    return unet_pb2.DenoiseRequest(inline=parts).SerializeToString()


def _only(request: unet_pb2.DenoiseRequest, part: slice) -> unet_pb2.DenoiseRequest:
    """The same for some of its seeds."""
    some = unet_pb2.DenoiseRequest()
    some.CopyFrom(request)
    del some.seeds[:]
    some.seeds.extend(request.seeds[part])
    return some


def _seconds(times: Iterable[stage_pb2.StageTime]) -> float:
    """Waiting and computing together."""
    return sum(time.queue_seconds + time.compute_seconds for time in times)
