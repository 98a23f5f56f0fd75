"""Small parts of serving: scaling, the prompt cache, health, errors across the wire."""

import asyncio
import pickle
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from ray.serve.config import AutoscalingConfig

from sdxs import errors, rpc
from sdxs.errors import Internal, InvalidRequest, NotFound, Overloaded, SdxsError, Unavailable
from sdxs.sizes import Size
from sdxs.v1 import control_pb2, decoder_pb2, unet_pb2
from services.fabric.deadline import Deadline
from services.fabric.models import ServedModel
from services.fabric.peers import Payload
from services.fabric.scaling import follow_load
from services.gateway.cache import ByteCache
from services.gateway.chain import Chain
from services.gateway.checks import Order, UnknownModel
from services.gateway.health import keep_health


def scaling_context(**metrics: dict[int, float]) -> Any:
    """1 to 5 replicas, 4 calls or jobs to each."""
    return SimpleNamespace(
        aggregated_metrics=metrics,
        config=AutoscalingConfig(target_ongoing_requests=4),
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
    )


@pytest.mark.parametrize(
    ("in_flight", "wanted"), [([], 1), ([0.0, 0.0], 1), ([4.0], 1), ([4.1], 2), ([8.0, 8.0], 4), ([100.0, 100.0], 5)]
)
def test_replicas_follow_the_calls_in_flight(in_flight: list[float], wanted: int) -> None:
    assert follow_load(scaling_context(in_flight=dict(enumerate(in_flight))))[0] == wanted


@pytest.mark.parametrize(("queued", "wanted"), [([0.0], 1), ([4.0], 1), ([9.0], 3), ([9.0, 9.0, 8.0], 3), ([100.0], 5)])
def test_workers_follow_the_one_queue_they_share(queued: list[float], wanted: int) -> None:
    assert follow_load(scaling_context(queued=dict(enumerate(queued))))[0] == wanted


def test_the_prompt_cache_keeps_what_was_used_last() -> None:
    cache = ByteCache(max_bytes=10)
    cache.put(("one", "a"), b"1234")
    cache.put(("one", "b"), b"1234")
    assert cache.get(("one", "a")) == b"1234"
    cache.put(("two", "a"), b"abcd")
    assert [cache.get(("one", "a")), cache.get(("one", "b")), cache.get(("two", "a"))] == [b"1234", None, b"abcd"]
    cache.put(("one", "huge"), b"x" * 11)
    assert cache.get(("one", "huge")) is None
    assert cache.get(("one", "a")) == b"1234"


@dataclass
class Refusing:
    """Text encoder, U-Net and decoder in one, of which one rpc refuses a field."""

    rpc: str
    field: str
    ready: bool = True

    async def call(self, name: str, payload: Payload, deadline: Deadline, affinity: str = "") -> bytes:
        if name == self.rpc:
            raise InvalidRequest(self.field, "nan", "finite numbers")
        return b""


MODEL = ServedModel("tiny", "sha256:0", 32, 32, 16)
ORDER = Order(MODEL, Size(32, 32), "red apple", (1,), decoder_pb2.IMAGE_FORMAT_PNG, deterministic=False)


@pytest.mark.parametrize(
    ("name", "field", "kind"),
    [
        ("Encode", "prompt", InvalidRequest),
        ("Encode", "request", Internal),
        ("Denoise", "text.text.shape", Internal),
        ("Decode", "latent.latent.data", Internal),
        ("Denoise", "controls[0].image", InvalidRequest),
        ("Denoise", "controls[3].type", InvalidRequest),
        ("Denoise", "inline.parts[3].data", Internal),
        ("Denoise", "shared", Internal),
        ("EncodeImage", "init_image", InvalidRequest),
        ("EncodeImage", "request", Internal),
    ],
)
async def test_what_a_stage_refuses_is_the_callers_fault_only_if_the_caller_wrote_it(
    name: str, field: str, kind: type[SdxsError]
) -> None:
    stage = Refusing(name, field)
    order = replace(ORDER, init_image=b"an image")
    with pytest.raises(kind) as caught:
        await Chain(stage, stage, stage, ByteCache(0)).run(order, [""], Deadline())
    assert caught.value.field == (field if kind is InvalidRequest else "")


