"""Sessions of frames over a chain whose steps end when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sdxs.errors import DeadlineExceeded, InvalidRequest, Overloaded, SdxsError, Unavailable
from sdxs.v1 import decoder_pb2, stream_pb2
from services.fabric.deadline import Deadline
from services.fabric.models import ServedModel
from services.gateway.chain import Latents
from services.gateway.checks import Order
from services.gateway.outbox import MAX_UNSENT
from services.gateway.stream import Sessions
from services.settings import ServingSettings
from tests.streams import CLOSED, DEADLINE, GOODBYE, OVERTAKEN, Caller, change, frame, opening, settle, until
from tests.tables import table_of

MODEL = ServedModel("tiny", "sha256:0", 32, 32, 16, {"lines": ("edge",)})


class Steps:
    """Text encoder and U-Net, and the decoder: each call waits until it is let go, or until its deadline."""

    def __init__(self) -> None:
        self.unet: list[tuple[Order, asyncio.Future[None]]] = []
        self.decoder: list[tuple[Order, asyncio.Future[None]]] = []
        self.drawn: list[Order] = []

    async def denoise(self, order: Order, deadline: Deadline) -> Latents:
        self.drawn.append(order)
        await self._held(self.unet, order, deadline)
        return Latents(b"latent")

    async def decode(
        self, order: Order, latents: Latents, receipts: Sequence[str], deadline: Deadline
    ) -> decoder_pb2.DecodeResponse:
        assert latents.encoded == b"latent" and len(receipts) == 1
        await self._held(self.decoder, order, deadline)
        image = decoder_pb2.Image(data=f"{order.prompt} {order.seeds[0]}".encode())
        return decoder_pb2.DecodeResponse(images=[image], batch=1, unet_batch=1)

    async def _held(self, where: list[Any], order: Order, deadline: Deadline) -> None:
        entry = order, asyncio.get_running_loop().create_future()
        where.append(entry)
        try:
            async with asyncio.timeout(deadline.remaining()):
                await entry[1]
        except TimeoutError:
            raise DeadlineExceeded("too late") from None
        finally:
            where.remove(entry)

    async def let_go(self, where: list[Any], index: int = 0, error: Exception | None = None) -> None:
        """One of those that wait there."""
        if where:
            done = where[index][1]
            done.set_exception(error) if error else done.set_result(None)
        await settle()

    async def draw(self) -> None:
        """All there is to draw."""
        while self.unet or self.decoder:
            await self.let_go(self.unet)
            await self.let_go(self.decoder)


def sessions_of(steps: Steps, **values: Any) -> Sessions:
    settings = ServingSettings(**{"redis_url": "", **values})
    return Sessions(table_of(MODEL, steps, settings.max_image_bytes), settings)


@contextlib.asynccontextmanager
async def calling(sessions: Sessions, **fields: Any) -> AsyncIterator[Caller]:
    caller = Caller(sessions)
    await caller.say(opening(**fields))
    try:
        yield caller
    finally:
        await caller.hang_up()


async def test_the_newest_frame_is_next_and_those_it_overtook_are_told() -> None:
    steps = Steps()
    async with calling(sessions_of(steps)) as caller:
        await caller.say(*(frame(i, seed=i) for i in (1, 2, 3, 5)))
        assert caller.answers == [("dropped", 2, OVERTAKEN), ("dropped", 3, OVERTAKEN)]
        await steps.draw()
        assert caller.answers[2:] == [("image", 1), ("image", 5)]
        assert [order.seeds for order in steps.drawn] == [(1,), (5,)]


async def test_the_next_frame_enters_the_unet_while_the_last_is_decoded() -> None:
    steps = Steps()
    async with calling(sessions_of(steps)) as caller:
        await caller.say(frame(1), frame(2))
        assert (len(steps.unet), len(steps.decoder)) == (1, 0)
        await steps.let_go(steps.unet)
        assert (len(steps.unet), len(steps.decoder)) == (1, 1)
        await caller.say(frame(3))
        await steps.let_go(steps.unet)
        assert (len(steps.unet), len(steps.decoder)) == (0, 2), "stream_in_flight is 2"


async def test_an_older_image_never_follows_a_newer_one() -> None:
    steps = Steps()
    async with calling(sessions_of(steps)) as caller:
        await caller.say(frame(1), frame(2))
        await steps.let_go(steps.unet)
        await steps.let_go(steps.unet)
        await steps.let_go(steps.decoder, index=1)
        assert caller.answers == [("dropped", 1, OVERTAKEN), ("image", 2)]
        assert not steps.decoder, "what will not be sent is not decoded either"


async def test_what_frames_say_holds_for_them_and_settings_for_all_after() -> None:
    steps = Steps()
    async with calling(sessions_of(steps)) as caller:
        for request in (frame(1), frame(2, prompt="pear", seed=1), change(prompt="plum"), frame(3), change(seed=9), frame(4)):
            await caller.say(request)
            await steps.draw()
        images = [one.image for one in caller.heard if one.HasField("image")]
        assert [image.image.data for image in images] == [b"red apple 7", b"pear 1", b"plum 7", b"plum 9"]
        assert [image.seed for image in images] == [7, 1, 7, 9]
        assert caller.states == [("ACTIVE", 0)] * 3, "with a new token for each change"


async def test_a_seed_nobody_chose_is_drawn_once_for_the_session() -> None:
    steps = Steps()
    sessions = sessions_of(steps)
    caller = Caller(sessions)
    await caller.say(stream_pb2.StreamRequest(open=stream_pb2.StreamOpen()))
    for i in (1, 2):
        await caller.say(frame(i, prompt="pear"))
        await steps.draw()
    resumed = Caller(sessions)
    await resumed.say(opening(resume_token=caller.token), frame(3, prompt="pear"))
    await steps.draw()
    assert len({order.seeds for order in steps.drawn}) == 1 and len(steps.drawn) == 3
    await caller.hang_up()
    await resumed.hang_up()


async def test_frames_that_cannot_be_drawn_are_told_and_the_session_goes_on() -> None:
    steps = Steps()
    async with calling(sessions_of(steps, max_image_bytes=100)) as caller:
        await caller.say(
            frame(1, prompt=" "), frame(2, seed=-1), frame(3, strength=0.5), frame(4, init_image=b"x" * 101), change(seed=-1),
            change(strength=2, init_image=b"x"), frame(5),
        )  # fmt: skip
        assert caller.answers == [
            ("error", 1, "INVALID_ARGUMENT", "frame.prompt"), ("error", 2, "INVALID_ARGUMENT", "frame.seed"),
            ("error", 3, "INVALID_ARGUMENT", "frame.strength"), ("error", 4, "INVALID_ARGUMENT", "frame.init_image"),
            ("error", 0, "INVALID_ARGUMENT", "settings.seed"), ("error", 0, "INVALID_ARGUMENT", "settings.strength"),
        ]  # fmt: skip
        await steps.let_go(steps.unet, error=InvalidRequest("prompt", "red apple", "short"))
        await caller.say(frame(6))
        await steps.let_go(steps.unet, error=Unavailable("nobody there"))
        await caller.say(frame(7))
        await steps.let_go(steps.unet, error=ZeroDivisionError("secret"))
        assert caller.answers[6:] == [
            ("error", 5, "INVALID_ARGUMENT", "settings.prompt"), ("error", 6, "UNAVAILABLE", ""), ("error", 7, "INTERNAL", ""),
        ]  # fmt: skip
        assert "secret" not in str(caller.heard)
        await caller.say(frame(8))
        await steps.draw()
        assert caller.answers[9:] == [("image", 8)]


async def test_a_deadline_before_the_unet_and_at_it() -> None:
    steps = Steps()
    async with calling(sessions_of(steps)) as caller:
        await caller.say(frame(1, timeout=1), frame(2), frame(3, timeout=0))
        await until(lambda: len(caller.answers) == 2)
        assert caller.answers == [("dropped", 2, OVERTAKEN), ("dropped", 3, DEADLINE)], "told before its turn"
        await until(lambda: len(caller.answers) == 3)
        assert caller.answers[2:] == [("dropped", 1, DEADLINE)]
        assert len(steps.drawn) == 1
        await caller.say(frame(4, timeout=10))
        await steps.draw()
        assert caller.answers[3:] == [("image", 4)]


async def test_the_servers_default_deadline_holds_too() -> None:
    steps = Steps()
    async with calling(sessions_of(steps, default_deadline_s=0.02)) as caller:
        await caller.say(frame(1, timeout=1000), frame(2))
        await until(lambda: len(caller.answers) == 2)
        assert sorted(caller.answers) == [("dropped", 1, DEADLINE), ("dropped", 2, DEADLINE)]


async def test_for_a_client_that_does_not_read_nothing_more_is_drawn_or_kept() -> None:
    steps = Steps()
    sessions = sessions_of(steps)
    async with calling(sessions) as caller:
        caller.reads.clear()
        for i in range(1, 3 * MAX_UNSENT):
            await caller.say(frame(i))
            await steps.draw()
            assert sessions.held <= 3
        assert len(steps.drawn) == 2, "two images wait to be sent"
        assert caller.unread >= MAX_UNSENT, "nothing more is read from it"
        caller.reads.set()
        for _ in range(100):
            await settle()
            await steps.draw()
        assert sorted(answer[1] for answer in caller.answers) == list(range(1, 3 * MAX_UNSENT))
        assert caller.answers[-1] == ("image", 3 * MAX_UNSENT - 1)


async def test_a_client_that_never_reads_is_dropped() -> None:
    steps = Steps()
    sessions = sessions_of(steps, stream_idle_s=0.1)
    async with calling(sessions) as caller:
        caller.reads.clear()
        await caller.say(frame(1), GOODBYE)
        await steps.draw()
        with pytest.raises(Unavailable, match="read nothing"):
            await asyncio.wait_for(caller.call, 5)
    assert sessions.active == 0


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([frame(1)], "open"),
        ([change(seed=1)], "open"),
        ([stream_pb2.StreamRequest()], "open"),
        ([opening(), opening()], "open"),
        ([opening(), stream_pb2.StreamRequest()], "kind"),
        ([opening(), frame(0)], "frame.id"),
        ([opening(), frame(2), frame(2)], "frame.id"),
        ([opening(), frame(2), frame(1)], "frame.id"),
        ([opening(seed=-1)], "open.settings.seed"),
        ([opening(prompt=" ")], "open.settings.prompt"),
        ([opening(model="other")], "open.model"),
        ([opening(resume_token="forged")], "open.resume_token"),
    ],
)
async def test_what_makes_no_sense_ends_the_session(requests: list[stream_pb2.StreamRequest], field: str) -> None:
    steps = Steps()
    sessions = sessions_of(steps)
    caller = Caller(sessions)
    await caller.say(*requests)
    with pytest.raises(SdxsError) as caught:
        await asyncio.wait_for(caller.call, 5)
    assert caught.value.field == field
    assert caught.value.code == ("NOT_FOUND" if field == "open.model" else "INVALID_ARGUMENT")
    await settle()
    assert (sessions.active, len(steps.unet)) == (0, 0)


async def test_a_goodbye_waits_for_what_was_asked() -> None:
    steps = Steps()
    async with calling(sessions_of(steps)) as caller:
        await caller.say(frame(1), frame(2), GOODBYE)
        assert not caller.call.done()
        await steps.draw()
        await asyncio.wait_for(caller.call, 5)
        assert caller.answers == [("image", 1), ("image", 2)]
        assert caller.states == [("ACTIVE", 0), ("CLOSED", stream_pb2.CLOSED_REASON_CLIENT)]
        assert caller.heard[-1].state.last_answered == 2


async def test_a_client_that_leaves_takes_its_work_along() -> None:
    steps = Steps()
    sessions = sessions_of(steps)
    async with calling(sessions) as caller:
        await caller.say(frame(1), frame(2))
        await steps.let_go(steps.unet)
        assert steps.unet and steps.decoder
    await settle()
    assert (steps.unet, steps.decoder, sessions.active, sessions.held) == ([], [], 0, 0)
    assert len(steps.drawn) == 2, "nothing was begun after it had left"


async def test_sessions_wait_in_line_and_are_told_where() -> None:
    steps = Steps()
    sessions = sessions_of(steps, stream_max_sessions=1, stream_max_queued=2)
    async with calling(sessions) as first, calling(sessions) as second, calling(sessions) as third:
        assert [each.states for each in (first, second, third)] == [[("ACTIVE", 0)], [("QUEUED", 1)], [("QUEUED", 2)]]
        with pytest.raises(Overloaded):
            await asyncio.wait_for(Caller(sessions).call, 5)
        await third.say(frame(1, seed=1), frame(2, seed=2))
        assert third.answers == [("dropped", 1, OVERTAKEN)] and not steps.drawn
        await second.hang_up()
        assert third.states[1:] == [("QUEUED", 1)]
        await first.hang_up()
        assert third.states[2:] == [("ACTIVE", 0)]
        await steps.draw()
        assert third.answers[1:] == [("image", 2)], "the frame that waited with it"
        async with calling(sessions) as fourth:
            assert fourth.states == [("QUEUED", 1)]
    assert (sessions.active, sessions.queued, sessions.counts.refused) == (0, 0, 1)


async def test_draining_answers_what_is_computing_and_drops_the_rest() -> None:
    steps = Steps()
    sessions = sessions_of(steps, stream_max_sessions=1)
    async with calling(sessions) as caller, calling(sessions) as waiting:
        await caller.say(frame(1), frame(2))
        await waiting.say(frame(1))
        draining = asyncio.create_task(sessions.drain(5))
        await settle()
        await caller.say(frame(3))
        assert caller.answers == [("dropped", 2, CLOSED), ("dropped", 3, CLOSED)]
        with pytest.raises(Unavailable):
            await asyncio.wait_for(Caller(sessions).call, 5)
        await steps.draw()
        await asyncio.wait_for(draining, 2)
        await asyncio.gather(caller.call, waiting.call)
        drained = ("CLOSED", stream_pb2.CLOSED_REASON_DRAINED)
        assert caller.answers[2:] == [("image", 1)]
        assert caller.states == [("ACTIVE", 0), ("DRAINING", 0), drained]
        assert waiting.answers == [("dropped", 1, CLOSED)]
        assert waiting.states[-2:] == [("DRAINING", 0), drained]


async def test_draining_does_not_wait_for_ever() -> None:
    steps = Steps()
    sessions = sessions_of(steps)
    async with calling(sessions) as caller:
        await caller.say(frame(1), frame(2))
        await asyncio.wait_for(sessions.drain(0.2), 2)
        await asyncio.wait_for(caller.call, 2)
        assert caller.answers == [("dropped", 2, CLOSED), ("dropped", 1, CLOSED)]
        assert not steps.unet


async def test_silence_ends_a_session() -> None:
    steps = Steps()
    async with calling(sessions_of(steps, stream_idle_s=0.2)) as caller:
        await caller.say(frame(1))
        await asyncio.sleep(0.4)
        assert not caller.call.done(), "not while something is drawn"
        await steps.draw()
        await asyncio.wait_for(caller.call, 2)
        assert caller.states[-1] == ("CLOSED", stream_pb2.CLOSED_REASON_IDLE)


async def test_no_opening_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.stream._OPEN_WITHIN_S", 0.05)
    sessions = sessions_of(Steps())
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(Caller(sessions).call, 2)


async def test_a_token_brings_back_all_but_images_on_any_gateway_with_the_secret() -> None:
    steps = Steps()
    async with calling(sessions_of(steps, stream_secret="ours"), model="tiny") as caller:
        await caller.say(change(prompt="plum", format=2, init_image=b"an image", strength=0.5), frame(5))
        await steps.draw()
        await caller.say(GOODBYE)
        token = caller.token
    async with calling(sessions_of(steps, stream_secret="ours"), resume_token=token, seed=3) as resumed:
        await resumed.say(frame(6))
        await steps.draw()
        before, after = steps.drawn
        assert (before.prompt, before.seeds, before.init_image, before.strength) == ("plum", (7,), b"an image", 0.5)
        assert (after.prompt, after.seeds, after.format, after.init_image) == ("plum", (3,), 2, b"")
        await resumed.say(frame(5))
        with pytest.raises(InvalidRequest, match=r"frame\.id"):
            await asyncio.wait_for(resumed.call, 2)


@pytest.mark.parametrize("case", ["another secret", "too old", "changed", "cut"])
async def test_a_token_that_is_not_ours_or_too_old(case: str) -> None:
    async with calling(sessions_of(Steps(), stream_secret="ours")) as caller:
        token = caller.token
    values: dict[str, Any] = {"stream_secret": "ours"}
    if case == "another secret":
        values = {}
    elif case == "too old":
        values["stream_token_s"] = 1e-6
    elif case == "changed":
        token = token[:60] + ("A" if token[60] != "A" else "B") + token[61:]
    else:
        token = token[:20]
    caller = Caller(sessions_of(Steps(), **values))
    await caller.say(opening(resume_token=token))
    with pytest.raises(InvalidRequest) as caught:
        await asyncio.wait_for(caller.call, 2)
    assert caught.value.field == "open.resume_token"


ACTIONS = st.sampled_from(
    ["frame", "frame", "frame", "late", "bad", "settings", "unet", "unet", "decoder", "last decoder", "fail", "block", "read"]
)


@hypothesis_settings(max_examples=150)
@given(actions=st.lists(ACTIONS, max_size=60), in_flight=st.integers(1, 3))
def test_whatever_comes_every_frame_is_answered_once_and_in_order(actions: list[str], in_flight: int) -> None:
    asyncio.run(_check(actions, in_flight))


async def _check(actions: list[str], in_flight: int) -> None:
    """Any order of frames, settings, steps that end well or not, and a reader that stops and goes on."""
    steps = Steps()
    sessions = sessions_of(steps, stream_in_flight=in_flight)
    async with calling(sessions) as caller:
        sent, prompt, wanted, failures = 0, "red apple", {}, 0
        for action in actions:
            if action in ("frame", "late", "bad"):
                sent += 1
                wanted[sent] = (action, prompt)
                options = {"frame": {}, "late": {"timeout": 0}, "bad": {"strength": 3.0}}[action]
                await caller.say(frame(sent, **options))  # type: ignore[arg-type]
            elif action == "settings":
                prompt = f"plum {sent}"
                await caller.say(change(prompt=prompt))
            elif action == "fail":
                failures += bool(steps.unet)
                await steps.let_go(steps.unet, error=Unavailable("gone"))
            elif action in ("block", "read"):
                caller.reads.clear() if action == "block" else caller.reads.set()
                await settle()
            else:
                await steps.let_go(steps.unet if action == "unet" else steps.decoder, -1 if "last" in action else 0)
            assert len(steps.unet) <= 1 and len(steps.unet) + len(steps.decoder) <= in_flight
            assert sessions.held <= in_flight + 1
        caller.reads.set()
        await caller.say(GOODBYE)
        for _ in range(4):
            await settle()
            await steps.draw()
        await asyncio.wait_for(caller.call, 5)
        answers = caller.answers
        assert sorted(answer[1] for answer in answers) == list(range(1, sent + 1))
        images = [one.image for one in caller.heard if one.HasField("image")]
        assert [image.frame_id for image in images] == sorted(image.frame_id for image in images)
        for image in images:
            assert image.image.data == f"{wanted[image.frame_id][1]} 7".encode()
        errors = [answer for answer in answers if answer[0] == "error"]
        assert len(errors) == failures + sum(action == "bad" for action, _ in wanted.values())
        newest = max((i for i, (action, _) in wanted.items() if action != "bad"), default=0)
        if newest and wanted[newest][0] == "frame":
            assert ("image", newest) in answers or ("error", newest, "UNAVAILABLE", "") in answers
        assert sessions.counts.answered.total() == sessions.counts.frames == sent


async def test_what_became_of_frames_is_published_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    from services.gateway.cache import ByteCache
    from services.gateway.metrics import GatewayMetrics

    told: list[tuple[str, float, str]] = []

    def count(counter: metrics.Counter, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        told.append((counter.info["name"], value, (tags or {}).get("outcome", "")))

    monkeypatch.setattr(metrics.Counter, "inc", count)
    steps = Steps()
    sessions = sessions_of(steps)
    cache = ByteCache(100)
    published = GatewayMetrics(sessions, cache)
    async with calling(sessions) as caller:
        await caller.say(frame(1), frame(2), frame(3), frame(4, prompt=" "))
        await steps.draw()
        published.tell()
        assert sorted(told) == [
            ("sdxs_stream_answers", 1, "error"), ("sdxs_stream_answers", 1, "overtaken"), ("sdxs_stream_answers", 2, "image"),
            ("sdxs_stream_frames", 4, ""), ("sdxs_stream_sessions", 1, ""),
        ]  # fmt: skip
        told.clear()
        published.tell()
        assert told == []
        await caller.say(frame(5))
        assert cache.get(("sha256:0", "red apple")) is None
        cache.put(("sha256:0", "red apple"), b"embedding")
        assert [cache.get(("sha256:0", prompt)) for prompt in ("red apple", "red apple", "pear")] == [
            b"embedding",
            b"embedding",
            None,
        ]
        published.tell()
        assert told == [("sdxs_stream_frames", 1, ""), ("sdxs_prompt_cache", 2, "hit"), ("sdxs_prompt_cache", 2, "miss")]
