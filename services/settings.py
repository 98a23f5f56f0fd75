"""How the servers behave: limits, times, the queue. Where things are: sdxs.settings; how many replicas: services.app."""

from typing import Literal

from pydantic import Field, SecretStr, field_validator

from sdxs import webhooks
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings


class ServingSettings(Settings):
    """Read from SDXS_ variables by each process's composition root."""

    max_batch: int = 8
    """Most images computed together."""
    max_in_flight: int = 64
    """Most calls a stage replica holds; more are refused with RESOURCE_EXHAUSTED."""
    gateway_max_in_flight: int = 128
    default_deadline_s: float = 60.0
    """For callers who set none."""
    patience_s: float = 45.0
    """How long a call waits for a replica to appear."""
    refresh_s: float = 5.0
    """How often replicas' addresses are asked for while nothing is wrong."""
    models_watch_s: float = Field(2.0, gt=0)
    """How often it is asked where the names of the served models point."""
    drain_s: float = 10.0
    """What a stopping server grants the calls in flight."""
    prompt_cache_bytes: int = 32 << 20
    """Text embeddings the gateway keeps."""
    max_message_bytes: int = 128 << 20
    """Largest stage message; 16 latents of 64x64 are 1 MB, 16 raw images of 512x512 are 12 MB, residuals of an image of 1024x1024 71 MB."""
    gateway_max_message_bytes: int = 64 << 20
    """Largest request the gateway's server reads."""
    max_image_bytes: int = 32 << 20
    """Most bytes of a request's control images and init image together."""
    input_inline_bytes: int = Field(16 << 10, ge=0)
    """Larger control and init images of jobs wait in the store, not in the queue: 4 ms slower, on one machine, for no memory of Redis."""
    input_cache_bytes: int = 64 << 20
    """Images that requests name, kept by a gateway."""
    input_buckets: str = ""
    """Buckets that requests may name images of too: `bucket` or `bucket/prefix`, with commas between them."""
    handover_bytes: int = 256 << 20
    """Most memory a ControlNet replica shares with U-Nets on its node, and as much again on its GPU; 0: residuals always go in messages."""
    handover_device: Literal["auto", "always", "never"] = "auto"
    """Whether residuals stay on the device: `auto` on a GPU, `always` on a CPU too, which gains nothing, `never` by the host's memory."""

    max_loras: int = Field(16, ge=1)
    """Most LoRAs that stay attached to the networks of a replica; those in use do, however many."""
    lora_cache_bytes: int = Field(1 << 30, ge=0)
    """Most bytes of theirs."""
    max_lora_bytes: int = Field(512 << 20, gt=0)
    """Largest LoRA that is loaded."""

    stream_max_sessions: int = Field(64, ge=1)
    """Most streams a gateway serves at a time."""
    stream_max_queued: int = Field(64, ge=0)
    """Most streams that wait for a place; more are refused with RESOURCE_EXHAUSTED."""
    stream_in_flight: int = Field(2, ge=1)
    """Frames of one stream between U-Net and client, so that one is decoded and sent while the next is computed."""
    stream_idle_s: float = Field(300.0, gt=0)
    """A stream on which the client sends nothing, or reads nothing, for so long is ended."""
    stream_secret: SecretStr = SecretStr("")
    """Signs resume tokens: gateways that share it take over each other's streams; empty: drawn anew by each process."""
    stream_token_s: float = Field(3600.0, gt=0)
    """How long a resume token is good for."""
    stream_similarity: float = Field(0.0, ge=0)
    """Frames whose images differ by no more from those last drawn are skipped: mean levels of 255, at 32x32. 0: none are."""
    stream_max_skips: int = Field(30, ge=1)
    """After so many in a row the next frame is drawn, similar or not."""

    http_origins: str = ""
    """Origins of pages that may open streams, with commas between them, `*` for any; those of the same host and port always may."""

    job_visibility_s: float = 30.0
    """A job whose worker has not been heard of for so long is given to another."""
    job_max_deliveries: int = 3
    """Then it is dead."""
    job_concurrency: int = 1
    """Jobs a worker does at a time."""
    job_ttl_s: int = 24 * 3600
    """How long a finished job can be asked about."""
    max_queued_jobs: int = 10_000
    """Most jobs that have not ended, of all priorities; more are refused with RESOURCE_EXHAUSTED."""
    max_queued_bytes: int = 256 << 20
    """Most bytes of their requests."""
    job_retry_after_s: float = 5.0
    """When a full queue tells callers to try again."""
    max_job_requests: int = 256
    """Largest batch that is one job."""
    job_requests_at_once: int = 4
    """Requests of a batch that a worker asks the gateway for at a time."""
    dead_job_ttl_s: int = 7 * 24 * 3600
    """How long a dead job can be asked about and replayed."""
    max_dead_jobs: int = 10_000
    """Longest list of the dead; the oldest leave it."""
    max_watchers: int = 256
    """Most WatchJob calls a gateway holds."""
    url_ttl_s: int = Field(3600, ge=1, le=7 * 24 * 3600)
    """How long a presigned URL works."""

    results_ttl_s: int = Field(30 * 24 * 3600, ge=0)
    """Images of jobs are deleted so long after they were made, and no sooner than their jobs are forgotten; 0: never."""
    inputs_ttl_s: int = Field(7 * 24 * 3600, ge=0)
    """Images that steer are deleted so long after they were last sent or named, unless a job still waits for them; 0: never."""
    sweep_every_s: float = Field(3600.0, gt=0)
    """How often one of the workers looks for what is to be deleted."""

    webhook_secret: SecretStr = SecretStr("")
    """`whsec_` and the base64 of 24 to 64 random bytes, to sign webhooks with; empty: jobs with a webhook are refused."""
    webhook_allow_http: bool = False
    webhook_allow_private: bool = False
    """Whether webhooks may lead to private, loopback and link-local addresses; then a caller can reach into the server's network."""
    webhook_timeout_s: float = 10.0
    """Of one call."""
    webhook_max_calls: int = 10
    """Until it is given up."""
    webhook_pause_s: float = 5.0
    """After the first failed call; doubles with each, up to an hour."""
    webhook_concurrency: int = 4
    """Calls of one worker at a time."""

    @field_validator("webhook_secret")
    @classmethod
    def _is_a_key(cls, secret: SecretStr) -> SecretStr:
        """Now, not at the first job."""
        if secret.get_secret_value():
            try:
                webhooks.key_of(secret.get_secret_value())
            except InvalidRequest as error:
                raise ValueError(error.allowed) from None
        return secret