@dataclass
class Recording:
    """A stage that answers nothing, and remembers what it was asked."""

    name: str
    log: list[tuple[str, str, bytes]]
    ready: bool = True

    async def call(self, name: str, payload: Payload, deadline: Deadline, affinity: str = "") -> bytes:
        assert isinstance(payload, bytes)
        self.log.append((self.name, name, payload))
        return b""


@pytest.mark.parametrize(
    ("controls", "own_room", "way"),
    [(False, True, "unet"), (True, True, "controlnet"), (True, False, "unet"), (False, False, "unet")],
)
async def test_only_requests_with_controls_pass_by_the_controlnet(controls: bool, own_room: bool, way: str) -> None:
    log: list[tuple[str, str, bytes]] = []
    text, unet, decoder, controlnet = (Recording(name, log) for name in ("text", "unet", "decoder", "controlnet"))
    chain = Chain(text, unet, decoder, ByteCache(0), *([controlnet] if own_room else []))
    asked = (control_pb2.Control(image=b"an image", controlnet="lines"),) if controls else ()
    await chain.run(replace(ORDER, controls=asked), [""], Deadline())
    assert [(name, rpc) for name, rpc, _ in log] == [("text", "Encode"), (way, "Denoise"), ("decoder", "Decode")]
    assert tuple(unet_pb2.DenoiseRequest.FromString(log[1][2]).controls) == asked
    controlnet.ready = False
    assert chain.ready is not own_room


@dataclass
class Service:
    """Stages that come and go."""

    ready: bool = False


@dataclass
class Plane:
    said: list[bool] = field(default_factory=list)

    async def set_serving(self, serving: bool) -> None:
        self.said.append(serving)


async def test_health_says_what_the_service_says() -> None:
    service, plane = Service(), Plane()
    health = asyncio.create_task(keep_health(service, plane))
    for service.ready in (True, False, True):
        await asyncio.sleep(0.25)
    assert plane.said == [True, False, True]
    health.cancel()


def everything(kind: type[SdxsError] = SdxsError) -> list[type[SdxsError]]:
    ours = [kind] if kind.__module__ == errors.__name__ else []
    return ours + [below for child in kind.__subclasses__() for below in everything(child)]


class Failed:
    """A call that ended with what `to_status` made."""

    def __init__(self, error: SdxsError) -> None:
        self._code, self._details, self._metadata = rpc.to_status(error)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> rpc.Metadata:
        return self._metadata


@pytest.mark.parametrize("kind", everything())
def test_each_error_arrives_as_it_left(kind: type[SdxsError]) -> None:
    sent = InvalidRequest("seed", -1, "0 or more") if issubclass(kind, InvalidRequest) else kind("in these words")
    arrived = rpc.from_rpc_error(Failed(sent))
    assert type(arrived) is kind
    assert str(arrived) == str(sent)
    if isinstance(sent, InvalidRequest):
        assert isinstance(arrived, InvalidRequest)
        assert (arrived.field, arrived.allowed) == ("seed", "0 or more")


def test_the_model_that_is_not_served_arrives_as_the_field_at_fault() -> None:
    arrived = rpc.from_rpc_error(Failed(UnknownModel("not here")))
    assert (type(arrived), arrived.field) == (NotFound, "model")


def test_when_to_try_again_arrives_with_the_field_at_fault() -> None:
    sent = pickle.loads(pickle.dumps(Overloaded("full", retry_after_s=2.25)))  # as from one Ray process to another
    sent.field = "requests"
    arrived = rpc.from_rpc_error(Failed(sent))
    assert (type(arrived), arrived.field, arrived.retry_after_s) == (Overloaded, "requests", 2.25)
    assert rpc.from_rpc_error(Failed(NotFound("no"))).retry_after_s is None
    assert (Overloaded().retry_after_s, Unavailable().retry_after_s, InvalidRequest("a", 1, "2").retry_after_s) == (
        0.5,
        1.0,
        None,
    )


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in everything()]
    assert len(set(codes)) == len(codes)


def test_long_values_do_not_fill_the_metadata() -> None:
    _, message, metadata = rpc.to_status(InvalidRequest("prompt", "x" * 100_000, "y" * 100_000))
    assert len(message) <= 1000
    assert sum(len(key) + len(value) for key, value in metadata) < 4096
    assert status_pb2.Status.FromString(metadata[0][1]).code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
