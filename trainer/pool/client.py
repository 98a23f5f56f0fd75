"""The teacher pool: separate Ray actors, each with its own copy of the teacher, answering a training run's requests.

A worker keeps requests in flight, so that its own work hides the round trip. Each goes to the member with the fewest of this worker's;
members join what can share a forward (trainer.pool.batching). Bounded everywhere: a client's requests in flight, a member's queue.
A member that dies is restarted by Ray; what it had not answered goes to another at once. Requests are pure functions of their payload.
Importing this module loads no model library: Ray's own processes unpickle the client, and each would pay for it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from sdxs.errors import InvalidRequest, Overloaded, Unavailable
from trainer.pool.joining import payload_bytes, summary
from trainer.pool.member import load_teacher, members
from trainer.pool.reservation import Reservation
from trainer.specs import TeacherSpec

if TYPE_CHECKING:
    from trainer.teacher import Array, Pending, Request

SUSPECT = 2  # a request lost so often is watched: it may be the reason
REFUSED_S, REFUSED_LIMIT_S = 0.01, 1.0  # a refused request is sent again after so long, doubling, at most


@dataclass(frozen=True)
class Limits:
    """What keeps a pool bounded.

    Args:
        max_batch: images that a member joins into one forward; 1 joins nothing, and replies are then the same to the last bit in any run.
        max_queue: requests that may wait at a member.
        max_in_flight: requests of one client that may be unanswered; `submit` waits for a place.
        max_deaths: a request that members died of so often, while they computed nothing else, is given up.
    """

    max_batch: int = 64
    max_queue: int = 256
    max_in_flight: int = 8
    max_deaths: int = 2


@dataclass(eq=False)
class _Route:
    """A client's view of one member. `epoch` counts the deaths it has noticed."""

    member: Any
    up: bool = True
    gone: Exception | None = None
    epoch: int = 0
    calls: set[_Call] = field(default_factory=set)


@dataclass(eq=False)
class _Call:
    """A request under way, on one member after another."""

    client: PoolClient
    request: Request
    reply: Future[list[Array]] = field(default_factory=Future)
    losses: int = 0
    deaths: int = 0
    computed: bool = False
    refusals: int = 0
    route: _Route | None = None
    epoch: int = 0

    def result(self) -> list[Array]:
        start = time.perf_counter()
        try:
            return self.reply.result()
        finally:
            self.client.waited_seconds += time.perf_counter() - start


