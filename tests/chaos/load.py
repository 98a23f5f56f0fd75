"""Callers of all kinds that never stop, and the judgement of everything they are told."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image

from sdxs import registry
from sdxs.client import AsyncClient, Generated
from sdxs.control import Control
from sdxs.errors import SdxsError
from sdxs.pipeline import OneStepPipeline
from sdxs.store import open_store
from sdxs.streaming import Drawn, Dropped, Failed
from sdxs.v1 import gateway_pb2
from services.settings import ServingSettings

PROPER = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
PROMPTS = ("red apple", "crescent moon", "cat face", "house", "umbrella", "green apple")
SEEDS = range(4)
DEADLINES_S = (3.0, 20.0)
LATE_S = 1.0
"""So much after its deadline a caller must have been answered: this process is busy too."""
SKETCH = Path(__file__).parents[2] / "examples" / "sketches" / "moon.png"
TOLERANCE = 1
"""Of 255: images of one batch and images alone differ by as much."""


@dataclass(frozen=True)
class Wish:
    """One image."""

    prompt: str
    seed: int
    steered: bool = False

    @property
    def controls(self) -> list[Control]:
        """What steers it."""
        return [Control(SKETCH.read_bytes(), "sketch")] if self.steered else []


class Judge:
    """Knows what each image is, from the same bundle in this process."""

    def __init__(self) -> None:
        folder, _ = registry.open_model("emoji", ServingSettings())
        self._pipeline = OneStepPipeline.from_bundle(folder)
        self.draw = lru_cache(4096)(self._draw)

    def _draw(self, wish: Wish) -> np.ndarray:
        return np.asarray(self._pipeline(wish.prompt, seed=wish.seed, controls=wish.controls)[0]).astype(np.int16)

    def knows(self) -> None:
        """Draw all there will be, before the load begins."""
        for prompt, seed, steered in itertools.product(PROMPTS, range(SEEDS.stop + 1), (False, True)):
            self.draw(Wish(prompt, seed, steered))

    def agrees(self, wish: Wish, image: PIL.Image.Image) -> bool:
        """Whether it is that image."""
        expected = self.draw(wish)
        found = np.asarray(image.convert("RGB")).astype(np.int16)
        return found.shape == expected.shape and int(np.abs(found - expected).max()) <= TOLERANCE


@dataclass
class Submitted:
    """A job that was accepted."""

    job_id: str
    request_id: str
    wishes: Sequence[Wish]
    at: float
    ended: float = 0.0
    state: str = ""


@dataclass
class Seen:
    """All that callers saw while one fault was there."""

    images: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Proper ones, by code."""
    frames: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    jobs: list[Submitted] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """Tries to hand a job in that failed, by code."""
    wrong: list[str] = field(default_factory=list)
    """What must not be: another's image, an improper error, one that comes late, one request that became two jobs."""
    calls: list[tuple[float, float, bool]] = field(default_factory=list)
    """When interactive calls began and ended, and whether they gave an image."""

    said: Counter[str] = field(default_factory=Counter)
    """The errors' words."""

    @property
    def requests(self) -> int:
        """Of interactive callers."""
        return self.images + self.errors.total()

    def fail(self, what: str, error: SdxsError) -> None:
        """An interactive caller was given this error."""
        self.errors[error.code] += 1
        self.said[f"{what}: {error.code}: {error}"] += 1
        if error.code not in PROPER:
            self.wrong.append(f"{what}: {error.code}: {error}")


