"""The order: permutations in constant memory, and the draws of mixtures."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.data.order import Order, Segment, StepPlan
from apt_core.data.permutation import SORTED_UP_TO, mixed, permuted

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@quick
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_index_once(size, key):
    assert sorted(permuted(np.arange(size), size, key).tolist()) == [*range(size)]


@pytest.mark.parametrize("size", [2, 3, 5, 16, SORTED_UP_TO + 1])
def test_every_index_comes_to_every_place_equally_often(size):
    """Chi-square over 3,000 keys, first 16 indices in up to 16 equal bins: within 5 sigma."""
    shown, bins, draws = min(size, 16), min(size, 16), 3000
    counts = np.zeros((shown, bins))
    for key in range(draws):
        places = permuted(np.arange(shown), size, mixed(7, key))
        counts[np.arange(shown), places * bins // size] += 1
    expected = draws * np.bincount(np.arange(size) * bins // size) / size
    freedom = shown * (bins - 1)
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_torn_apart():
    size = 1 << 17
    order = permuted(np.arange(size), size, 5)
    assert np.count_nonzero(np.abs(np.diff(order)) < 10) < 40  # 18 by chance
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02


def test_the_order_is_the_same_on_every_machine():
    assert permuted(np.arange(8), 8, 0).tolist() == [2, 4, 6, 5, 1, 7, 0, 3]
    some = permuted(np.array([0, 1, 2, 10**9 - 1]), 10**9, 1)
    assert some.tolist() == [
        636190459,
        391377372,
        624861676,
        202681249,
    ]
    assert mixed(1, 2, 3) == 15020427595393229491


def order_of(sizes: list[int], segments: list[Segment], per_step: int = 12, seed: int = 3) -> Order:
    steps = StepPlan(sum(sizes), seq_len=8, windows_per_step=per_step)
    return Order([f"s{i}" for i in range(len(sizes))], sizes, steps, seed=seed, segments=segments)


def draws(order: Order, steps: range) -> list[list[int]]:
    """The windows of each source in the order of steps (from 0)."""
    seen: list[list[int]] = [[] for _ in order.sizes]
    for number in steps:
        epoch, index = divmod(number, order.steps.steps_per_epoch)
        for source, window in zip(*order.step(epoch + 1, index), strict=True):
            seen[source].append(int(window))
    return seen


@quick
@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=5),
    per_step=st.integers(1, 9),
    data=st.data(),
)
def test_each_source_of_a_mixture_is_gone_through_whole_before_it_begins_anew(
    sizes, per_step, data
):
    weight = st.one_of(st.just(0.0), st.floats(0.001, 10))
    firsts = sorted({1, *data.draw(st.lists(st.integers(1, 60), max_size=6))})
    segments = []
    for first in firsts:
        weights = data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
        segments.append(Segment(first, tuple(weights) if any(weights) else (1.0,) * len(sizes)))
    order = order_of(sizes, segments, per_step)
    seen = draws(order, range(80))
    assert order_of(sizes, segments, per_step).drawn_before(81).tolist() == [*map(len, seen)]
    for size, windows in zip(sizes, seen, strict=True):
        for first in range(0, len(windows), size):
            turn = windows[first : first + size]
            assert len({*turn}) == len(turn)
            assert all(0 <= window < size for window in turn)


def test_weights_hold_from_their_step_on():
    segments = [Segment(1, (0.7, 0.3, 0.0)), Segment(41, (0.2, 0.3, 0.5)), Segment(101, (0, 1, 0))]
    order = order_of([5000, 700, 90], segments)
    first, second = draws(order, range(40)), draws(order, range(40, 100))
    assert not first[2] and len(second[2])
    for seen, weights, count in ((first, segments[0][1], 480), (second, segments[1][1], 720)):
        for windows, weight in zip(seen, weights, strict=True):
            assert abs(len(windows) - weight * count) <= 2
    third = draws(order, range(100, 140))
    assert [len(windows) for windows in third] == [0, 480, 0]


def test_a_ramp_of_weights_in_short_segments_keeps_its_shares():
    """Segments shorter than a cycle begin somewhere in it: a small weight gets its share."""
    segments = [Segment(1 + i, (0.95, 0.05)) for i in range(600)]
    counts = [len(seen) for seen in draws(order_of([900, 900], segments, 2), range(600))]
    assert 40 <= counts[1] <= 80


def test_any_step_is_found_without_those_before():
    segments = [Segment(1, (3, 1)), Segment(50, (1, 3)), Segment(51, (1, 0)), Segment(90, (1, 1))]
    through = order_of([400, 300], segments)
    for number in (0, 49, 50, 55, 140):
        epoch, index = divmod(number, through.steps.steps_per_epoch)
        fresh = order_of([400, 300], segments)
        assert [d.tolist() for d in fresh.step(epoch + 1, index)] == [
            d.tolist() for d in through.step(epoch + 1, index)
        ]


def test_threads_that_ask_for_steps_at_once_get_those_of_one(monkeypatch):
    segments = [Segment(1 + step, (1.0, 1.0 + step)) for step in range(12)]
    alone = order_of([50, 90], segments)
    expected = [draws(alone, range(step, step + 1)) for step in range(20)]
    given_in = Order._given_in

    def slowly(self: Order, segment: int, slot: int) -> object:
        time.sleep(0.001)  # lets another thread go on
        return given_in(self, segment, slot)

    monkeypatch.setattr(Order, "_given_in", slowly)
    shared = order_of([50, 90], segments)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda step: draws(shared, range(step, step + 1)), range(20)))
    assert made == expected


def test_shares_are_even_within_a_few_windows():
    order = order_of([10_000, 10_000], [Segment(1, (3, 1))], 8)
    for number in range(0, 200):
        sources = order.step(1, number).sources
        assert Counter(sources.tolist()) == {0: 6, 1: 2}


def test_a_billion_windows_need_no_memory():
    steps = StepPlan(10**9, seq_len=1024, windows_per_step=32)
    order = Order([""], [10**9], steps, seed=1)
    drawn = order.step(1, steps.steps_per_epoch - 1)
    assert len({*drawn.windows.tolist()}) == 32
    assert steps.tokens_before(steps.steps_per_epoch) == 1024 * 10**9
