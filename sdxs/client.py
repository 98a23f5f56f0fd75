"""Talk to a server: `Client` for scripts, `AsyncClient` for asyncio. Needs neither torch nor ray.

    with Client("127.0.0.1:8500") as client:
        client.generate("red apple", seed=1).images[0].save("apple.jpg")

Every error is an SdxsError of the class the server raised (sdxs.rpc).
"""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, cast

import grpc
import PIL.Image
from google.protobuf.message import Message

from sdxs import rpc, uploads
from sdxs.control import Control
from sdxs.errors import DeadlineExceeded, InvalidRequest, Unavailable
from sdxs.lora import Lora
from sdxs.v1 import decoder_pb2, gateway_pb2

if TYPE_CHECKING:
    from sdxs.conversation import Look
    from sdxs.streaming import AsyncStream, Stream

DEFAULT_ADDRESS = "127.0.0.1:8500"
Urgency = Literal["high", "normal", "low"]
_SERVICE = "sdxs.v1.GatewayService"
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}
_OPTIONS = [*rpc.KEEPALIVE_CLIENT, ("grpc.max_receive_message_length", 64 << 20)]
_ENDED = (gateway_pb2.JOB_STATE_SUCCEEDED, gateway_pb2.JOB_STATE_FAILED, gateway_pb2.JOB_STATE_CANCELLED)

Job = gateway_pb2.GetJobResponse


class Options(TypedDict, total=False):
    """What a request may say beside its prompt; see GenerateRequest in gateway.proto."""

    model: str
    seed: int
    n: int
    width: int
    height: int
    format: str
    """jpeg (default), png, webp or raw."""
    deterministic: bool
    controls: Sequence[Control]
    """Images that the result follows."""
    init_image: bytes
    """A file to start from, with `strength`."""
    strength: float
    init_image_uri: str
    """In place of `init_image`; see Client.upload."""
    loras: Sequence[Lora]
    """Published LoRAs, by name or digest."""


class JobOptions(Options, total=False):
    """What a job may say too; see SubmitJobRequest in gateway.proto."""

    request_id: str
    """Sent again under the same id it is the same job."""
    priority: str
    """high, normal (default) or low."""
    webhook_url: str
    """Gets the ended job; `sdxs.webhooks.verify` checks what comes."""


