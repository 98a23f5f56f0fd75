"""One frame's way through the chain, and what its client is told of it."""

import logging
import time
from collections.abc import Callable

from sdxs.errors import DeadlineExceeded, Internal, InvalidRequest, SdxsError
from sdxs.v1 import stream_pb2
from services.gateway import checks
from services.gateway.frames import Frame, error_message, named
from services.gateway.similarity import SimilarityFilter
from services.gateway.table import ModelTable

logger = logging.getLogger(__name__)


class Painter:
    """Of one session: it knows what was drawn last."""

    def __init__(self, models: ModelTable, similarity: SimilarityFilter) -> None:
        self._models = models
        self._similarity = similarity

    async def draw(self, frame: Frame, leave_unet: Callable[[Frame], None]) -> stream_pb2.StreamResponse:
        """The frame's image, or why there is none; `leave_unet` is called when another may follow it. Then `end` must be."""
        try:
            return await self._draw(frame, leave_unet)
        except DeadlineExceeded:
            return dropped(frame.id, stream_pb2.DROP_REASON_DEADLINE)
        except InvalidRequest as error:
            return failed(frame.id, named(error, frame.own))
        except SdxsError as error:
            return failed(frame.id, error)
        except Exception:
            logger.exception("frame %d failed", frame.id)
            return failed(frame.id, Internal("internal error; the server's log has it"))

    def end(self, frame_id: int, answered: bool) -> None:
        """Say whether the frame got its image; the first word counts."""
        self._similarity.end(frame_id, answered)

    async def _draw(self, frame: Frame, leave_unet: Callable[[Frame], None]) -> stream_pb2.StreamResponse:
        """The same, with errors raised."""
        began = time.monotonic()
        standing = await self._similarity.standing(frame.id, frame.order)
        if standing is not None:
            return dropped(frame.id, stream_pb2.DROP_REASON_SIMILAR, standing)
        with self._models.retake(frame.order, frame.request) as (order, chain):
            latents = await chain.denoise(order, frame.deadline)
            leave_unet(frame)
            made = await chain.decode(order, latents, checks.receipts(order), frame.deadline)
        return stream_pb2.StreamResponse(
            image=stream_pb2.FrameImage(
                frame_id=frame.id,
                image=made.images[0],
                seed=order.seeds[0],
                unet_batch=made.unet_batch,
                decoder_batch=made.batch,
                controlnet_batch=made.controlnet_batch,
                queued_seconds=began - frame.arrived,
                total_seconds=time.monotonic() - frame.arrived,
                stages=made.times,
            )
        )


def dropped(frame_id: int, reason: stream_pb2.DropReason, standing: int = 0) -> stream_pb2.StreamResponse:
    """Tells of a frame that is not drawn."""
    told = stream_pb2.FrameDropped(frame_id=frame_id, reason=reason, standing_frame_id=standing)
    return stream_pb2.StreamResponse(dropped=told)


def failed(frame_id: int, error: SdxsError) -> stream_pb2.StreamResponse:
    """Tells of one that cannot be; 0: of settings."""
    return stream_pb2.StreamResponse(error=stream_pb2.FrameError(frame_id=frame_id, error=error_message(error)))
