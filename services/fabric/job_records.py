"""A job's hash as a message. Pure functions: what Redis answered in, GetJobResponse out."""

from collections.abc import Mapping, Sequence

from sdxs.v1 import gateway_pb2

FIELDS = ("state", "class", "deliveries", "created", "finished", "outcome", "total", "batch", "failed", "tenant")
"""Of the hash, without the request, which may be megabytes."""

OVER = (gateway_pb2.JOB_STATE_SUCCEEDED, gateway_pb2.JOB_STATE_FAILED, gateway_pb2.JOB_STATE_CANCELLED)


def read_job(
    job_id: str, values: Sequence[bytes | None], rank: int | None, items: Mapping[bytes, bytes] | int
) -> gateway_pb2.GetJobResponse | None:
    """The job of the values of FIELDS, its rank among the waiting, and its items; their number alone: without images and items.

    None when there is no such job.
    """
    state, job_class, deliveries, created, finished, outcome, total, batch, failed, tenant = values
    if state is None or created is None:
        return None
    job = gateway_pb2.GetJobResponse.FromString(outcome or b"")
    job.job_id, job.state, job.priority = job_id, state.decode(), int(job_class or 0)  # type: ignore[assignment]
    job.deliveries, job.tenant = int(deliveries or 0), (tenant or b"").decode()
    job.position = 0 if rank is None else rank + 1
    _set_time(job, "created", created)
    if finished is not None:
        _set_time(job, "finished", finished)
    job.progress.total = int(total or 0)
    if int(batch or 0):
        job.progress.done = items if isinstance(items, int) else len(items)
        job.progress.failed = int(failed or 0)
    else:
        job.progress.failed = int(job.state == gateway_pb2.JOB_STATE_FAILED)
        job.progress.done = int(job.state == gateway_pb2.JOB_STATE_SUCCEEDED) or job.progress.failed
    if isinstance(items, int):
        job.ClearField("images")
        job.ClearField("receipt")
    elif int(batch or 0):
        blank = gateway_pb2.JobItem(state=job.state).SerializeToString()
        job.items.extend(gateway_pb2.JobItem.FromString(items.get(b"%d" % i, blank)) for i in range(job.progress.total))
    return job


def _set_time(job: gateway_pb2.GetJobResponse, field: str, seconds: bytes) -> None:
    """From seconds since 1970."""
    getattr(job, field).FromNanoseconds(int(float(seconds) * 1e9))