@dataclass(frozen=True)
class Image:
    """One image as the server sent it."""

    data: bytes
    format: str
    width: int
    height: int

    def pil(self) -> PIL.Image.Image:
        """The image for Pillow."""
        if self.format == "raw":
            return PIL.Image.frombytes("RGB", (self.width, self.height), self.data)
        return PIL.Image.open(io.BytesIO(self.data))

    def save(self, path: str | Path) -> None:
        """Write the bytes as they came."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True)
class Generated:
    """Images and what was done to make them."""

    images: list[Image]
    receipt: gateway_pb2.Receipt


class Client:
    """A blocking client; safe to share between threads.

    Args:
        tenant: for whom the calls are; a server shares its stages fairly between tenants.
        urgency: high, normal or low: the class of the calls. That of a job is its `priority`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        credentials: grpc.ChannelCredentials | None = None,
        tenant: str = "",
        urgency: Urgency = "normal",
    ) -> None:
        self._metadata = rpc.terms(urgency, tenant)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def generate(self, prompt: str, timeout: float = 60.0, **options: Unpack[Options]) -> Generated:
        """Images of a prompt. Raises SdxsError."""
        answer = self._call("Generate", request(prompt, options), timeout)
        return _generated(gateway_pb2.GenerateResponse.FromString(answer))

    def upload(self, image: bytes, timeout: float = 60.0) -> str:
        """Send a PNG, JPEG or WebP file to the server's store; returns a name for `Control.image_uri` and `init_image_uri`.

        Worth it for an image that many requests share, or one too large for a message. Raises SdxsError, PreconditionFailed where the
        server takes none.
        """
        answer = gateway_pb2.CreateUploadResponse.FromString(self._call("CreateUpload", uploads.ask(image), timeout))
        return uploads.send(image, answer, timeout)

    def submit_job(self, prompt: str, timeout: float = 10.0, **options: Unpack[JobOptions]) -> str:
        """Id of a job for that request. Raises SdxsError."""
        return self._submit(job([prompt], options, batch=False), timeout)

    def submit_batch(self, prompts: Sequence[str], timeout: float = 60.0, **options: Unpack[JobOptions]) -> str:
        """Id of one job for all prompts; the options are for each. Raises SdxsError."""
        return self._submit(job(prompts, options, batch=True), timeout)

    def get_job(self, job_id: str, timeout: float = 10.0) -> Job:
        """The job's state, with presigned URLs once it has succeeded. Raises SdxsError."""
        return Job.FromString(self._call("GetJob", gateway_pb2.GetJobRequest(job_id=job_id), timeout))

    def list_jobs(
        self, states: Sequence[str] = (), page_size: int = 0, page_token: str = "", timeout: float = 10.0
    ) -> gateway_pb2.ListJobsResponse:
        """A page of jobs, newest first: queued, running, succeeded, failed or cancelled ones, or all. Raises SdxsError."""
        return gateway_pb2.ListJobsResponse.FromString(self._call("ListJobs", job_page(states, page_size, page_token), timeout))

    def watch_job(self, job_id: str, timeout: float | None = None) -> Iterator[Job]:
        """The job now and at each change, until it has ended. Raises SdxsError, DeadlineExceeded after `timeout` seconds."""
        method: Any = self._channel.unary_stream(f"/{_SERVICE}/WatchJob")
        asked = gateway_pb2.WatchJobRequest(job_id=job_id).SerializeToString()
        answers = method(asked, timeout=timeout, metadata=self._metadata)
        try:
            for answer in answers:
                yield gateway_pb2.WatchJobResponse.FromString(answer).job
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error) from None
        finally:
            answers.cancel()

    def cancel_job(self, job_id: str, timeout: float = 10.0) -> Job:
        """The cancelled job; its worker drops it within a second or so. Raises SdxsError, PreconditionFailed when it has ended."""
        answer = self._call("CancelJob", gateway_pb2.CancelJobRequest(job_id=job_id), timeout)
        return gateway_pb2.CancelJobResponse.FromString(answer).job

    def wait_job(self, job_id: str, timeout: float = 120.0) -> Job:
        """The job once it has ended, well or not. Raises DeadlineExceeded when it has not within `timeout` seconds."""
        end = time.monotonic() + timeout
        for pause in _pauses():
            job = self.get_job(job_id)
            if job.state in _ENDED:
                return job
            if time.monotonic() + pause > end:
                raise DeadlineExceeded(f"job {job_id} has not ended in {timeout:g} s")
            time.sleep(pause)
        raise AssertionError("the pauses do not end")

    def stream(self, model: str = "", patience: float = 60.0, **look: "Unpack[Look]") -> "Stream":
        """Images in real time; use it in a `with` block (sdxs.streaming). Raises InvalidRequest.

        Args:
            patience: seconds for which it looks for a server, when the one it has is gone.
            look: what the frames have in common.
        """
        from sdxs.conversation import Conversation, settings_of
        from sdxs.streaming import Stream

        return Stream(self._channel, Conversation(model, settings_of(look)), patience, self._metadata)

    def list_models(self, timeout: float = 10.0) -> list[gateway_pb2.Model]:
        """What the server serves, its default first. Raises SdxsError."""
        answer = self._call("ListModels", gateway_pb2.ListModelsRequest(), timeout)
        return list(gateway_pb2.ListModelsResponse.FromString(answer).models)

    def list_loras(self, model: str = "", timeout: float = 10.0) -> list[gateway_pb2.PublishedLora]:
        """The LoRAs that requests may name, those made for one model or all. Raises SdxsError."""
        answer = self._call("ListLoras", gateway_pb2.ListLorasRequest(model=model), timeout)
        return list(gateway_pb2.ListLorasResponse.FromString(answer).loras)

    def ready(self, timeout: float = 2.0) -> bool:
        """Whether the server says SERVING."""
        check: Any = self._channel.unary_unary(_HEALTH)
        try:
            return bool(check(b"", timeout=timeout) == _SERVING)
        except grpc.RpcError:
            return False

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return when the server says SERVING. Raises Unavailable when it does not within `timeout` seconds."""
        end = time.monotonic() + timeout
        while not self.ready():
            if time.monotonic() > end:
                raise Unavailable(f"the server is not SERVING after {timeout:g} s")
            time.sleep(0.1)

    def _submit(self, message: gateway_pb2.SubmitJobRequest, timeout: float) -> str:
        return gateway_pb2.SubmitJobResponse.FromString(self._call("SubmitJob", message, timeout)).job_id

    def _call(self, name: str, message: Message, timeout: float) -> bytes:
        """One rpc. Raises SdxsError."""
        try:
            method: Any = self._channel.unary_unary(f"/{_SERVICE}/{name}")
            return bytes(method(message.SerializeToString(), timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error) from None


class AsyncClient:
    """The same for asyncio; make it inside the loop that uses it."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        credentials: grpc.ChannelCredentials | None = None,
        tenant: str = "",
        urgency: Urgency = "normal",
    ) -> None:
        self._metadata = rpc.terms(urgency, tenant)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()

    async def generate(self, prompt: str, timeout: float = 60.0, **options: Unpack[Options]) -> Generated:  # noqa: ASYNC109
        """See Client.generate; cancelling the task cancels the work on the server."""
        answer = await self._call("Generate", request(prompt, options), timeout)
        return _generated(gateway_pb2.GenerateResponse.FromString(answer))

    async def upload(self, image: bytes, timeout: float = 60.0) -> str:  # noqa: ASYNC109
        """See Client.upload."""
        answer = gateway_pb2.CreateUploadResponse.FromString(await self._call("CreateUpload", uploads.ask(image), timeout))
        return await asyncio.to_thread(uploads.send, image, answer, timeout)

    async def submit_job(self, prompt: str, timeout: float = 10.0, **options: Unpack[JobOptions]) -> str:  # noqa: ASYNC109
        """See Client.submit_job."""
        return await self._submit(job([prompt], options, batch=False), timeout)

    async def submit_batch(
        self,
        prompts: Sequence[str],
        timeout: float = 60.0,  # noqa: ASYNC109
        **options: Unpack[JobOptions],
    ) -> str:
        """See Client.submit_batch."""
        return await self._submit(job(prompts, options, batch=True), timeout)

    async def get_job(self, job_id: str, timeout: float = 10.0) -> Job:  # noqa: ASYNC109
        """See Client.get_job."""
        return Job.FromString(await self._call("GetJob", gateway_pb2.GetJobRequest(job_id=job_id), timeout))

    async def list_jobs(
        self,
        states: Sequence[str] = (),
        page_size: int = 0,
        page_token: str = "",
        timeout: float = 10.0,  # noqa: ASYNC109
    ) -> gateway_pb2.ListJobsResponse:
        """See Client.list_jobs."""
        answer = await self._call("ListJobs", job_page(states, page_size, page_token), timeout)
        return gateway_pb2.ListJobsResponse.FromString(answer)

    async def watch_job(self, job_id: str, timeout: float | None = None) -> AsyncIterator[Job]:  # noqa: ASYNC109
        """See Client.watch_job."""
        method: Any = self._channel.unary_stream(f"/{_SERVICE}/WatchJob")
        asked = gateway_pb2.WatchJobRequest(job_id=job_id).SerializeToString()
        answers = method(asked, timeout=timeout, metadata=self._metadata)
        try:
            async for answer in answers:
                yield gateway_pb2.WatchJobResponse.FromString(answer).job
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error) from None
        finally:
            answers.cancel()

    async def cancel_job(self, job_id: str, timeout: float = 10.0) -> Job:  # noqa: ASYNC109
        """See Client.cancel_job."""
        answer = await self._call("CancelJob", gateway_pb2.CancelJobRequest(job_id=job_id), timeout)
        return gateway_pb2.CancelJobResponse.FromString(answer).job

    async def wait_job(self, job_id: str, timeout: float = 120.0) -> Job:  # noqa: ASYNC109
        """See Client.wait_job."""
        end = time.monotonic() + timeout
        for pause in _pauses():
            job = await self.get_job(job_id)
            if job.state in _ENDED:
                return job
            if time.monotonic() + pause > end:
                raise DeadlineExceeded(f"job {job_id} has not ended in {timeout:g} s")
            await asyncio.sleep(pause)
        raise AssertionError("the pauses do not end")

    def stream(self, model: str = "", patience: float = 60.0, **look: "Unpack[Look]") -> "AsyncStream":
        """See Client.stream; in an `async with` block."""
        from sdxs.conversation import Conversation, settings_of
        from sdxs.streaming import AsyncStream

        return AsyncStream(self._channel, Conversation(model, settings_of(look)), patience, self._metadata)

    async def list_models(self, timeout: float = 10.0) -> list[gateway_pb2.Model]:  # noqa: ASYNC109
        """See Client.list_models."""
        answer = await self._call("ListModels", gateway_pb2.ListModelsRequest(), timeout)
        return list(gateway_pb2.ListModelsResponse.FromString(answer).models)

    async def list_loras(self, model: str = "", timeout: float = 10.0) -> list[gateway_pb2.PublishedLora]:  # noqa: ASYNC109
        """See Client.list_loras."""
        answer = await self._call("ListLoras", gateway_pb2.ListLorasRequest(model=model), timeout)
        return list(gateway_pb2.ListLorasResponse.FromString(answer).loras)

    async def ready(self, timeout: float = 2.0) -> bool:  # noqa: ASYNC109
        """See Client.ready."""
        check: Any = self._channel.unary_unary(_HEALTH)
        try:
            return bool(await check(b"", timeout=timeout) == _SERVING)
        except grpc.RpcError:
            return False

    async def wait_ready(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109
        """See Client.wait_ready."""
        end = time.monotonic() + timeout
        while not await self.ready():
            if time.monotonic() > end:
                raise Unavailable(f"the server is not SERVING after {timeout:g} s")
            await asyncio.sleep(0.1)

    async def _submit(self, message: gateway_pb2.SubmitJobRequest, timeout: float) -> str:  # noqa: ASYNC109
        return gateway_pb2.SubmitJobResponse.FromString(await self._call("SubmitJob", message, timeout)).job_id

    async def _call(self, name: str, message: Message, timeout: float) -> bytes:  # noqa: ASYNC109
        """One rpc. Raises SdxsError."""
        try:
            method: Any = self._channel.unary_unary(f"/{_SERVICE}/{name}")
            return bytes(await method(message.SerializeToString(), timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise rpc.from_rpc_error(error) from None


def request(prompt: str, options: Options) -> gateway_pb2.GenerateRequest:
    """The message. Raises InvalidRequest for a value the wire cannot carry; whether it makes sense is the server's to say."""
    message = gateway_pb2.GenerateRequest()
    fields: dict[str, Any] = {"prompt": prompt, **options}
    for i, control in enumerate(fields.pop("controls", None) or ()):
        if not isinstance(control, Control):
            raise InvalidRequest(f"controls[{i}]", control, "an sdxs.control.Control")
        fill(message.controls.add(), asdict(control), f"controls[{i}].")
    add_loras(message, fields.pop("loras", None))
    if "format" in options:
        fields["format"] = choice("format", options["format"], decoder_pb2.ImageFormat, "IMAGE_FORMAT_")
    fill(message, fields)
    return message


def job(prompts: Sequence[str], options: JobOptions, batch: bool) -> gateway_pb2.SubmitJobRequest:
    """The message, of one prompt or a batch. Raises InvalidRequest as `request` does."""
    fields: dict[str, Any] = dict(options)
    about: dict[str, Any] = {name: fields.pop(name, None) for name in ("request_id", "webhook_url")}
    priority = fields.pop("priority", None)
    message = gateway_pb2.SubmitJobRequest()
    fill(message, about)
    if priority is not None:
        message.priority = choice("priority", priority, gateway_pb2.JobPriority, "JOB_PRIORITY_")
    requests = [request(prompt, cast("Options", fields)) for prompt in prompts]
    if batch and not requests:
        raise InvalidRequest("prompts", prompts, "at least one")
    if batch:
        message.requests.extend(requests)
    else:
        message.request.CopyFrom(requests[0])
    return message


def job_page(states: Sequence[str], page_size: int, page_token: str) -> gateway_pb2.ListJobsRequest:
    """The message. Raises InvalidRequest as `request` does."""
    message = gateway_pb2.ListJobsRequest()
    fill(message, {"page_size": page_size, "page_token": page_token})
    message.states.extend(choice("states", name, gateway_pb2.JobState, "JOB_STATE_") for name in states)
    return message


def add_loras(message: Any, loras: Any) -> None:
    """To the message's list of that name. Raises InvalidRequest as `request` does."""
    for i, lora in enumerate(loras or ()):
        if not isinstance(lora, Lora):
            raise InvalidRequest(f"loras[{i}]", lora, "an sdxs.Lora")
        fill(message.loras.add(), asdict(lora), f"loras[{i}].")


def fill(message: Message, fields: dict[str, Any], prefix: str = "") -> None:
    """Set those that are not None. Raises InvalidRequest that names the field, after `prefix`."""
    for name, value in fields.items():
        if value is None:
            continue
        try:
            setattr(message, name, value)
        except (TypeError, ValueError):
            raise InvalidRequest(prefix + name, value, "a value of the type and range of gateway.proto") from None


def choice(field: str, name: str, enum: Any, prefix: str) -> Any:
    """The enum's value of a name: jpeg -> IMAGE_FORMAT_JPEG. Raises InvalidRequest."""
    values = {key.removeprefix(prefix).lower(): value for key, value in enum.items()}
    if name not in values:
        raise InvalidRequest(field, name, "one of " + ", ".join(values))
    return values[name]


def _generated(response: gateway_pb2.GenerateResponse) -> Generated:
    """Without protobuf, but for the receipt."""
    return Generated([image_of(image) for image in response.images], response.receipt)


def image_of(image: decoder_pb2.Image) -> Image:
    """Without protobuf."""
    image_format = decoder_pb2.ImageFormat.Name(image.format).removeprefix("IMAGE_FORMAT_").lower()
    return Image(image.data, image_format, image.width, image.height)


def _pauses() -> Any:
    """Seconds between two questions: short first, never above half a second."""
    pause = 0.02
    while True:
        yield pause
        pause = min(0.5, pause * 1.5)