class Load:
    """Callers of one server. `seen` is that of the present phase: `phase` begins another."""

    def __init__(self, address: str, judge: Judge, seed: int) -> None:
        self._address = address
        self._judge = judge
        self._random = random.Random(seed)
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.seen = Seen()

    def start(self, callers: int = 4, streams: int = 1, submitters: int = 2) -> None:
        """Begin."""
        parts = [self._call] * callers + [self._stream] * streams + [self._submit] * submitters
        self._tasks = [asyncio.create_task(part()) for part in parts]

    def phase(self) -> Seen:
        """A new one."""
        self.seen = Seen()
        return self.seen

    async def stop(self) -> None:
        """End well. Raises what a caller did not expect."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    def _wish(self, old: float = 0.8) -> Wish:
        """Mostly of a prompt that was asked for before, which the gateway has the embedding of."""
        new = "" if self._random.random() < old else f" {self._random.randrange(10**6)}"
        return Wish(self._random.choice(PROMPTS) + new, self._random.choice(SEEDS), self._random.random() < 0.3)

    async def _call(self) -> None:
        """Unary calls, one after the other."""
        async with AsyncClient(self._address) as client:
            while not self._stopping.is_set():
                await self._generate(client, self._wish(), self._random.choice((1, 1, 2)), self._random.choice(DEADLINES_S))
                await asyncio.sleep(0.1)

    async def _generate(self, client: AsyncClient, wish: Wish, count: int, limit: float) -> None:
        """One call, judged: what it gives, or its error, and when."""
        began = time.monotonic()
        try:
            made: Generated = await client.generate(
                wish.prompt, timeout=limit, seed=wish.seed, n=count, format="raw", controls=wish.controls
            )
        except SdxsError as error:
            seen = self.seen  # now: what was on its way when a fault came is that fault's
            seen.fail("call", error)
            seen.calls.append((began, time.monotonic(), False))
        else:
            seen = self.seen
            seen.images += 1
            seen.calls.append((began, time.monotonic(), True))
            wishes = [Wish(wish.prompt, wish.seed + i, wish.steered) for i in range(count)]
            if len(made.images) != count:
                seen.wrong.append(f"{len(made.images)} images, {count} were asked for")
            for each, image in zip(wishes, made.images, strict=False):
                if not self._judge.agrees(each, image.pil()):
                    seen.wrong.append(f"another image than that of {each}")
        if time.monotonic() - began > limit + LATE_S:
            seen.wrong.append(f"answered after {time.monotonic() - began:.1f} s, the deadline was {limit:g} s")

    async def _stream(self) -> None:
        """Frames, a new one at each answer, on streams that go on by themselves."""
        async with AsyncClient(self._address) as client:
            while not self._stopping.is_set():
                try:
                    await self._frames(client)
                except SdxsError as error:  # its patience is over
                    self.seen.fail("stream", error)
                    await asyncio.sleep(1)

    async def _frames(self, client: AsyncClient) -> None:
        sent: dict[int, Wish] = {}

        async def send() -> None:
            wish = Wish(
                self._random.choice(PROMPTS), self._random.choice(SEEDS)
            )  # what steers and what is new has unary callers
            sent[await stream.send(prompt=wish.prompt, seed=wish.seed)] = wish

        async with client.stream(format="raw") as stream:
            await send()
            async for event in stream:
                seen = self.seen
                if isinstance(event, Drawn):
                    seen.frames += 1
                    if not self._judge.agrees(sent[event.frame_id], event.image.pil()):
                        seen.wrong.append(f"frame {event.frame_id} is another image than that of {sent[event.frame_id]}")
                elif isinstance(event, Dropped):
                    seen.dropped[event.reason] += 1
                elif isinstance(event, Failed):
                    seen.fail("frame", event.error)
                if isinstance(event, Drawn | Dropped | Failed):
                    if self._stopping.is_set():
                        return
                    await asyncio.sleep(0.1)
                    await send()

    async def _submit(self) -> None:
        """Jobs, single and in batches, each handed in until it is accepted, some twice."""
        async with AsyncClient(self._address) as client:
            while not self._stopping.is_set():
                request_id = uuid.uuid4().hex
                wishes = [self._wish()]
                if self._random.random() < 0.3:
                    wishes = [Wish(prompt, wishes[0].seed, wishes[0].steered) for prompt in self._random.sample(PROMPTS, 3)]
                job_id = await self._hand_in(client, request_id, wishes)
                if self._random.random() < 0.3:
                    again = await self._hand_in(client, request_id, wishes)
                    if again != job_id:
                        self.seen.wrong.append(f"request {request_id} became the jobs {job_id} and {again}")
                self.seen.jobs.append(Submitted(job_id, request_id, wishes, time.monotonic()))
                await asyncio.sleep(0.4)

    async def _hand_in(self, client: AsyncClient, request_id: str, wishes: Sequence[Wish]) -> str:
        """Its id, however many tries that takes."""
        while True:
            began = time.monotonic()
            try:
                if len(wishes) == 1:
                    return await client.submit_job(
                        wishes[0].prompt,
                        5.0,
                        request_id=request_id,
                        seed=wishes[0].seed,
                        format="png",
                        controls=wishes[0].controls,
                    )
                prompts = [wish.prompt for wish in wishes]
                return await client.submit_batch(
                    prompts, 5.0, request_id=request_id, seed=wishes[0].seed, format="png", controls=wishes[0].controls
                )
            except SdxsError as error:
                self.seen.refused[error.code] += 1
                if error.code not in PROPER:
                    self.seen.wrong.append(f"handing in a job: {error.code}: {error}")
                if time.monotonic() - began > 5.0 + LATE_S:
                    self.seen.wrong.append(f"handing in a job took {time.monotonic() - began:.1f} s, the deadline was 5 s")
            await asyncio.sleep(0.3)


async def wait_ended(address: str, jobs: Sequence[Submitted], seconds: float) -> list[Submitted]:
    """Look at the jobs until all have ended; those that have not in time."""
    ends = time.monotonic() + seconds
    async with AsyncClient(address) as client:
        while left := [job for job in jobs if not job.ended]:
            for job in left:
                with contextlib.suppress(SdxsError):
                    found = await client.get_job(job.job_id, timeout=3)
                    job.state = gateway_pb2.JobState.Name(found.state).removeprefix("JOB_STATE_")
                    if job.state in ("SUCCEEDED", "FAILED", "CANCELLED"):
                        job.ended = time.monotonic()
            if time.monotonic() > ends:
                break
            await asyncio.sleep(0.2)
    return left


@dataclass
class Account:
    """Jobs against the store."""

    lost: list[str] = field(default_factory=list)
    """Accepted, and not ended well with all of its images."""
    duplicates: list[str] = field(default_factory=list)
    """Made twice: objects that no job tells of, or one request with two jobs."""
    wrong: list[str] = field(default_factory=list)


async def account(address: str, jobs: Sequence[Submitted], judge: Judge, settings: ServingSettings) -> Account:
    """Each accepted job has succeeded once, with exactly its images in the store, and these are the right ones."""
    found, told = Account(), set[str]()
    store = open_store(settings, "artifacts")
    async with AsyncClient(address) as client:
        for job in jobs:
            if job.state != "SUCCEEDED":
                found.lost.append(f"job {job.job_id} is {job.state or 'unknown'}")
                continue
            known = await client.get_job(job.job_id)
            images = [image for item in known.items for image in item.images] if known.items else list(known.images)
            if len(images) != len(job.wishes):
                found.lost.append(f"job {job.job_id} has {len(images)} images, {len(job.wishes)} were asked for")
            for wish, image in zip(job.wishes, images, strict=False):
                told.add(image.key)
                data = await asyncio.to_thread(store.get_bytes, image.key)
                if hashlib.sha256(data).hexdigest() != image.sha256:
                    found.wrong.append(f"{image.key} is not what job {job.job_id} says")
                if not judge.agrees(wish, PIL.Image.open(io.BytesIO(data))):
                    found.wrong.append(f"{image.key} is another image than that of {wish}")
        async for job_id in _all_jobs(client):
            if job_id not in {job.job_id for job in jobs}:
                found.duplicates.append(f"job {job_id} was handed in by nobody")
    stored = {entry.key for entry in await asyncio.to_thread(lambda: list(store.entries("results/")))}
    found.duplicates += [f"{key} is no job's" for key in sorted(stored - told)]
    return found


async def _all_jobs(client: AsyncClient) -> AsyncIterator[str]:
    """Ids of all that the server knows."""
    token = ""
    while True:
        page = await client.list_jobs(page_size=100, page_token=token)
        for job in page.jobs:
            yield job.job_id
        token = page.next_page_token
        if not token:
            return
