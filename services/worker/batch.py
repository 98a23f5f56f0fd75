"""A batch: many requests as one job. Each becomes an item that stands once it is made, so another delivery makes only the rest.

An item that is refused for good has its error and does not stop the others. One that fails for a passing reason is left for the next
delivery; the batch is given up only after `job_max_deliveries` that made nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from sdxs.errors import Cancelled, InvalidRequest, NotFound, PreconditionFailed, SdxsError, Unavailable
from sdxs.v1 import gateway_pb2
from services.fabric.jobs import Delivery, JobQueue
from services.fabric.keys import RESULTS

logger = logging.getLogger(__name__)

REFUSALS = (InvalidRequest, NotFound, PreconditionFailed)
"""Errors that another try would only meet again."""

Once = Callable[[gateway_pb2.GenerateRequest, str], Awaitable[gateway_pb2.JobItem]]


class AllRefused(SdxsError):
    """Every request of a batch was refused; the first one's error stands for all."""

    def __init__(self, first: gateway_pb2.JobError, number: int) -> None:
        super().__init__(f"all {number} requests are refused; the first: {first.message}")
        self.code, self.field = first.code, first.field


def job_error(error: SdxsError, prefix: str = "") -> gateway_pb2.JobError:
    """As the job's owner sees it."""
    return gateway_pb2.JobError(code=error.code, message=str(error), field=prefix + error.field if error.field else "")


async def make_batch(
    queue: JobQueue, delivery: Delivery, requests: Sequence[gateway_pb2.GenerateRequest], once: Once, at_once: int
) -> gateway_pb2.GetJobResponse:
    """Make the items that are not there yet, `at_once` at a time.

    Raises:
        AllRefused: none could ever be made.
        Unavailable: some failed for a passing reason.
        Cancelled: the job is over.
    """
    gate, troubles = asyncio.Semaphore(at_once), list[str]()

    async def make(index: int) -> None:
        async with gate:
            try:
                item = await once(requests[index], f"{RESULTS}{delivery.job_id}/{index}")
            except REFUSALS as error:
                refused = job_error(error, f"requests[{index}].")
                item = gateway_pb2.JobItem(state=gateway_pb2.JOB_STATE_FAILED, error=refused)
            except Exception as error:
                logger.warning("job %s, request %d: %r", delivery.job_id, index, error)
                troubles.append(f"requests[{index}]: {type(error).__name__}: {error}")
                return
            if not await queue.put_item(delivery, index, item):
                raise Cancelled(f"job {delivery.job_id} is over")

    making = [asyncio.create_task(make(index)) for index in range(len(requests)) if index not in delivery.done]
    try:
        await asyncio.gather(*making)
    finally:
        for task in making:
            task.cancel()
    if troubles:
        raise Unavailable(f"{len(troubles)} of {len(requests)} requests failed; {troubles[0]}")
    job = await queue.get(delivery.job_id)
    if job.progress.failed == job.progress.total:
        raise AllRefused(job.items[0].error, len(requests))
    return gateway_pb2.GetJobResponse()
