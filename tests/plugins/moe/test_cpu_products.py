"""Pairs of experts compute what each computes alone."""

from __future__ import annotations

import pytest
import torch

from apt_plugins.moe.cpu_products import SPARE_ROWS, group, multiply

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
def test_groups_hold_every_row_once_and_stay_inside(counts):
    groups = group(counts, start=3)
    parts = sorted((first, last, e) for each in groups for e, first, last in each.parts())
    assert sorted(e for *_, e in parts) == [e for e, n in enumerate(counts) if n]
    assert all(last - first == counts[e] for first, last, e in parts)
    borders = [3, *(last for _, last, _ in parts)]
    assert [first for first, *_ in parts] == borders[:-1]
    assert borders[-1] == 3 + sum(counts)
    for each in groups:
        assert each.reach <= borders[-1]
        assert each.reach - each.stop <= SPARE_ROWS * each.counts[0]
        assert list(each.experts) == sorted(each.experts)


def test_most_of_many_experts_are_in_pairs():
    torch.manual_seed(0)
    counts = torch.bincount(torch.randint(64, (4096,)), minlength=64).tolist()
    assert sum(len(each.experts) == 2 for each in group(counts, 0)) >= 28


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_are_those_of_each_expert(counts):
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), 5, dtype=torch.float64)
    matrices = torch.randn(len(counts), 5, 4, dtype=torch.float64)
    # What a pair writes in vain is written anew later, whatever it was.
    out = torch.full((sum(counts), 4), torch.nan, dtype=torch.float64)
    groups = group(counts, 0)
    for each in groups:
        multiply(rows, matrices, each, out)
        multiply(rows, matrices, each, out, add=True)
    for each in groups:
        for expert, first, last in each.parts():
            torch.testing.assert_close(out[first:last], 2 * rows[first:last] @ matrices[expert])
