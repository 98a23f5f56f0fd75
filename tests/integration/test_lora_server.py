"""LoRAs on a real server: published in S3, named by requests, jobs and streams, each image as the library draws it."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxs import Lora
from sdxs.client import Client
from sdxs.control import Control
from sdxs.conversation import Drawn
from sdxs.embedded import free_port
from sdxs.errors import InvalidRequest, NotFound, Unavailable
from sdxs.lora import published
from sdxs.lora.manifest import LoraManifest
from sdxs.lora.published import FILE
from sdxs.lora.publishing import publish
from sdxs.pipeline import OneStepPipeline
from sdxs.store import open_store
from sdxs.v1 import lora_pb2
from services.settings import ServingSettings
from tests.controlnets import drawing
from tests.integration.test_control_server import serving
from tests.loras import tiny_lora
from tests.serving import INVALID, MISSING, message, refusal

PROMPT = "red apple"
BOTH, UNET, TEXT = "both", "unet-only", "text-only"


@pytest.fixture(scope="module")
def values(s3_variables: dict[str, str], redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {name.removeprefix("SDXS_").lower(): value for name, value in s3_variables.items()}
    cache = tmp_path_factory.mktemp("cache")
    return {
        **found,
        "redis_url": redis_url,
        "cache_dir": str(cache),
        "max_loras": 2,
        "max_lora_bytes": 100_000,
        "job_visibility_s": 2,
    }


@pytest.fixture(scope="module")
def settings(values: dict[str, Any]) -> ServingSettings:
    return ServingSettings.model_validate(values)


@pytest.fixture(scope="module")
def loras(control_bundle: Path, settings: ServingSettings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoraManifest]:
    """One of both networks, one of each alone."""
    parts: dict[str, dict[str, Any]] = {BOTH: {}, UNET: {"text": ()}, TEXT: {"unet": ()}}
    found = {}
    for seed, (name, options) in enumerate(parts.items()):
        path = tiny_lora(control_bundle, tmp_path_factory.mktemp(name), seed, **options)
        found[name] = publish(path, name, str(control_bundle), settings, ("blob",), f"the {name} one")
    return found


@pytest.fixture(scope="module")
def address(control_bundle: Path, values: dict[str, Any], loras: dict[str, LoraManifest]) -> Iterator[str]:
    with serving(control_bundle, **values) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(control_bundle: Path, settings: ServingSettings) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(control_bundle, settings)


def here(pipeline: OneStepPipeline, loras: list[Lora], seed: int = 5, **options: Any) -> np.ndarray:
    return np.asarray(pipeline(PROMPT, seed, loras=loras, **options)[0], np.int16)


@pytest.mark.parametrize(
    "asked",
    [
        [(BOTH, 1.0)],
        [(UNET, 0.8)],
        [(TEXT, -1.5)],
        [(BOTH, 0.5), (UNET, 1.0)],
        [(UNET, 1.0), (BOTH, 0.5)],
        [(TEXT, 1), (UNET, 1)],
    ],
)
def test_a_served_image_is_the_in_process_one(
    client: Client, pipeline: OneStepPipeline, loras: dict[str, LoraManifest], asked: list[tuple[str, float]]
) -> None:
    wanted = [Lora(name, scale) for name, scale in asked]
    served = client.generate(PROMPT, seed=5, format="raw", loras=wanted)
    expected = here(pipeline, wanted)
    assert served.images[0].data == expected.astype(np.uint8).tobytes()
    assert np.abs(expected - here(pipeline, [])).max() > 2, "it changes nothing"
    applied = [(each.name, each.digest, round(each.scale, 5)) for each in served.receipt.loras]
    assert applied == [(name, loras[name].digest, scale) for name, scale in asked]


def test_scale_0_is_no_lora_byte_for_byte(client: Client, pipeline: OneStepPipeline) -> None:
    client.generate(PROMPT, seed=5, loras=[Lora(BOTH)])
    served = client.generate(PROMPT, seed=5, format="raw", loras=[Lora(BOTH, 0), Lora(TEXT, 0)])
    assert served.images[0].data == here(pipeline, []).astype(np.uint8).tobytes()
    assert [each.scale for each in served.receipt.loras] == [0, 0]


def test_with_controls_and_an_init_image(client: Client, pipeline: OneStepPipeline) -> None:
    edge = Control(drawing(), "edge")
    options: dict[str, Any] = {"controls": [edge], "init_image": drawing(), "strength": 0.7}
    served = client.generate(PROMPT, seed=5, format="raw", loras=[Lora(BOTH)], **options)
    assert served.images[0].data == here(pipeline, [Lora(BOTH)], **options).astype(np.uint8).tobytes()


def test_requests_with_other_loras_share_a_batch_and_no_pixels(client: Client, pipeline: OneStepPipeline) -> None:
    sets = [[], [Lora(BOTH)], [Lora(UNET)], [Lora(UNET, 0.5)], [Lora(TEXT)], [Lora(BOTH), Lora(UNET, 0.3)]]
    asked = [(sets[i % len(sets)], i) for i in range(60)]
    with ThreadPoolExecutor(20) as threads:
        served = list(threads.map(lambda one: client.generate(PROMPT, seed=one[1], format="raw", loras=one[0]), asked))
        alone = list(
            threads.map(lambda one: client.generate(PROMPT, seed=one[1], format="raw", loras=one[0], deterministic=True), asked)
        )
    assert max(one.receipt.unet_batch for one in served) > 1
    for (loras, seed), one, by_itself in zip(asked, served, alone, strict=True):
        expected = here(pipeline, loras, seed)
        assert np.abs(np.asarray(one.images[0].pil(), np.int16) - expected).max() <= 1
        assert by_itself.images[0].data == expected.astype(np.uint8).tobytes()


def test_a_name_moves_and_a_digest_stays(
    client: Client, control_bundle: Path, settings: ServingSettings, pipeline: OneStepPipeline, tmp_path: Path
) -> None:
    first = publish(tiny_lora(control_bundle, tmp_path / "1", 21), "moving", str(control_bundle), settings)
    assert client.generate(PROMPT, loras=[Lora("moving")]).receipt.loras[0].digest == first.digest
    second = publish(tiny_lora(control_bundle, tmp_path / "2", 22), "moving", str(control_bundle), settings)
    for _ in range(100):
        told = client.generate(PROMPT, seed=5, format="raw", loras=[Lora("moving")])
        if told.receipt.loras[0].digest == second.digest:
            break
    assert told.images[0].data == here(pipeline, [Lora("moving")]).astype(np.uint8).tobytes()
    old = client.generate(PROMPT, seed=5, format="raw", loras=[Lora(first.digest[:25])])
    assert old.receipt.loras[0].digest == first.digest
    assert old.images[0].data == here(pipeline, [Lora(first.digest)]).astype(np.uint8).tobytes()


def test_files_of_images_say_their_loras(client: Client, loras: dict[str, LoraManifest]) -> None:
    image = client.generate(PROMPT, format="png", loras=[Lora(BOTH, 0.8)]).images[0].pil()
    receipt = json.loads(next(text for text in image.info.values() if isinstance(text, str) and text.startswith("{")))
    assert receipt["loras"] == [{"name": BOTH, "digest": loras[BOTH].digest, "scale": 0.8}]


def test_jobs_have_loras_too(client: Client, pipeline: OneStepPipeline, loras: dict[str, LoraManifest]) -> None:
    job_id = client.submit_job(PROMPT, seed=5, format="raw", loras=[Lora(BOTH, 0.5)], request_id="with-lora")
    assert client.submit_job(PROMPT, seed=5, format="raw", loras=[Lora(BOTH, 0.5)], request_id="with-lora") == job_id
    job = client.wait_job(job_id)
    with urllib.request.urlopen(job.images[0].url) as answer:
        assert answer.read() == here(pipeline, [Lora(BOTH, 0.5)]).astype(np.uint8).tobytes()
    assert job.receipt.loras[0].digest == loras[BOTH].digest
    with pytest.raises(NotFound) as error:
        client.submit_job(PROMPT, loras=[Lora("nobody")])
    assert error.value.field == "request.loras[0].name"


def test_streams_take_them_up_and_put_them_down(client: Client, pipeline: OneStepPipeline) -> None:
    with client.stream(prompt=PROMPT, seed=5, format="raw", loras=[Lora(BOTH)]) as stream:
        for look, expected in (({}, [Lora(BOTH)]), ({"loras": [Lora(UNET, 0.5)]}, [Lora(UNET, 0.5)]), ({"loras": []}, [])):
            if look:
                stream.configure(**look)
            stream.send()
            drawn = next(event for event in stream if isinstance(event, Drawn))
            assert drawn.image.data == here(pipeline, expected).astype(np.uint8).tobytes()


def test_lists_those_of_a_model(client: Client, loras: dict[str, LoraManifest]) -> None:
    found = {each.name: each for each in client.list_loras("tiny")}
    assert found[UNET].digest == loras[UNET].digest
    assert (found[UNET].pointer, found[UNET].rank, list(found[UNET].trigger_words)) == ("prod", 2, ["blob"])
    assert client.list_loras("other") == []


def lora(name: str, scale: float | None = None) -> lora_pb2.Lora:
    return lora_pb2.Lora(name=name, scale=scale)


BAD = [
    ([lora(BOTH, float("nan"))], INVALID, "loras[0].scale"),
    ([lora(BOTH), lora(UNET, -11)], INVALID, "loras[1].scale"),
    ([lora(f"n{i}") for i in range(5)], INVALID, "loras"),
    ([lora(BOTH), lora(BOTH, 0.5)], INVALID, "loras[1].name"),
    ([lora(BOTH), lora(f"{BOTH}@prod")], INVALID, "loras[1].name"),
    ([lora("nobody")], MISSING, "loras[0].name"),
    ([lora(BOTH), lora("sha256:" + "0" * 64)], MISSING, "loras[1].name"),
    ([lora("")], INVALID, "loras[0].name"),
    ([lora("../../etc")], INVALID, "loras[0].name"),
]


@pytest.mark.parametrize(("loras_", "code", "field"), BAD)
def test_wrong_requests_name_the_field(
    address: str, loras: dict[str, LoraManifest], loras_: list[lora_pb2.Lora], code: Any, field: str
) -> None:
    found = refusal(address, "Generate", message(loras=loras_))
    assert (found.code, found.fields) == (code, (field,))


def put(settings: ServingSettings, name: str, path: Path, **changes: Any) -> LoraManifest:
    """Into the store without the checks of `publish`."""
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    made = LoraManifest.model_validate(
        {"name": name, "model": "tiny", "rank": 2, "networks": {"unet": 1}, "file": entry, **changes}
    )
    store = open_store(settings, "models")
    published.put(made, path, store)
    published.promote(name, "prod", made.digest, store)
    return made


def test_what_does_not_fit_is_refused_and_harms_nobody(
    client: Client, control_bundle: Path, settings: ServingSettings, pipeline: OneStepPipeline, tmp_path: Path
) -> None:
    state = load_file(tiny_lora(control_bundle, tmp_path / "made", 31) / FILE)
    save_file(
        {name: torch.cat([value, value], 1) if "lora_A" in name else value for name, value in state.items()},
        tmp_path / "wide.safetensors",
    )
    put(settings, "wide", tmp_path / "wide.safetensors")
    (tmp_path / "pickle").write_bytes(b"\x80\x04]\x94.")
    put(settings, "pickle", tmp_path / "pickle")
    (tmp_path / "large.safetensors").write_bytes(bytes(100_001))
    put(settings, "large", tmp_path / "large.safetensors")
    for name, words in {
        "wide": "more do not fit",
        "pickle": "a LoRA that diffusers reads",
        "large": "at most 100000 bytes",
    }.items():
        for _ in range(2):  # a failure is not kept
            with pytest.raises(InvalidRequest, match=words) as error:
                client.generate(PROMPT, loras=[Lora(BOTH), Lora(name)])
            assert error.value.field == "loras[1].name" and "loras[1].name" in str(error.value)
    served = client.generate(PROMPT, seed=5, format="raw", loras=[Lora(BOTH)])
    assert served.images[0].data == here(pipeline, [Lora(BOTH)]).astype(np.uint8).tobytes()
    with pytest.raises(InvalidRequest, match="more do not fit"):
        publish(tmp_path / "wide.safetensors", "wide", str(control_bundle), settings)


def test_a_file_that_was_changed_is_data_loss(
    address: str, control_bundle: Path, settings: ServingSettings, tmp_path: Path
) -> None:
    made = publish(tiny_lora(control_bundle, tmp_path / "made", 32), "damaged", str(control_bundle), settings)
    store = open_store(settings, "models")
    key = f"{published.LORAS}{made.digest.removeprefix('sha256:')}/{FILE}"
    store.put_bytes(key, store.get_bytes(key)[:-1] + b"x")
    found = refusal(address, "Generate", message(loras=[lora("damaged")]))
    assert found.code.name == "DATA_LOSS" and "not the file that was published" in found.message


def test_without_the_store_loras_are_unavailable_and_all_else_goes_on(control_bundle: Path, tmp_path: Path) -> None:
    away: dict[str, Any] = {
        "store_url": "s3://nowhere",
        "s3_endpoint": f"127.0.0.1:{free_port()}",
        "s3_access_key": "a",
        "s3_secret_key": "b",
    }
    with serving(control_bundle, cache_dir=str(tmp_path), **away) as address, Client(address) as client:
        with pytest.raises(Unavailable, match="does not answer"):
            client.generate(PROMPT, loras=[Lora(BOTH)])
        with pytest.raises(Unavailable):
            client.list_loras()
        assert client.generate(PROMPT).images
