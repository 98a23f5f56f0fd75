"""Several models on Ray Serve: promoted and rolled back under load, broken, killed in the middle, asleep and awake."""

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sdxs import bundle, registry
from sdxs.client import Client
from sdxs.embedded import redis_server
from sdxs.errors import DeadlineExceeded, Unavailable
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store
from sdxs.streaming import Drawn, Failed
from sdxs.v1 import gateway_pb2
from tests.e2e.conftest import Served, serving
from tests.models import tiny_folder

pytestmark = pytest.mark.timeout(400)

PROMPT, SEED = "red apple", 7
SWITCH_S, STOP_S, IDLE_S = 120, 90, 4
ASLEEP = {stage: {"replicas": 0, "idle_s": IDLE_S} for stage in ("text_encoder", "unet", "decoder")}


@dataclass(frozen=True)
class World:
    """A server of two models, and the store with all their bundles."""

    served: Served
    store: ObjectStore
    digests: dict[str, str]
    pixels: dict[str, bytes] = field(repr=False)
    """Of PROMPT and SEED, drawn in this process, by digest."""

    def promote(self, bundle: str) -> None:
        registry.promote("tiny", self.digests[bundle], self.store)

    def rollback(self) -> None:
        registry.rollback("tiny", self.store)

    def stages(self, name: str) -> set[int]:
        """Processes of a bundle, or of all of a model's."""
        bundle = f"tiny-{self.digests[name].removeprefix('sha256:')[:12]}" if name in ("first", "second", "broken") else name
        return set().union(*(self.served.replicas(stage, f"sdxs-{bundle}-") for stage in ("text_encoder", "unet", "decoder")))


@pytest.fixture(scope="module")
def world(s3_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """`tiny`, of which there are three bundles, one of them broken, and `other`, which sleeps. Has a queue of its own: workers of
    another server would take its jobs."""
    folder = tmp_path_factory.mktemp("models")
    with redis_server(folder / "redis") as redis_variables:
        yield from _world(folder, {**redis_variables, **s3_variables})
    shutil.rmtree(folder)


def _world(folder: Path, variables: dict[str, str]) -> Iterator[World]:
    folders = {name: tiny_folder(folder / name, seed=seed) for seed, name in enumerate(("first", "second", "broken", "other"))}
    weights = folders["broken"] / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])  # whole by its manifest, and no network
    for name, place in folders.items():
        bundle.seal(place, "other" if name == "other" else "tiny")
    variables |= {
        "SDXS_STORE_URL": "s3://sdxs/several",
        "SDXS_CACHE_DIR": str(folder / "cache"),
    }
    store = open_store(Settings.model_validate({k.removeprefix("SDXS_").lower(): v for k, v in variables.items()}), "models")
    digests = {name: registry.publish(place, store).digest for name, place in folders.items()}
    registry.promote("tiny", digests["first"], store)
    registry.promote("other", digests["other"], store)
    drawn = {digests[name]: _draw(folders[name]) for name in ("first", "second", "other")}
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump({"models": ["tiny", {"model": "other", **ASLEEP}]}))
    with serving(None, folder / "log", variables, "--config", str(config)) as server:
        yield World(server, store, digests, drawn)


def _draw(folder: Path) -> bytes:
    return np.asarray(OneStepPipeline.from_bundle(folder)(PROMPT, seed=SEED)[0]).tobytes()


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with Client(world.served.address) as client:
        yield client


def ask(client: Client, model: str = "", timeout: float = 60) -> Any:
    return client.generate(PROMPT, seed=SEED, model=model, format="raw", deterministic=True, timeout=timeout)


def status(client: Client, name: str) -> gateway_pb2.Model:
    return next(model for model in client.list_models() if model.name == name)