class PoolClient:
    """A worker's view of the pool. Pickled it is actor handles and limits only: what it had in flight stays with its process.

    Replies, deaths and refusals are handled in a thread of the client's own, as they come, so that a lost request does not wait for its
    worker to ask for it, and a reply from another node is on its way before it is asked for.
    """

    def __init__(self, members: list[Any], limits: Limits) -> None:
        self.members, self.limits = members, limits
        self.waited_seconds, self.requests, self.retries, self.bytes_sent, self.bytes_received = 0.0, 0, 0, 0, 0
        self._routes = [_Route(member) for member in members]
        self._next = random.randrange(len(members))  # clients that start together do not all begin with the same member
        self._lock = threading.Lock()
        self._places = threading.Semaphore(limits.max_in_flight)
        self._events = ThreadPoolExecutor(1, "teacher-replies")

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolClient, (self.members, self.limits)

    def whole(self) -> PoolClient:
        """A client of the same members for who asks them alone: two requests of each may be in flight, if that is more."""
        most = max(self.limits.max_in_flight, 2 * len(self.members))
        return PoolClient(self.members, replace(self.limits, max_in_flight=most))

    @property
    def outstanding(self) -> list[int]:
        """Unanswered requests of this client at each member."""
        with self._lock:
            return [len(route.calls) for route in self._routes]

    def submit(self, request: Request) -> Pending:
        """Send to the member with the fewest; waits while `max_in_flight` requests are unanswered.

        The reply's `result()` raises what the teacher raised, InvalidRequest for a request that keeps killing members, and
        Unavailable when the pool is no more.
        """
        start = time.perf_counter()
        self._places.acquire()
        self.waited_seconds += time.perf_counter() - start
        self.requests, self.bytes_sent = self.requests + 1, self.bytes_sent + payload_bytes(request)
        call = _Call(self, request)
        self._send(call)
        return call

    def statistics(self) -> dict[str, float]:
        """Requests, how many were sent again, seconds this process waited for them, and payload bytes both ways."""
        names = ("requests", "retries", "waited_seconds", "bytes_sent", "bytes_received")
        return {name: getattr(self, name) for name in names}

    def _send(self, call: _Call) -> None:
        try:
            with self._lock:
                route = call.route = self._choose()
                call.epoch, call.computed = route.epoch, False
                route.calls.add(call)
            suspect = self._watch(call, route) if call.losses >= SUSPECT else ""
            # Not retried by Ray, which would wait for this member's restart. What is sent during one waits for it.
            reference = route.member.answer.options(max_task_retries=0).remote(call.request, suspect)
            self._then(reference, lambda outcome: self._settle(call, outcome))
        except Exception as error:
            self._finish(call, error)

    def _watch(self, call: _Call, route: _Route) -> str:
        """Note when a suspect is being computed, so that no death is laid on what merely waited. Returns its name at the member."""

        def begun(outcome: Future[Any]) -> None:
            call.computed = call.route is route and outcome.exception() is None

        name = uuid4().hex
        self._then(route.member.begins.options(max_task_retries=0).remote(name), begun)
        return name

    def _choose(self) -> _Route:
        there = [route for route in self._routes if not route.gone]
        if not there:
            reason = self._routes[0].gone
            raise Unavailable(f"the teacher pool is no more: {str(reason).strip().splitlines()[-1]}") from reason
        self._next += 1
        turn = {id(route): (index - self._next) % len(self._routes) for index, route in enumerate(self._routes)}
        return min(there, key=lambda route: (not route.up, len(route.calls), turn[id(route)]))

    def _then(self, reference: Any, handle: Callable[[Future[Any]], None]) -> None:
        """Call `handle` in the client's thread when a reference is there: Ray's own threads must not be held up."""

        def arrived(outcome: Future[Any]) -> None:
            with suppress(RuntimeError):  # the interpreter is about to end
                self._events.submit(handle, outcome)

        reference.future().add_done_callback(arrived)

    def _settle(self, call: _Call, outcome: Future[list[Array]]) -> None:
        assert call.route is not None
        error = outcome.exception()
        if not isinstance(error, RayError):
            self._finish(call, error, None if error else outcome.result())
        elif not isinstance(error, RayTaskError):
            self._lost(call, error)
        elif isinstance(error.cause, Overloaded):
            self._refused(call)
        else:
            self._finish(call, error.cause if isinstance(error.cause, Exception) else error)

    def _finish(self, call: _Call, error: BaseException | None, reply: list[Array] | None = None) -> None:
        self._leave(call)
        self._places.release()
        if error is not None or reply is None:
            call.reply.set_exception(error or Unavailable("an empty reply"))
            return
        self.bytes_received += payload_bytes(reply)
        call.reply.set_result(reply)

    def _leave(self, call: _Call) -> None:
        with self._lock:
            if call.route is not None:
                call.route.calls.discard(call)

    def _refused(self, call: _Call) -> None:
        self._leave(call)
        delay = min(REFUSED_LIMIT_S, REFUSED_S * 2**call.refusals)
        call.refusals += 1
        timer = threading.Timer(delay, self._send, [call])
        timer.daemon = True
        timer.start()

    def _lost(self, call: _Call, error: RayError) -> None:
        """Send again, on another member if there is one, unless this request is what kills them."""
        self._notice(call, error)
        self._leave(call)
        if call.deaths >= self.limits.max_deaths:
            allowed = (
                f"one that a teacher survives; this one was lost {call.losses} times, at {call.deaths} while computed alone"
            )
            self._finish(call, InvalidRequest("teacher request", summary(call.request), allowed))
            return
        self.retries += 1
        self._send(call)

    def _notice(self, call: _Call, error: RayError) -> None:
        """What a lost request tells of itself and of its member, whose death the first one lost reports."""
        route = call.route
        assert route is not None
        with self._lock:
            if isinstance(error, ActorDiedError):
                route.gone = error  # for good
                return
            call.losses, call.deaths = call.losses + 1, call.deaths + call.computed
            if isinstance(error, RayActorError) and call.epoch == route.epoch:
                route.epoch, route.up = route.epoch + 1, False
                self._then(route.member.statistics.remote(), lambda outcome: self._returned(route, outcome))

    def _returned(self, route: _Route, outcome: Future[Any]) -> None:
        """A member answers again after its death."""
        with self._lock:
            route.up = outcome.exception() is None


@dataclass(frozen=True)
class Share:
    """What a member reserves, and the threads of its arithmetic on the CPU. A part of a GPU is shared with other members or a worker."""

    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1


class TeacherPool:
    """Owns the actors.

    Args:
        spec: the teacher.
        size: members.
        each: what a member gets.
        environment: SDXS_* variables for members, which may be on another machine.
        reserve: tell Ray's elastic training that these places are taken.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        size: int,
        each: Share | None = None,
        *,
        limits: Limits | None = None,
        environment: dict[str, str] | None = None,
        reserve: bool = False,
    ) -> None:
        each = each or Share()
        _check(size, each.gpus)
        self.limits = limits or Limits()
        load = partial(load_teacher, spec, each.threads, environment or {})
        self.members = members(load, size, self.limits, num_cpus=each.cpus, num_gpus=each.gpus)
        self._reservation = Reservation({"CPU": each.cpus, "GPU": each.gpus}, size) if reserve else None

    def client(self) -> PoolClient:
        """A client for this process or for sending to a worker."""
        return PoolClient(list(self.members), self.limits)

    def statistics(self) -> list[dict[str, float]]:
        """Per member, since its last start: pid, answered, images, forwards, busy_seconds, queue_depth, batch_images,
        seconds_per_image, seconds_per_forward, busy_share, refused, failed."""
        result: list[dict[str, float]] = ray.get([member.statistics.remote() for member in self.members])
        return result

    def close(self) -> None:
        for member in self.members:
            ray.kill(member)
        if self._reservation is not None:
            self._reservation.cancel()


def _check(size: int, gpus: float) -> None:
    if size < 1:
        raise InvalidRequest("teachers", size, "at least 1")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InvalidRequest("teacher gpus", gpus, "a part of one GPU (0.25) or a whole number of them")
