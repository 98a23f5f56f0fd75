"""`sdxs serve` as its users meet it: separate replicas on Ray Serve, asked over gRPC, jobs, and the death of a replica."""

import hashlib
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sdxs import images
from sdxs.client import Client
from sdxs.control import Control
from sdxs.errors import SdxsError
from sdxs.pipeline import OneStepPipeline
from sdxs.streaming import Drawn, Failed, Phase
from sdxs.v1 import control_pb2, gateway_pb2
from tests.controlnets import drawing
from tests.e2e.conftest import Served, mapped, serving
from tests.serving import BAD_REQUESTS, INVALID, in_process, refusal

pytestmark = pytest.mark.timeout(400)

PROMPT = "red apple"
DEPLOYMENTS = ("text_encoder", "unet", "controlnet", "decoder", "gateway", "worker")
DRAWING = drawing()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


def test_every_room_is_a_process_of_its_own(served: Served) -> None:
    pids = [served.replicas(deployment) for deployment in DEPLOYMENTS]
    assert [len(one) for one in pids] == [1] * 6
    assert len(set().union(*pids)) == 6


def test_health_speaks_the_standard_protocol(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "sdxs.v1.GatewayService"):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["raw", "png", "jpeg"])
def test_a_served_file_is_the_in_process_file(client: Client, control_bundle: Path, name: str) -> None:
    served = client.generate(PROMPT, seed=7, format=name)
    assert served.images[0].data == in_process(control_bundle, PROMPT, 7, images.NAMES[name])


def test_under_load_images_differ_by_rounding_at_most(client: Client, control_bundle: Path) -> None:
    pipeline = OneStepPipeline.from_bundle(control_bundle)
    with ThreadPoolExecutor(8) as threads:
        served = list(threads.map(lambda seed: client.generate(PROMPT, seed=seed, format="raw"), range(48)))
    for seed, one in enumerate(served):
        expected = np.asarray(pipeline(PROMPT, seed=seed)[0], np.int16)
        assert np.abs(np.asarray(one.images[0].pil(), np.int16) - expected).max() <= 1


@pytest.mark.parametrize(("payload", "code", "field"), BAD_REQUESTS)
def test_a_bad_request_names_its_field(served: Served, payload: bytes, code: grpc.StatusCode, field: str) -> None:
    found = refusal(served.address, "Generate", payload)
    assert (found.code, found.fields) == (code, (field,))
    assert "Traceback" not in found.message


def test_a_job_ends_as_a_file_behind_a_url(client: Client, control_bundle: Path) -> None:
    job = client.wait_job(client.submit_job(PROMPT, seed=7, format="png"))
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
    data = urllib.request.urlopen(job.images[0].url, timeout=10).read()
    assert data == in_process(control_bundle, PROMPT, 7, images.PNG)
    assert job.images[0].sha256 == hashlib.sha256(data).hexdigest()


