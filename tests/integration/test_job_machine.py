"""Any order of events: every accepted job ends exactly once, in the state of its first end, and leaves nothing behind."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule, run_state_machine_as_test
from redis.asyncio import Redis

from sdxs.errors import Overloaded, PreconditionFailed
from sdxs.v1 import gateway_pb2
from services.fabric.job_records import OVER
from services.fabric.jobs import Delivery, JobQueue
from tests import jobs

T = TypeVar("T")
MOST_JOBS, MOST_DELIVERIES = 4, 3
QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = gateway_pb2.JobState.values()[1:]
WORKERS = st.sampled_from(["worker 1", "worker 2", "worker 3"])
NUMBERS = st.integers(0, 6)
PRIORITIES = st.sampled_from([jobs.HIGH, jobs.NORMAL, jobs.LOW])
Held = tuple[str, Delivery]


class JobLife(RuleBasedStateMachine):
    """Clients and three workers on a queue with four places; what should be stands beside it."""

    taken: Bundle[Held] = Bundle("taken")

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis: Any = Redis.from_url(self.url, protocol=2, socket_timeout=60)  # however busy this machine is
        limits = {"max_queued_jobs": MOST_JOBS, "job_max_deliveries": MOST_DELIVERIES, "job_visibility_s": 60}
        self.queue = JobQueue(self.redis, jobs.settings(**limits))
        self.wait(self.queue.redis.flushall())
        self.wait(self.queue.open())
        self.states: dict[str, int] = {}
        self.holder: dict[str, Held] = {}
        self.tries: dict[str, int] = {}
        self.due: set[str] = set()
        """Jobs whose worker is taken for dead, or that are to be tried again."""
        self.ends: dict[str, int] = {}

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def open_jobs(self) -> list[str]:
        return [name for name, state in self.states.items() if state not in OVER]

    def end(self, job_id: str, state: int, told: bool) -> None:
        """`told`: whether the queue says that this was the end."""
        assert told == (self.states[job_id] not in OVER)
        if told:
            self.states[job_id] = state
            self.ends[job_id] = self.ends.get(job_id, 0) + 1
            self.due.discard(job_id)

    @initialize(priority=PRIORITIES)
    def fill(self, priority: int) -> None:
        """Something to do from the first."""
        for number in range(MOST_JOBS):
            self.submit(number, priority, batch=number == 0)

    @rule(number=NUMBERS, priority=PRIORITIES, batch=st.booleans())
    def submit(self, number: int, priority: int, batch: bool) -> None:
        job_id = f"job{number}"
        order = jobs.asking(*("ab" if batch else "a"), priority=priority)
        known, full = job_id in self.states, len(self.open_jobs()) >= MOST_JOBS
        try:
            answer = self.wait(self.queue.submit(job_id, b"", order))
        except Overloaded:
            assert full and not known
            return
        assert known or not full
        self.states.setdefault(job_id, QUEUED)
        assert answer == gateway_pb2.JobState.Name(self.states[job_id])

    @rule(target=taken, worker=WORKERS)
    def take(self, worker: str) -> Any:
        """A delivery, or none."""
        delivery = self.look(worker)
        return multiple() if delivery is None else (worker, delivery)

    def look(self, worker: str) -> Delivery | None:
        """What is due comes before what is new; a delivery too many is the end."""
        self.queue._next_claim = 0.0
        delivery = self.wait(self.queue.take(worker, wait_s=0))
        if delivery is None:
            buried = [name for name in self.due if self.tries[name] >= MOST_DELIVERIES]
            dead = [name for name in buried if self.state_of(name) == FAILED]
            if self.due:
                assert len(dead) == 1, "one that was due has been given up"
                self.end(dead[0], FAILED, told=True)
            else:
                assert QUEUED not in self.states.values()
            return None
        assert delivery.job_id in self.due or (not self.due and self.states[delivery.job_id] == QUEUED)
        self.due.discard(delivery.job_id)
        self.tries[delivery.job_id] = self.tries.get(delivery.job_id, 0) + 1
        assert delivery.number == self.tries[delivery.job_id] <= MOST_DELIVERIES
        self.states[delivery.job_id] = RUNNING
        self.holder[delivery.job_id] = (worker, delivery)
        return delivery

    def state_of(self, job_id: str) -> int:
        return int(self.wait(self.queue.get(job_id)).state)

    def holds(self, held: Held) -> bool:
        """Whether the queue takes the job for this worker's: an entry is in one worker's name, however often that took it."""
        worker, delivery = held
        mine = self.holder.get(delivery.job_id)
        return mine is not None and mine[0] == worker and self.states[delivery.job_id] == RUNNING

    @rule(held=taken)
    def keep(self, held: Held) -> None:
        worker, delivery = held
        assert self.wait(self.queue.keep(delivery, worker)) == self.holds(held)
        if self.holds(held):
            self.due.discard(delivery.job_id)  # it was not dead, only slow

    @rule(held=taken, item=st.integers(0, 1))
    def make_item(self, held: Held, item: int) -> None:
        """Even by a worker that has lost the job: what is made is made."""
        _, delivery = held
        made = gateway_pb2.JobItem(state=gateway_pb2.JOB_STATE_SUCCEEDED)
        before = self.wait(self.redis.hexists(f"{self.queue.key(delivery.job_id)}:items", item))
        told = self.wait(self.queue.put_item(delivery, item, made))
        assert told == (self.states[delivery.job_id] == RUNNING)
        if told and not before:
            self.tries[delivery.job_id] = 1

    @rule(held=taken)
    def succeed(self, held: Held) -> None:
        _, delivery = held
        self.end(delivery.job_id, SUCCEEDED, self.wait(self.queue.succeed(delivery, gateway_pb2.GetJobResponse())))

    @rule(held=taken)
    def refuse(self, held: Held) -> None:
        _, delivery = held
        self.end(delivery.job_id, FAILED, self.wait(self.queue.refuse(delivery, gateway_pb2.JobError(code="INTERNAL"))))

    @rule(held=taken)
    def retry(self, held: Held) -> None:
        """The pause passes at once."""
        worker, delivery = held
        self.wait(self.queue.retry(delivery, worker, "why not"))
        self.die(held)

    @rule(held=taken)
    def die(self, held: Held) -> None:
        """A worker falls silent for long; it may still come back, which is what makes it hard."""
        if self.holds(held):
            self.wait(jobs.fall_silent(self.queue, held[1], held[0]))
            self.due.add(held[1].job_id)

    @rule(target=taken, held=taken, worker=WORKERS)
    def lose(self, held: Held, worker: str) -> Any:
        """Another worker takes what is the dead one's, who may come back to it."""
        self.die(held)
        return self.take(worker)

    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        job_id = f"job{number}"
        if job_id not in self.states:
            return
        try:
            self.wait(self.queue.cancel(job_id))
        except PreconditionFailed:
            assert self.states[job_id] in OVER
        else:
            self.end(job_id, CANCELLED, told=True)

    @invariant()
    def the_queue_says_the_same(self) -> None:
        found, _ = self.wait(self.queue.list_jobs(frozenset(), None, 20))
        assert {job.job_id: job.state for job in found} == self.states
        assert self.wait(self.queue.backlog()) == len(self.open_jobs())
        places = sorted(job.position for job in found if job.state == QUEUED)
        assert places == list(range(1, len(places) + 1))

    def teardown(self) -> None:
        """What has not ended is done by a last worker, after all others have died."""
        try:
            for job_id, held in self.holder.items():
                if self.states[job_id] == RUNNING:
                    self.die(held)
            while self.open_jobs():
                delivery = self.look("last")
                if delivery is not None:
                    self.succeed(("last", delivery))
            assert self.ends == dict.fromkeys(self.states, 1)
            assert self.wait(self.queue.backlog()) == 0
            assert self.wait(self.redis.zcard(f"{self.queue.prefix}:waiting")) == 0
            assert int(self.wait(self.redis.hget(f"{self.queue.prefix}:counters", "bytes")) or 0) == 0
            pending = [self.wait(self.redis.xpending(stream, "workers"))["pending"] for stream in self.queue.streams]
            assert pending == [0, 0, 0]
        finally:
            self.wait(self.redis.aclose())
            self.runner.close()


@pytest.mark.timeout(240)
def test_every_accepted_job_ends_exactly_once(redis_url: str) -> None:
    quick = settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))

    class Here(JobLife):
        url = redis_url

    run_state_machine_as_test(Here, settings=quick)