def wait(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """How long it took to become true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


def wait_serving(world: World, client: Client, name: str) -> None:
    """`tiny` is that bundle, and the processes of all others are gone."""
    wait(lambda: status(client, "tiny").digest == world.digests[name], SWITCH_S, f"{name} does not take over")
    wait(lambda: world.stages("tiny") == world.stages(name), STOP_S, f"not only {name} runs")


@dataclass
class Traffic:
    """Callers that never stop: two by unary calls, one on a stream, one by jobs; what each was answered, in order."""

    world: World
    unary: list[tuple[str, bytes]] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    errors: list[object] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def call(self) -> None:
        with Client(self.world.served.address) as client:
            while not self.stopping.wait(0.02):
                made = ask(client)
                self.unary.append((made.receipt.model_digest, made.images[0].data))

    def stream(self) -> None:
        with (
            Client(self.world.served.address) as client,
            client.stream(prompt=PROMPT, seed=SEED, format="raw", deterministic=True) as stream,
        ):
            stream.send()
            for event in stream:
                if isinstance(event, Failed):
                    self.errors.append(event)
                if isinstance(event, Drawn):
                    self.frames.append(event.image.data)
                if isinstance(event, Drawn | Failed):
                    if self.stopping.wait(0.03):
                        return
                    stream.send()

    def submit(self) -> None:
        with Client(self.world.served.address) as client:
            while not self.stopping.wait(0.05):
                jobs = [client.submit_job(PROMPT, seed=SEED, format="raw", deterministic=True) for _ in range(3)]
                for job in [client.wait_job(each) for each in jobs]:
                    if job.state != gateway_pb2.JOB_STATE_SUCCEEDED:
                        self.errors.append(job)
                    self.jobs.append(job.receipt.model_digest)

    def run(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:
            self.errors.append(error)


@contextmanager
def traffic(world: World) -> Iterator[Traffic]:
    """For the length of the block, and not one error."""
    seen = Traffic(world)
    parts = [seen.call, seen.call, seen.stream, seen.submit]
    threads = [threading.Thread(target=seen.run, args=[part]) for part in parts]
    for thread in threads:
        thread.start()
    try:
        yield seen
        time.sleep(1)
    finally:
        seen.stopping.set()
        for thread in threads:
            thread.join()
    assert not seen.errors
    assert all(data == world.pixels[digest] for digest, data in seen.unary)


def in_turn(values: list[Any]) -> list[Any]:
    """The values without repetitions."""
    return [value for value, _ in itertools.groupby(values)]


def test_each_model_draws_its_own(world: World, client: Client) -> None:
    assert [model.name for model in client.list_models()] == ["tiny", "other"]
    for name, made in (("", "first"), ("tiny", "first"), ("other", "other")):
        drawn = ask(client, name)
        assert drawn.receipt.model_digest == world.digests[made]
        assert drawn.images[0].data == world.pixels[world.digests[made]]
    assert ask(client, world.digests["first"]).receipt.model == "tiny"
    assert not world.stages("tiny") & world.stages("other") and world.stages("tiny") and world.stages("other")


def test_promoted_and_rolled_back_under_load_without_an_error(world: World, client: Client) -> None:
    """Each answer is one bundle's from end to end, and no one gets the old one after the new."""
    first, second = world.digests["first"], world.digests["second"]
    with traffic(world) as seen:
        time.sleep(1)
        world.promote("second")
        wait_serving(world, client, "second")
        world.rollback()
        wait_serving(world, client, "first")
    assert in_turn(seen.frames) == [world.pixels[digest] for digest in (first, second, first)]
    assert in_turn(seen.jobs) == [first, second, first]
    assert {digest for digest, _ in seen.unary} == {first, second}
    assert len(seen.unary) > 100 and len(seen.frames) > 50


@pytest.mark.slow
def test_a_bundle_that_cannot_start_changes_nothing(world: World, client: Client) -> None:
    with traffic(world) as seen:
        world.promote("broken")
        wait(lambda: bool(status(client, "tiny").status.error), SWITCH_S, "nobody says that it is broken")
        said = status(client, "tiny")
        assert (said.digest, said.status.next_digest) == (world.digests["first"], world.digests["broken"])
        assert said.status.state == gateway_pb2.MODEL_STATE_SERVING
        world.rollback()
        wait(lambda: not status(client, "tiny").status.next_digest, 30, "it is still wanted")
        wait_serving(world, client, "first")
    assert {digest for digest, _ in seen.unary} == {world.digests["first"]} == set(seen.jobs)


@pytest.mark.slow
def test_a_killed_control_room_goes_on_with_the_switch(world: World, client: Client) -> None:
    with traffic(world) as seen:
        world.promote("second")
        wait(lambda: bool(world.stages("second")), 60, "nothing starts")
        [room] = world.served.replicas("models")
        os.kill(room, signal.SIGKILL)
        wait_serving(world, client, "second")
        assert world.served.replicas("models") - {room}
    assert in_turn(seen.jobs) == [world.digests["first"], world.digests["second"]]


@pytest.mark.slow
def test_a_killed_gateway_serves_what_stands_and_then_what_is_new(world: World, client: Client) -> None:
    world.rollback()
    wait(lambda: bool(world.stages("first")), 60, "nothing starts")
    [gateway] = world.served.replicas("gateway")
    os.kill(gateway, signal.SIGKILL)
    seen = list[str]()

    def answered() -> bool:
        try:
            seen.append(ask(client, timeout=5).receipt.model_digest)
        except (Unavailable, DeadlineExceeded):
            return False
        return seen[-1] == world.digests["first"]

    wait(answered, SWITCH_S, "the switch never ends")
    assert set(seen) <= {world.digests["first"], world.digests["second"]}
    wait_serving(world, client, "first")


@pytest.mark.slow
def test_an_idle_model_sleeps_and_wakes(world: World, client: Client, record_property: Any) -> None:
    """All of its stages go and come; nobody else notices, and callers with little time are told."""

    def asleep() -> bool:
        return status(client, "other").status.state == gateway_pb2.MODEL_STATE_ASLEEP and not world.stages("other")

    for _ in range(2):
        seconds = wait(asleep, 90, "it does not fall asleep")
        record_property("seconds_until_asleep", seconds)
        assert client.ready() and ask(client).receipt.model == "tiny"
        with pytest.raises(DeadlineExceeded):
            ask(client, "other", timeout=0.5)
        began = time.monotonic()
        assert ask(client, "other").images[0].data == world.pixels[world.digests["other"]]
        record_property("seconds_until_awake", time.monotonic() - began)
        assert client.ready() and len(world.stages("other")) == 3
    ends = time.monotonic() + 2 * IDLE_S + 20
    while time.monotonic() < ends:  # used now and then, it stays: also the text encoder, which nobody asks again
        before = world.stages("other")
        ask(client, "other", timeout=5)
        assert len(before) == 3
        time.sleep(1)
