"""Pairs of experts compute what each computes alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_plugins.moe.cpu_products import SPARE, group, most_places, multiply

COUNTS = {
    "alike": [16] * 6,
    "nearly": [16, 17, 15, 16, 18, 16, 17],
    "skewed": [40, 3, 0, 38, 1, 1, 22, 20, 0, 21],
    "one much larger": [20, 8, 8, 8],
    "the last smaller": [8, 7],
    "one": [0, 5, 0],
    "none": [0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_expert_with_rows_has_places_for_them(counts):
    groups = group(counts)
    assert sorted(e for each in groups for e in each.experts) == [
        e for e, n in enumerate(counts) if n
    ]
    assert [each.start for each in groups] == [0, *(each.stop for each in groups)][: len(groups)]
    for each in groups:
        assert list(each.experts) == sorted(each.experts)
        members = [counts[e] for e in each.experts]
        assert max(members) == each.rows
        assert each.rows - min(members) <= each.rows / SPARE


@given(st.lists(st.integers(0, 100), max_size=20))
def test_there_are_always_enough_places(counts):
    groups = group(counts)
    assert (groups[-1].stop if groups else 0) < most_places(sum(counts))


def test_the_bound_on_places_is_reached():
    assert group([SPARE, SPARE - 1])[-1].stop == most_places(2 * SPARE - 1) - 1


def test_experts_of_even_loads_are_in_pairs():
    torch.manual_seed(0)
    counts = torch.bincount(torch.randint(64, (4096,)), minlength=64).tolist()
    assert sum(len(each.experts) == 2 for each in group(counts)) >= 30


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_are_those_of_each_expert(counts):
    torch.manual_seed(0)
    places = most_places(sum(counts))
    rows = torch.randn(places, 5, dtype=torch.float64)
    matrices = torch.randn(len(counts), 5, 4, dtype=torch.float64)
    out = torch.full((places, 4), torch.nan, dtype=torch.float64)
    for each in group(counts):
        for add in (False, True):
            multiply(each.rows_of(rows), each.matrices_of(matrices), each.rows_of(out), add=add)
        for i, expert in enumerate(each.experts):
            here = slice(each.start + i * each.rows, each.start + (i + 1) * each.rows)
            torch.testing.assert_close(out[here], 2 * rows[here] @ matrices[expert])
            assert torch.equal(
                each.rows_of(rows[3:], 3)[i] if each.start >= 3 else rows[here], rows[here]
            )
