"""Clients that are none of ours: buf's, those that protoc makes for Python, and Node's, made from protos/ as it runs."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from sdxs.pipeline import OneStepPipeline
from sdxs.v1 import decoder_pb2, gateway_pb2, gateway_pb2_grpc, stream_pb2
from tests.integration.test_control_server import serving

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")
PROMPT = "red apple"
RAW = decoder_pb2.IMAGE_FORMAT_RAW


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, redis_url: str) -> Iterator[str]:
    with serving(tiny_bundle, redis_url=redis_url) as address:
        yield address


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Path) -> bytes:
    """The in-process image of seed 7."""
    return np.asarray(OneStepPipeline.from_bundle(tiny_bundle)(PROMPT, 7)[0]).tobytes()


def curl(address: str, method: str, *messages: dict[str, Any]) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit code, answers and the error of a call by `buf curl`, which knows the service by reflection alone."""
    url = f"http://{address}/sdxs.v1.GatewayService/{method}"
    command = [
        str(BUF),
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "-d",
        "\n".join(map(json.dumps, messages)),
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    answers, decoder, text = list[dict[str, Any]](), json.JSONDecoder(), done.stdout.strip()
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].strip()
    return done.returncode, answers, json.loads(done.stderr) if done.stderr.strip() else {}


def test_buf_gets_the_in_process_image(address: str, wanted: bytes) -> None:
    code, [answer], _ = curl(address, "Generate", {"prompt": PROMPT, "seed": "7", "format": "IMAGE_FORMAT_RAW"})
    assert code == 0 and base64.b64decode(answer["images"][0]["data"]) == wanted
    assert answer["receipt"]["seeds"] == ["7"]


def test_buf_is_told_which_field_is_wrong(address: str) -> None:
    code, answers, error = curl(address, "Generate", {"prompt": ""})
    assert (code != 0, answers, error["code"]) == (True, [], "invalid_argument")
    [detail] = error["details"]
    assert detail["type"] == "google.rpc.BadRequest"
    value = base64.b64decode(detail["value"] + "=" * (-len(detail["value"]) % 4))
    assert [each.field for each in error_details_pb2.BadRequest.FromString(value).field_violations] == ["prompt"]


def test_buf_submits_a_job_and_watches_it_to_its_end(address: str) -> None:
    code, [job], _ = curl(address, "SubmitJob", {"request": {"prompt": PROMPT, "seed": "7"}})
    assert code == 0
    code, changes, _ = curl(address, "WatchJob", {"jobId": job["jobId"]})
    assert code == 0 and changes[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert len(changes[-1]["job"]["images"]) == 1


def test_buf_streams_frames(address: str, wanted: bytes) -> None:
    opening = {"open": {"settings": {"prompt": PROMPT, "seed": "7", "format": "IMAGE_FORMAT_RAW"}}}
    code, answers, _ = curl(address, "Stream", opening, {"frame": {"id": "1"}})
    [image] = [answer["image"] for answer in answers if "image" in answer]
    assert (code, image["frameId"]) == (0, "1") and base64.b64decode(image["image"]["data"]) == wanted
    assert answers[-1]["state"]["phase"] == "SESSION_PHASE_CLOSED"


def test_the_stubs_for_python_do_the_same(address: str, wanted: bytes) -> None:
    request = gateway_pb2.GenerateRequest(prompt=PROMPT, seed=7, format=RAW)
    with grpc.insecure_channel(address) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
        assert stub.Generate(request, timeout=30).images[0].data == wanted
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(gateway_pb2.GenerateRequest(prompt=PROMPT, n=17), timeout=30)
        assert fields_at_fault(caught.value) == ["n"]
        settings = stream_pb2.StreamSettings(prompt=PROMPT, seed=7, format=RAW)
        messages = [stream_pb2.StreamRequest(open=stream_pb2.StreamOpen(settings=settings))]
        messages.append(stream_pb2.StreamRequest(frame=stream_pb2.StreamFrame(id=1)))
        answers = list(stub.Stream(iter(messages), timeout=30))
        assert [answer.image.image.data for answer in answers if answer.HasField("image")] == [wanted]


async def test_the_stubs_for_asyncio_do_the_same(address: str, wanted: bytes) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
        made = await stub.Generate(gateway_pb2.GenerateRequest(prompt=PROMPT, seed=7, format=RAW), timeout=30)
        assert made.images[0].data == wanted
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(gateway_pb2.GenerateRequest(prompt=PROMPT, width=9), timeout=30)
        assert fields_at_fault(caught.value) == ["width"]
        job = await stub.SubmitJob(gateway_pb2.SubmitJobRequest(request=gateway_pb2.GenerateRequest(prompt=PROMPT)), timeout=30)
        states = [
            answer.job.state async for answer in stub.WatchJob(gateway_pb2.WatchJobRequest(job_id=job.job_id), timeout=30)
        ]
        assert states[-1] == gateway_pb2.JOB_STATE_SUCCEEDED


def fields_at_fault(error: Any) -> list[str]:
    """By google.rpc.Status, unpacked here."""
    [packed] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    details: list[any_pb2.Any] = list(status_pb2.Status.FromString(packed).details)
    bad = error_details_pb2.BadRequest()
    assert details[0].Unpack(bad)
    return [each.field for each in bad.field_violations]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
def test_node_with_grpc_js(address: str, tmp_path: Path) -> None:
    """examples/node, its packages from the registry."""
    folder = Path(shutil.copytree(ROOT / "examples" / "node", tmp_path / "node"))
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, timeout=120, check=True)
    environment = {**os.environ, "SDXS_PROTOS": str(ROOT / "protos")}
    done = subprocess.run(
        ["node", "client.js", address, PROMPT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"what": "generated", "bytes": lines[0]["bytes"], "seeds": ["7"]} and lines[0]["bytes"] > 100
    assert lines[1]["code"] == "INVALID_ARGUMENT" and lines[1]["message"].startswith("prompt:") and lines[1]["rich"] == 1
    answered = {line["frame"]: line["what"] for line in lines if "frame" in line}
    assert set(answered) == {"1", "2", "3"} and answered["3"] == "image"
    assert lines[-1] == {"what": "state", "phase": "SESSION_PHASE_CLOSED"}
