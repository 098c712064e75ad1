"""Metrics are read from whatever has become of their file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from apt_core.runs.metrics import read_metrics


@pytest.fixture
def metrics(tmp_path):
    def read(*rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
        return read_metrics(tmp_path)

    return read


def series(found, name):
    return list(zip(found.series[name].steps, found.series[name].values, strict=True))


def test_rows_of_steps_that_were_taken_again_do_not_count(metrics):
    found = metrics(
        {"step": 1, "epoch": 1, "loss": 5.0, "sample": "a"},
        {"step": 2, "epoch": 1, "loss": 4.0},
        {"step": 2, "epoch": 1, "val_loss": 4.5, "sample": "b"},
        {"step": 3, "epoch": 2, "loss": 3.0, "sample": "c", "old/metric": 1},
        {"step": 9, "epoch": 3, "loss": 1.0},
        {"step": 3, "epoch": 2, "loss": 3.5, "sample": "d"},
        {"step": 4, "epoch": 2, "loss": 2.5},
        # Killed again, and resumed where it was resumed before.
        {"step": 3, "epoch": 2, "loss": 3.25},
    )
    assert series(found, "loss") == [(1, 5.0), (2, 4.0), (3, 3.25)]
    assert series(found, "val_loss") == [(2, 4.5)]
    assert "old/metric" not in found.series
    assert found.samples == [(1, "a"), (2, "b")]
    assert found.epochs == [(1, 1), (2, 3)]
    assert (found.rows, found.last_step, found.notes) == (4, 3, [])


def test_an_evaluation_of_an_earlier_step_is_no_resume(metrics):
    found = metrics(
        {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 1, "val_loss": 3.0},
        {"step": 0, "val_loss": 6.0},
    )  # fmt: skip
    assert series(found, "loss") == [(1, 5.0), (2, 4.0)]
    assert series(found, "val_loss") == [(0, 6.0), (1, 3.0)]
    assert (found.rows, found.last_step) == (4, 2)


def test_of_two_values_at_a_step_the_later_one_counts(metrics):
    found = metrics({"step": 4, "val_loss": 2.0}, {"step": 4, "val_loss": 1.5, "val_tokens": 9})
    assert series(found, "val_loss") == [(4, 1.5)]


def test_numbers_of_any_kind_are_values(metrics):
    values = ["nan", "inf", "-inf", 10**400, -(10**400), 1e300, 0, True, None, "1", [1], {}]
    found = metrics(*({"step": n, "loss": value} for n, value in enumerate(values)))
    expected = [np.nan, np.inf, -np.inf, np.inf, -np.inf, 1e300, 0.0]
    np.testing.assert_array_equal(found.series["loss"].values, expected)


def test_an_empty_folder_has_no_metrics(tmp_path):
    found = read_metrics(tmp_path)
    assert (found.series, found.rows, found.last_step) == ({}, 0, 0)
    assert found.notes == ["there is no metrics.jsonl"]


def test_steps_that_go_back_at_every_row_do_not_cost_their_square(metrics):
    rows = [{"step": 10**9 if n % 2 else 0, "epoch": n, "loss": 1.0} for n in range(20_000)]
    assert series(metrics(*rows), "loss") == [(0, 1.0), (1e9, 1.0)]
