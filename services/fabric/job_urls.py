"""Where the images of a job can be fetched."""

import logging
from datetime import UTC, datetime, timedelta

from sdxs.errors import Unavailable
from sdxs.store import ObjectStore
from sdxs.v1 import gateway_pb2

logger = logging.getLogger(__name__)


def sign_urls(job: gateway_pb2.GetJobResponse, store: ObjectStore, ttl_s: int) -> None:
    """Set the URLs. Raises Unavailable when the store does not answer."""
    expires = datetime.now(UTC) + timedelta(seconds=ttl_s)
    try:
        for image in [*job.images, *(image for item in job.items for image in item.images)]:
            image.url = store.presign_get(image.key, timedelta(seconds=ttl_s))
            image.url_expires.FromDatetime(expires)
    except Exception as error:
        logger.exception("cannot sign the URLs of job %s", job.job_id)
        raise Unavailable("the object store does not answer") from error


def has_images(job: gateway_pb2.GetJobResponse) -> bool:
    """Whether there is anything to sign."""
    return bool(job.images) or any(item.images for item in job.items)
