"""Who is next on a device that several tenants and classes want."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.fabric.deadline import Priority
from services.fabric.fairness import WEIGHTS, FairQueue, Line


def taken(queue: FairQueue[str], count: int) -> list[str]:
    return [queue.pop() for _ in range(count)]


def test_one_flow_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abcdef":
        queue.push(item, "one")
    assert queue.peek() == "a" and taken(queue, 6) == list("abcdef") and not queue
    with pytest.raises(IndexError):
        queue.pop()


def test_a_flood_does_not_delay_who_asks_for_little() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(1000):
        queue.push("flood", "flood")
    taken(queue, 500)
    queue.push("little", "little")
    assert "little" in taken(queue, 2)


def test_idle_time_is_not_saved_up() -> None:
    """Who was away for long gets its share from now on, not what it did not use."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("always", "always")
    taken(queue, 99)
    for _ in range(10):
        queue.push("always", "always")
        queue.push("back", "back")
    taken(queue, 1)
    assert Counter(taken(queue, 10)) == {"always": 5, "back": 5}


@given(counts=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 60), min_size=2))
def test_flows_that_all_wait_share_evenly_and_each_keeps_its_order(counts: dict[str, int]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for flow, count in counts.items():
        for number in range(count):
            queue.push((flow, number), flow)
    fewest = min(counts.values())
    order = [queue.pop() for _ in range(sum(counts.values()))]
    for end in range(1, fewest * len(counts) + 1):
        seen = Counter(flow for flow, _ in order[:end])
        assert max(seen[flow] for flow in counts) - min(seen[flow] for flow in counts) <= 1
    for flow, count in counts.items():
        assert [number for other, number in order if other == flow] == list(range(count))


def test_classes_share_by_weight_and_none_starves() -> None:
    line: Line[Priority] = Line()
    for priority in Priority:
        for _ in range(300):
            line.push(priority, priority, "")
    seen = Counter(line.pop() for _ in range(210))
    assert {priority: seen[priority] for priority in Priority} == {Priority.HIGH: 160, Priority.NORMAL: 40, Priority.LOW: 10}
    assert sum(WEIGHTS.values()) == 21


def test_an_urgent_item_is_among_the_next() -> None:
    line: Line[str] = Line()
    for number in range(200):
        line.push(f"low {number}", Priority.LOW, "a")
    for _ in range(50):
        line.pop()
    line.push("urgent", Priority.HIGH, "b")
    assert "urgent" in [line.pop() for _ in range(2)]


def test_tenants_share_inside_a_class_however_much_each_asks_in_others() -> None:
    line: Line[tuple[str, Priority]] = Line()
    for _ in range(100):
        line.push(("greedy", Priority.NORMAL), Priority.NORMAL, "greedy")
        line.push(("greedy", Priority.LOW), Priority.LOW, "greedy")
    for _ in range(20):
        line.push(("modest", Priority.NORMAL), Priority.NORMAL, "modest")
    seen = Counter(line.pop() for _ in range(50))
    assert seen["modest", Priority.NORMAL] == seen["greedy", Priority.NORMAL] == 20 and seen["greedy", Priority.LOW] == 10


@given(
    st.lists(st.one_of(st.none(), st.tuples(st.sampled_from(list(Priority)), st.sampled_from("ab"))), max_size=200),
)
def test_what_goes_in_comes_out_once(steps: list[tuple[Priority, str] | None]) -> None:
    """None stands for taking one out."""
    line, inside = Line[int](), set[int]()
    for number, step in enumerate(steps):
        if step is not None:
            line.push(number, *step)
            inside.add(number)
        elif inside:
            following = line.peek()
            assert line.pop() == following and following in inside
            inside.remove(following)
        assert len(line) == len(inside)


def test_what_flows_have_ended_is_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(10_000):
        queue.push(number, f"tenant {number}")
        queue.pop()
    assert len(queue._finish) < 50


@given(st.lists(st.tuples(st.sampled_from(list(Priority)), st.sampled_from("abc"), st.integers(0, 3)), max_size=40))
def test_an_item_taken_before_its_turn_changes_nobody_elses(pushed: list[tuple[Priority, str, int]]) -> None:
    """What is left comes in the order it would have come in anyway, and what is taken is the first that was wanted."""
    reference, line = Line[tuple[int, int]](), Line[tuple[int, int]]()
    for number, (priority, tenant, bucket) in enumerate(pushed):
        for each in (reference, line):
            each.push((number, bucket), priority, tenant)
    inside = {number: (priority, tenant) for number, (priority, tenant, _) in enumerate(pushed)}
    order = [reference.pop() for _ in pushed]
    taken = []
    while (found := line.pop_first(lambda item: item[1] == 0)) is not None:
        taken.append(found)
    left = [line.pop() for _ in range(len(line))]
    assert sorted([*taken, *left]) == sorted(order) and all(bucket == 0 for _, bucket in taken)
    for some in (taken, left):  # in a class each in the order it would have had
        for priority in Priority:
            mine = [item for item in some if inside[item[0]][0] is priority]
            assert mine == [item for item in order if item in mine]