def test_a_passed_deadline_is_told(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        call: Any = channel.unary_unary("/sdxs.v1.GatewayService/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            call(gateway_pb2.GenerateRequest(prompt=PROMPT, n=16).SerializeToString(), timeout=0.002)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@dataclass(frozen=True)
class Ask:
    """What steers an image, as the server and the pipeline take it."""

    controls: tuple[Control, ...] = ()
    init_image: bytes = b""
    strength: float = 1.0

    def of(self, client: Client, seed: int = 7, **options: Any) -> Any:
        if self.init_image:
            options |= {"init_image": self.init_image, "strength": self.strength}
        return client.generate(PROMPT, seed=seed, format="raw", controls=self.controls, **options)

    def here(self, pipeline: OneStepPipeline, seed: int = 7) -> np.ndarray:
        return np.asarray(pipeline(PROMPT, seed, 1, self.controls, self.init_image, self.strength)[0])


EDGE, COLOUR = Control(DRAWING, "edge"), Control(drawing((50, 70)), "colour", scale=0.5)
ASKS = [Ask(), Ask((EDGE,)), Ask((COLOUR, EDGE)), Ask((EDGE,), DRAWING, 0.5), Ask((), DRAWING, 0.5)]


@pytest.fixture(scope="module")
def pipeline(control_bundle: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(control_bundle)


def test_a_steered_image_is_the_in_process_one(served: Served, client: Client, pipeline: OneStepPipeline) -> None:
    for ask in ASKS:
        one = ask.of(client)
        assert one.images[0].data == ask.here(pipeline).tobytes()
        assert (one.receipt.unet_batch, one.receipt.controlnet_batch) == (1, int(bool(ask.controls)))


def test_residuals_cross_from_one_replica_to_the_other_in_shared_memory(served: Served, client: Client) -> None:
    """The U-Net's process has the ControlNet's memory mapped, and nobody else has."""
    [unet], [controlnet] = served.replicas("unet"), served.replicas("controlnet")
    ASKS[1].of(client)
    assert mapped(unet) == mapped(controlnet) and len(mapped(unet)) == 1
    assert not any(mapped(other) for name in ("gateway", "decoder", "text_encoder") for other in served.replicas(name))
    assert "residuals go to it in messages" not in served.log.read_text()


def test_steered_and_plain_under_load_differ_by_rounding_at_most(client: Client, pipeline: OneStepPipeline) -> None:
    asked = [(ASKS[seed % len(ASKS)], seed) for seed in range(40)]
    with ThreadPoolExecutor(12) as threads:
        served = list(threads.map(lambda one: one[0].of(client, seed=one[1]), asked))
    assert max(one.receipt.unet_batch for one in served) > 1
    for (ask, seed), one in zip(asked, served, strict=True):
        found, expected = np.asarray(one.images[0].pil(), np.int16), ask.here(pipeline, seed).astype(np.int16)
        assert np.abs(found - expected).max() <= 1


def test_a_bad_control_names_its_field(served: Served) -> None:
    bad = gateway_pb2.GenerateRequest(prompt=PROMPT, controls=[control_pb2.Control(image=DRAWING[:50], type="edge")])
    found = refusal(served.address, "Generate", bad.SerializeToString())
    assert (found.code, found.fields) == (INVALID, ("controls[0].image",))


@dataclass
class Traffic:
    """Callers that never stop asking, plain or steered, and what they saw."""

    address: str
    ask: Ask
    seconds: list[float] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with Client(self.address) as client:
            while not self.stopping.is_set():
                began = time.monotonic()
                try:
                    self.ask.of(client, seed=1, timeout=120)
                except Exception as error:
                    self.errors.append(error)
                self.seconds.append(time.monotonic() - began)
                time.sleep(0.02)  # callers who are served leave the replica that starts again some of the machine


@pytest.mark.parametrize("deployment", ["unet", "controlnet"])
def test_a_killed_replica_costs_time_but_no_request(
    served: Served, client: Client, pipeline: OneStepPipeline, deployment: str, record_property: Any
) -> None:
    [victim] = served.replicas(deployment)
    traffic = [Traffic(served.address, ask) for ask in ASKS[:3]]
    callers = [threading.Thread(target=each.run) for each in traffic]
    for caller in callers:
        caller.start()
    try:
        time.sleep(0.5)
        before = [len(each.seconds) for each in traffic]
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        noticed = _wait(lambda: not client.ready(), 5)
        recovered = _wait(client.ready, START_AGAIN_S)
        after = ASKS[2].of(client)
    finally:
        for each in traffic:
            each.stopping.set()
        for caller in callers:
            caller.join()
    record_property("seconds_until_noticed", noticed - began)
    record_property("seconds_until_recovered", recovered - began)
    print(f"noticed after {noticed - began:.2f} s, recovered after {recovered - began:.2f} s")
    assert not [each.errors for each in traffic if each.errors]
    assert all(0 < asked < len(each.seconds) for asked, each in zip(before, traffic, strict=True))
    assert after.images[0].data == ASKS[2].here(pipeline).tobytes()
    [unet] = served.replicas("unet") - {victim}
    assert served.replicas(deployment) - {victim}
    assert len(mapped(unet)) == 1, "memory of a lender that died is still held, or none is read"


def test_a_stream_outlives_a_unet(served: Served, client: Client, pipeline: OneStepPipeline) -> None:
    """Frames go on coming while the one replica is killed: the session stays, each is answered, and images come again."""
    [victim] = served.replicas("unet")
    sent, answered, images_seen = 0, set(), 0
    stopping = threading.Event()
    with client.stream(prompt=PROMPT, seed=7, format="raw") as stream:

        def flood() -> None:
            nonlocal sent
            while not stopping.wait(0.05):
                sent = stream.send()
            stream.finish()

        sender = threading.Thread(target=flood)
        sender.start()
        try:
            killed_after, drawn_after, phases = 0, 0, []
            for event in stream:
                if isinstance(event, Phase):
                    phases.append(event.name)
                    continue
                assert not isinstance(event, Failed), event
                answered.add(event.frame_id)
                if not isinstance(event, Drawn):
                    continue
                assert event.image.data == Ask().here(pipeline).tobytes()
                images_seen += 1
                if images_seen == 5:
                    os.kill(victim, signal.SIGKILL)
                    killed_after = sent
                drawn_after += bool(killed_after) and event.frame_id > killed_after
                if drawn_after == 5:
                    stopping.set()
        finally:
            stopping.set()
            sender.join()
    assert phases == ["active", "closed"], "one session all along"
    assert answered == set(range(1, sent + 1))
    assert drawn_after >= 5 and served.replicas("unet") - {victim}


def test_callers_with_little_time_are_told_while_a_replica_is_away(served: Served, client: Client) -> None:
    """An image, or an error that says what is wrong, within their deadline."""
    [victim] = served.replicas("controlnet")
    os.kill(victim, signal.SIGKILL)
    ends = time.monotonic() + 2.5
    seen: list[str] = []
    while time.monotonic() < ends:
        began = time.monotonic()
        try:
            ASKS[1].of(client, timeout=1.0)
            seen.append("OK")
        except SdxsError as error:
            seen.append(error.code)
        assert time.monotonic() - began < 1.5
        Ask().of(client, timeout=10)  # who needs no ControlNet is served meanwhile
    assert set(seen) <= {"OK", "DEADLINE_EXCEEDED", "UNAVAILABLE"} and len(set(seen) - {"OK"}) > 0
    _wait(client.ready, START_AGAIN_S)


@pytest.mark.slow
def test_fused_controlnets_have_no_replica_of_their_own(
    served: Served, client: Client, pipeline: OneStepPipeline, redis_variables: dict[str, str], tmp_path: Path
) -> None:
    with (
        serving(served.bundle, tmp_path / "log", redis_variables, "--fused-controlnet") as fused,
        Client(fused.address) as other,
    ):
        assert [len(fused.replicas(name)) for name in ("unet", "controlnet")] == [1, 0]
        for ask in ASKS:
            assert ask.of(other).images[0].data == ask.of(client).images[0].data == ask.here(pipeline).tobytes()
        assert not mapped(*fused.replicas("unet"))


START_AGAIN_S = 90  # seconds on an idle machine: the new process imports torch


def _wait(condition: Any, seconds: float) -> float:
    """When it became true. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
    return time.monotonic()
