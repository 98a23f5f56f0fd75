"""Residuals on their way to a U-Net replica: in shared memory where it can read ours, else in the message."""

import asyncio
import logging
from collections.abc import Callable, Iterable

import numpy as np

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.residuals import Residuals
from sdxs.v1 import stage_pb2, unet_pb2
from services.fabric.deadline import Deadline
from services.fabric.handover import Lender, Loan
from services.fabric.peers import Address, Stage

logger = logging.getLogger(__name__)

_ROOM = 1 << 20  # bytes of a message that are not residuals: text embeddings, an init latent


class _TooLarge(Exception):
    """The message would be larger than the receiver takes."""


class Sender:
    """Calls U-Net replicas.

    Args:
        unet: the replicas.
        node: Ray's id of this node: replicas of another one are not offered shared memory.
        shared_bytes: most memory lent at a time; 0: none ever.
        max_message_bytes: what a U-Net replica takes; larger requests are sent in parts.
    """

    def __init__(self, unet: Stage, node: str, shared_bytes: int, max_message_bytes: int) -> None:
        self._unet = unet
        self._node = node
        self._max_message_bytes = max_message_bytes
        self._lender = _lender(shared_bytes)
        self._blind: set[Address] = set()
        self.shared = self.inline = 0
        """How many messages went either way."""

    def close(self) -> None:
        """After the last call."""
        if self._lender is not None:
            self._lender.close()

    async def send(
        self, request: unet_pb2.DenoiseRequest, residuals: Residuals | None, deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        """The U-Net's answer to the request with these residuals. Raises SdxsError."""
        if residuals is None:
            return await self._call(lambda _: request.SerializeToString(), deadline)
        loan = self._lender.lend([part.shape for part in residuals.parts]) if self._lender is not None else None
        if loan is None:
            return await self._offer(request, residuals, None, deadline)
        writing = asyncio.create_task(asyncio.to_thread(loan.write, residuals))
        try:
            await asyncio.shield(writing)
            return await self._offer(request, residuals, loan, deadline)
        finally:  # a caller that leaves does not stop the thread: its piece is nobody else's before it is done
            writing.add_done_callback(lambda _: loan.end())

    async def _offer(
        self, request: unet_pb2.DenoiseRequest, residuals: Residuals, loan: Loan | None, deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        """Shared to whom can read it. Each peer, that of a second try too, gets what it can take."""
        asked: list[Address] = []

        def encode(address: Address) -> bytes:
            asked.append(address)
            if loan is not None and address.node == self._node and address not in self._blind:
                self.shared += 1
                return _shared(request, loan)
            self.inline += 1
            return _inline(request, residuals, self._max_message_bytes)

        while True:
            try:
                return await self._call(encode, deadline)
            except InvalidRequest as error:
                if error.field != "shared" or not asked or asked[-1] in self._blind:
                    raise
                logger.warning("%s cannot read shared memory: residuals go to it in messages", asked[-1].target)
                self._blind.add(asked[-1])
            except _TooLarge:
                return await self._halves(request, residuals, deadline)

    async def _halves(
        self, request: unet_pb2.DenoiseRequest, residuals: Residuals, deadline: Deadline
    ) -> unet_pb2.DenoiseResponse:
        """The request's images in two calls."""
        middle = len(request.seeds) // 2
        answers = await asyncio.gather(
            *(
                self.send(_only(request, part), _rows(residuals, part), deadline)
                for part in (slice(middle), slice(middle, None))
            )
        )
        latents = [tensors.decode(answer.latent, "latent") for answer in answers]
        return unet_pb2.DenoiseResponse(
            latent=tensors.encode(np.concatenate(latents)),
            model_digest=answers[0].model_digest,
            batch=max(answer.batch for answer in answers),
            times=max((answer.times for answer in answers), key=_seconds),
        )

    async def _call(self, encode: Callable[[Address], bytes], deadline: Deadline) -> unet_pb2.DenoiseResponse:
        return unet_pb2.DenoiseResponse.FromString(await self._unet.call("Denoise", encode, deadline))


def _lender(shared_bytes: int) -> Lender | None:
    """None where there is to be no shared memory, or the system has none."""
    if not shared_bytes:
        return None
    try:
        return Lender(shared_bytes)
    except OSError as error:
        logger.warning("no shared memory: %s; residuals go in messages", error)
        return None


def _shared(request: unet_pb2.DenoiseRequest, loan: Loan) -> bytes:
    return request.SerializeToString() + unet_pb2.DenoiseRequest(shared=loan.message).SerializeToString()


def _inline(request: unet_pb2.DenoiseRequest, residuals: Residuals, limit: int) -> bytes:
    """Raises _TooLarge for several images that do not fit a message; of one, the receiver says so."""
    if len(request.seeds) > 1 and sum(part.nbytes for part in residuals.parts) + _ROOM > limit:
        raise _TooLarge
    parts = unet_pb2.InlineResiduals(parts=[tensors.encode(part) for part in residuals.parts])
    return request.SerializeToString() + unet_pb2.DenoiseRequest(inline=parts).SerializeToString()


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


def _rows(residuals: Residuals, part: slice) -> Residuals:
    """Of some of the images."""
    return Residuals(tuple(each[part] for each in residuals.parts))
