"""The order of rows: every row once an epoch, the same for any number of workers, continued from anywhere, shuffled well, fixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from trainer.data.order import Order

counts, seeds, epochs = st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6)


@given(counts, seeds, epochs)
@settings(max_examples=100, deadline=None)
def test_each_row_once_an_epoch(count: int, seed: int, epoch: int) -> None:
    rows = Order(count, seed).take(epoch * count, (epoch + 1) * count)
    assert sorted(rows.tolist()) == list(range(count))


@given(counts, seeds, st.integers(0, 500), st.integers(1, 64), st.data())
@settings(max_examples=100, deadline=None)
def test_the_shares_of_any_number_of_workers_join_to_the_same_batch(
    count: int, seed: int, step: int, batch: int, data: st.DataObject
) -> None:
    order, workers = Order(count, seed), data.draw(st.integers(1, batch))
    shares = [order.share(step, batch, rank, workers) for rank in range(workers)]
    np.testing.assert_array_equal(np.concatenate(shares), order.take(step * batch, (step + 1) * batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(20, 3000), seeds, st.integers(0, 9000), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_continued_in_the_middle_it_is_the_unbroken_order(count: int, seed: int, start: int, length: int) -> None:
    order = Order(count, seed)
    np.testing.assert_array_equal(order.take(0, start + length)[start:], order.take(start, start + length))


@pytest.mark.parametrize("count", [3, 7, 16, 25])
def test_every_row_is_as_likely_at_every_place(count: int) -> None:
    """Chi-square over 200 epochs a row, for the first place, the last, and the step from the first to the second."""
    order, draws = Order(count, 11), 200 * count
    table = np.stack([order.take(epoch * count, (epoch + 1) * count) for epoch in range(draws)])
    for column in (table[:, 0], table[:, -1]):
        assert chisquare(np.bincount(column, minlength=count)).pvalue > 1e-4
    steps = (table[:, 1] - table[:, 0]) % count
    assert chisquare(np.bincount(steps, minlength=count)[1:]).pvalue > 1e-4


def test_epochs_and_seeds_differ() -> None:
    epochs = Order(1000, 0).take(0, 2000).reshape(2, 1000)
    assert (epochs[0] == epochs[1]).sum() < 10
    assert (epochs[0] == Order(1000, 1).take(0, 1000)).sum() < 10
    assert abs(np.corrcoef(epochs[0], np.arange(1000))[0, 1]) < 0.15


def test_the_order_never_changes() -> None:
    """A run is continued by later versions: these numbers were written down once."""
    assert Order(10, 0).take(0, 20).tolist() == GOLDEN
    assert Order(10**9, 7).take(10**12, 10**12 + 3).tolist() == GOLDEN_LARGE


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Order(0, 0)


GOLDEN = [8, 7, 5, 2, 4, 6, 3, 9, 1, 0, 9, 3, 2, 7, 6, 4, 5, 1, 0, 8]
GOLDEN_LARGE = [58118862, 413151703, 866092918]
