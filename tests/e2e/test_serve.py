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
from sdxs.pipeline import OneStepPipeline
from sdxs.v1 import gateway_pb2
from tests.e2e.conftest import Served
from tests.serving import BAD_REQUESTS, in_process, refusal

pytestmark = pytest.mark.timeout(400)

PROMPT = "red apple"
DEPLOYMENTS = ("text_encoder", "unet", "decoder", "gateway", "worker")


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


def test_every_room_is_a_process_of_its_own(served: Served) -> None:
    pids = [served.replicas(deployment) for deployment in DEPLOYMENTS]
    assert [len(one) for one in pids] == [1, 1, 1, 1, 1]
    assert len(set().union(*pids)) == 5


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
def test_a_served_file_is_the_in_process_file(client: Client, tiny_bundle: Path, name: str) -> None:
    served = client.generate(PROMPT, seed=7, format=name)
    assert served.images[0].data == in_process(tiny_bundle, PROMPT, 7, images.NAMES[name])


def test_under_load_images_differ_by_rounding_at_most(client: Client, tiny_bundle: Path) -> None:
    pipeline = OneStepPipeline.from_bundle(tiny_bundle)
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


def test_a_job_ends_as_a_file_behind_a_url(client: Client, tiny_bundle: Path) -> None:
    job = client.wait_job(client.submit_job(PROMPT, seed=7, format="png"))
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
    data = urllib.request.urlopen(job.images[0].url, timeout=10).read()
    assert data == in_process(tiny_bundle, PROMPT, 7, images.PNG)
    assert job.images[0].sha256 == hashlib.sha256(data).hexdigest()


def test_a_passed_deadline_is_told(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        call: Any = channel.unary_unary("/sdxs.v1.GatewayService/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            call(gateway_pb2.GenerateRequest(prompt=PROMPT, n=16).SerializeToString(), timeout=0.002)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@dataclass
class Traffic:
    """Callers that never stop asking, and what they saw."""

    address: str
    seconds: list[float] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with Client(self.address) as client:
            while not self.stopping.is_set():
                began = time.monotonic()
                try:
                    client.generate(PROMPT, seed=1, format="raw", timeout=120)
                except Exception as error:
                    self.errors.append(error)
                self.seconds.append(time.monotonic() - began)


@pytest.mark.parametrize("deployment", ["unet"])
def test_a_killed_replica_costs_time_but_no_request(
    served: Served, client: Client, tiny_bundle: Path, deployment: str, record_property: Any
) -> None:
    [victim] = served.replicas(deployment)
    traffic = Traffic(served.address)
    callers = [threading.Thread(target=traffic.run) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        time.sleep(0.5)
        before = len(traffic.seconds)
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        noticed = _wait(lambda: not client.ready(), 5)
        recovered = _wait(client.ready, START_AGAIN_S)
        after = client.generate(PROMPT, seed=7, format="raw")
    finally:
        traffic.stopping.set()
        for caller in callers:
            caller.join()
    record_property("seconds_until_noticed", noticed - began)
    record_property("seconds_until_recovered", recovered - began)
    print(f"noticed after {noticed - began:.2f} s, recovered after {recovered - began:.2f} s")
    assert not traffic.errors
    assert 0 < before < len(traffic.seconds)
    assert after.images[0].data == in_process(tiny_bundle, PROMPT, 7, images.RAW)
    assert served.replicas(deployment) - {victim}


START_AGAIN_S = 90  # seconds on an idle machine: the new process imports torch


def _wait(condition: Any, seconds: float) -> float:
    """When it became true. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
    return time.monotonic()
