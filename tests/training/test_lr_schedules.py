"""The learning-rate schedules of the core, and what a resume makes of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_core.errors import ConfigError
from apt_core.optim.lr_schedules import (
    ConstantProvider,
    CosineProvider,
    LinearProvider,
    WSDProvider,
)
from apt_core.testing import tiny_run

DECAYING = [CosineProvider(), LinearProvider(), WSDProvider(), WSDProvider({"decay_ratio": 1.0})]
ALL = [*DECAYING, ConstantProvider(), WSDProvider({"decay_ratio": 0.0})]
runs = st.tuples(st.integers(1, 10_000), st.integers(0, 10_000), st.floats(0, 1))
"""Total steps, warm-up, lowest ratio: the warm-up may be longer than the run."""


def test_the_cosine_schedule():
    factor = CosineProvider().factor
    assert factor(5, 100, 10, 0.1) == pytest.approx(0.5)
    assert factor(10, 100, 10, 0.1) == pytest.approx(1.0)
    assert factor(55, 100, 10, 0.1) == pytest.approx(0.55)
    assert factor(100, 100, 10, 0.1) == factor(1000, 100, 10, 0.1) == pytest.approx(0.1)
    assert factor(1, 1, 0, 0.0) == pytest.approx(0.0)


def test_the_linear_schedule():
    factor = LinearProvider().factor
    assert factor(5, 100, 10, 0.1) == pytest.approx(0.5)
    assert factor(55, 100, 10, 0.1) == pytest.approx(0.55)
    assert factor(28, 100, 10, 0.0) == pytest.approx(0.8)


def test_wsd_is_stable_and_then_decays_over_its_share_of_the_steps():
    factor = WSDProvider({"decay_ratio": 0.25}).factor
    assert [factor(step, 100, 10) for step in (5, 10, 40, 75)] == [0.5, 1.0, 1.0, 1.0]
    assert factor(76, 100, 10) == pytest.approx(1 - math.sqrt(1 / 25))
    assert factor(84, 100, 10, 0.1) == pytest.approx(0.1 + 0.9 * (1 - 0.6))
    assert factor(100, 100, 10, 0.1) == pytest.approx(0.1)


def test_a_decay_that_would_begin_in_the_warm_up_begins_after_it():
    factor = WSDProvider({"decay_ratio": 0.9}).factor
    assert factor(50, 100, 50) == 1.0
    assert factor(75, 100, 50) == pytest.approx(1 - math.sqrt(0.5))


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
@given(run=runs, step=st.integers(1, 30_000))
def test_a_factor_is_between_0_and_1_at_every_step(schedule, run, step):
    assert 0 <= schedule.factor(step, *run) <= 1 + 1e-12


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
@given(run=runs)
def test_the_warm_up_rises_evenly_to_1(schedule, run):
    total, warmup, ratio = run
    for step in {1, warmup // 2, warmup} - {0}:
        if step <= warmup:
            assert schedule.factor(step, total, warmup, ratio) == step / warmup


@pytest.mark.parametrize("schedule", DECAYING, ids=lambda s: s.name)
@given(run=runs, past=st.integers(1, 10_000))
def test_the_end_is_the_lowest_ratio_and_stays_it(schedule, run, past):
    total, warmup, ratio = run
    after = schedule.factor(max(total, warmup) + past, total, warmup, ratio)
    assert after == pytest.approx(ratio)
    if warmup < total:
        assert schedule.factor(total, total, warmup, ratio) == pytest.approx(ratio)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
@given(run=runs, step=st.integers(1, 20_000))
def test_it_falls_without_a_jump_after_the_warm_up(schedule, run, step):
    """The steepest is the first step of 1 - sqrt(progress)."""
    total, warmup, _ = run
    step = max(step, warmup, 1)
    fall = schedule.factor(step, *run) - schedule.factor(step + 1, *run)
    share = float(schedule.setting("decay_ratio", 0.2))
    decay_steps = min(share * total, total - warmup) if share else total
    assert -1e-12 <= fall <= max(1.0, decay_steps) ** -0.5 * 2


@pytest.mark.parametrize("schedule", ["constant", "wsd", "linear"])
def test_a_longer_run_may_resume_where_the_schedule_does_not_know_the_end(tmp_path, schedule):
    overrides = {
        "training.lr_schedule_name": schedule,
        "training.warmup_steps": 2,
        "training.min_lr_ratio": 0.0 if schedule == "constant" else 0.1,
    }
    tiny_run(output=tmp_path / "run", steps=3, overrides=overrides)
    longer = {"output": tmp_path / "run", "steps": 5, "overrides": overrides, "resume": True}
    if schedule == "constant":
        assert tiny_run(**longer).same_weights(tiny_run(steps=5, overrides=overrides))
    else:
        with pytest.raises(ConfigError, match=r"training\.max_steps"):
            tiny_run(**longer)


def test_the_profile_sets_the_share_of_the_decay():
    overrides = {
        "training.lr_schedule_name": "wsd",
        "training.decay_ratio": 0.5,
        "training.learning_rate": 0.01,
        "training.log_every_steps": 1,
    }
    rates = [row["lr"] for row in tiny_run(steps=8, overrides=overrides).metrics if "lr" in row]
    assert rates[:4] == [0.01] * 4
    assert rates[4:] == pytest.approx([0.01 * (1 - math.sqrt(k / 4)) for k in (1, 2, 3, 4)])
