"""What the store is told of an image: how it was made, when, and what that took.

The file itself carries only what the image follows from (sdxs.images.receipt), so that the same request gives the same bytes; times
differ from one to the next, and are known only when the file is finished.
"""

from datetime import UTC, datetime

from sdxs.store.metadata import encode
from sdxs.v1 import gateway_pb2


def metadata_of(job_id: str, index: int, receipt: gateway_pb2.Receipt) -> dict[str, str]:
    """Of image `index` of a job's request, as an object's metadata; a prompt too long for it is cut (sdxs.store.metadata)."""
    stages = [f"{each.stage}={each.compute_seconds:.4f}" for each in receipt.stages]
    facts = {
        "prompt": receipt.prompt,
        "seed": str(receipt.seeds[index]) if index < len(receipt.seeds) else "",
        "model": receipt.model,
        "model-digest": receipt.model_digest,
        "job": job_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": f"{receipt.seconds:.4f}",
        "queue-seconds": f"{receipt.job_queue_seconds:.3f}",
        "stage-seconds": ",".join(stages),
        "software": receipt.software,
    }
    return encode(facts, long="prompt")
