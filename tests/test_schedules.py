"""A schedule is a pure function of the position; what nobody declares is an error."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.config import (
    InactiveKey,
    Source,
    parse_config,
    parse_override,
    read_profile,
    validate,
)
from apt_core.data.order import StepPlan
from apt_core.errors import ConfigError, Problem
from apt_core.schedules import Boundary, Horizon, Schedule, check_schedules

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
lengths = st.integers(1, 60)
numbers = st.floats(-1e6, 1e6)


def steps_of(per: int, batch: int = 1) -> StepPlan:
    """Epochs of ``per`` steps of ``batch`` tokens."""
    return StepPlan(per * batch, seq_len=1, windows_per_step=batch)


def epochs(schedule: Schedule, name: str, last: int) -> list[float]:
    return [schedule.get_param(name, epoch=epoch) for epoch in range(1, last + 1)]


# Enabling


def test_a_plugin_without_a_schedule_is_always_enabled() -> None:
    assert Schedule({}).should_enable_plugin("moe", epoch=1)
    assert Schedule({}).should_enable_plugin("moe")


@pytest.mark.parametrize(
    ("unit", "argument"), [("epoch", "epoch"), ("step", "step"), ("token", "tokens")]
)
def test_enabled_at_every_position_from_then_on(unit: str, argument: str) -> None:
    schedule = Schedule({f"enable_my_idea_at_{unit}": 3})
    enabled = [schedule.should_enable_plugin("my_idea", **{argument: at}) for at in range(1, 6)]
    assert enabled == [False, False, True, True, True]


def test_disabled_from_then_on() -> None:
    schedule = Schedule({"enable_moe_at_epoch": 2, "disable_moe_at_epoch": 4})
    assert [schedule.should_enable_plugin("moe", epoch=at) for at in range(1, 6)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert Schedule({"disable_moe_at_step": 2}).should_enable_plugin("moe", step=1)


@quick
@given(at=lengths, unit=st.sampled_from(["epoch", "step", "token"]), per=lengths, batch=lengths)
def test_once_enabled_a_plugin_stays_enabled(at: int, unit: str, per: int, batch: int) -> None:
    horizon = Horizon(max_epochs=4, steps=steps_of(per, batch))
    schedule = Schedule({f"enable_p_at_{unit}": at}, horizon=horizon)
    seen = [
        schedule.should_enable_plugin(
            "p", epoch=(step - 1) // per + 1, step=step, tokens=(step - 1) * batch
        )
        for step in range(1, 4 * per + 1)
    ]
    assert seen == sorted(seen)
    # The horizon alone converts a step into every other unit.
    assert seen == [schedule.should_enable_plugin("p", step=s) for s in range(1, 4 * per + 1)]


def test_positions_are_converted_where_the_horizon_is_known() -> None:
    horizon = Horizon(max_epochs=3, steps=steps_of(10, 100))
    by_epoch = Schedule({"enable_p_at_epoch": 2}, horizon=horizon)
    assert [by_epoch.should_enable_plugin("p", step=step) for step in (10, 11)] == [False, True]
    by_step = Schedule({"enable_p_at_step": 11}, horizon=horizon)
    assert [by_step.should_enable_plugin("p", epoch=epoch) for epoch in (1, 2)] == [False, True]
    assert [by_step.should_enable_plugin("p", tokens=at) for at in (999, 1000)] == [False, True]


def test_a_position_that_does_not_tell_is_refused() -> None:
    schedule = Schedule({"enable_p_at_token": 5, "x": {"start": 0, "end": 1, "by": "step"}})
    with pytest.raises(ValueError, match="give tokens="):
        schedule.should_enable_plugin("p", epoch=1)
    with pytest.raises(ValueError, match="give step="):
        schedule.get_param("x", epoch=1)
    with pytest.raises(ValueError, match="last step"):
        schedule.get_param("x", step=1)


# Parameters


def test_a_constant_and_a_default() -> None:
    schedule = Schedule({"x": 0.5})
    assert schedule.get_param("x") == 0.5
    assert schedule.get_param("y", epoch=1, default=7) == 7
    assert schedule.get_param("y", epoch=1) is None


def test_by_epoch_runs_over_all_epochs() -> None:
    schedule = Schedule({"t": {"start": 1.5, "end": 0.5}}, horizon=Horizon(max_epochs=5))
    assert epochs(schedule, "t", 7) == [1.5, 1.25, 1.0, 0.75, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("ramp", "switch"),
    [
        ({}, {}),
        ({"by": "step", "until": 1}, {}),
        ({"by": "step"}, {"enable_p_at_step": 10}),
        ({"by": "step", "until": 4}, {"enable_p_at_token": 17}),
        ({"by": "token", "until": 16}, {"enable_p_at_step": 6}),
        ({"by": "epoch", "until": 1}, {"enable_p_at_step": 4}),
    ],
)
def test_a_ramp_without_length_is_at_its_end(ramp: dict[str, Any], switch: dict[str, int]) -> None:
    """In one epoch, over one position, enabled in the last one, or after the ramp in another
    unit."""
    horizon = Horizon(max_epochs=1, steps=steps_of(10, 4))
    entries = {"t": {"start": 1.5, "end": 0.5, **ramp}, **switch}
    schedule = Schedule(entries, params={"t": "p"}, horizon=horizon)
    first = schedule.first_step_of("p")
    values = [schedule.get_param("t", step=step) for step in range(first, 11)]
    assert values == [0.5] * len(values)


def test_warmup_ramps_then_stays() -> None:
    schedule = Schedule({"w": {"start": 0, "end": 0.4, "by": "step", "warmup": 4}})
    values = [schedule.get_param("w", step=step) for step in (1, 2, 3, 5, 6, 1000)]
    assert values == pytest.approx([0, 0.1, 0.2, 0.4, 0.4, 0.4])


def test_until_is_the_last_position() -> None:
    by_step = Schedule({"w": {"start": 0, "end": 4, "by": "step", "until": 5}})
    assert [by_step.get_param("w", step=step) for step in (1, 2, 5, 9)] == [0, 1, 4, 4]
    by_token = Schedule({"w": {"start": 0, "end": 4, "by": "token", "until": 100}})
    assert [by_token.get_param("w", tokens=at) for at in (0, 25, 100, 900)] == [0, 1, 4, 4]


def test_by_step_ends_with_the_run() -> None:
    entries = {"w": {"start": 0, "end": 1, "by": "step"}}
    whole = Schedule(entries, horizon=Horizon(max_epochs=2, steps=steps_of(5)))
    assert [whole.get_param("w", step=step) for step in (1, 10)] == [0, 1]
    profile = {"schedules": entries, "training": {"max_steps": 7}}
    cut = Schedule(profile).with_horizon(Horizon(steps=steps_of(5)))
    assert [cut.get_param("w", step=step) for step in (1, 7)] == [0, 1]


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 5.0), ("cosine", 5.0), ("exponential", 3.0)]
)
def test_shapes(shape: str, middle: float) -> None:
    entry = {"start": 1, "end": 9, "shape": shape}
    schedule = Schedule({"t": entry}, horizon=Horizon(max_epochs=5))
    assert schedule.get_param("t", epoch=3) == pytest.approx(middle)
    quarter = {
        "linear": 3.0,
        "cosine": 1 + 8 * (1 - math.cos(math.pi / 4)) / 2,
        "exponential": 3**0.5,
    }
    assert schedule.get_param("t", epoch=2) == pytest.approx(quarter[shape])


@quick
@given(
    start=numbers,
    end=numbers,
    last=st.integers(2, 60),
    shape=st.sampled_from(["linear", "cosine", "exponential"]),
)
def test_starts_at_start_ends_at_end_and_never_turns(
    start: float, end: float, last: int, shape: str
) -> None:
    if shape == "exponential":
        start, end = abs(start) + 1e-3, abs(end) + 1e-3
    entry = {"start": start, "end": end, "shape": shape}
    schedule = Schedule({"t": entry}, horizon=Horizon(max_epochs=last))
    values = epochs(schedule, "t", last)
    assert (values[0], values[-1]) == (start, end)
    tolerance = 1e-9 * max(abs(start), abs(end))
    steps = [(b - a) * (1 if end >= start else -1) for a, b in itertools.pairwise(values)]
    assert min(steps) >= -tolerance


@quick
@given(
    data=st.data(),
    unit=st.sampled_from(["epoch", "step", "token"]),
    by=st.sampled_from(["epoch", "step"]),
    per=st.integers(1, 9),
    batch=st.integers(1, 9),
)
def test_nothing_jumps_when_a_plugin_is_enabled_later(
    data: st.DataObject, unit: str, by: str, per: int, batch: int
) -> None:
    horizon = Horizon(max_epochs=6, steps=steps_of(per, batch))
    most = {"epoch": 6, "step": 6 * per, "token": (6 * per - 1) * batch}[unit]
    at = data.draw(st.integers(1, max(1, most)))
    entries = {f"enable_p_at_{unit}": at, "t": {"start": 2.0, "end": 1.0, "by": by}}
    schedule = Schedule(entries, params={"t": "p"}, horizon=horizon)
    values = [
        schedule.get_param("t", step=step)
        for step in range(1, 6 * per + 1)
        if schedule.should_enable_plugin("p", step=step)
    ]
    assert values == sorted(values, reverse=True)
    if values:
        assert values[-1] == 1.0
    if len(values) > (per if by == "epoch" else 1):  # else there is nothing to move over
        assert values[0] == 2.0


@quick
@given(
    data=st.data(),
    seq_len=st.integers(1, 5),
    windows=st.integers(1, 4),
    max_epochs=st.integers(1, 4),
    by=st.sampled_from(["epoch", "step", "token"]),
    shape=st.sampled_from(["linear", "cosine", "exponential"]),
)
def test_every_way_of_counting_agrees_with_the_steps_that_are_taken(
    data: st.DataObject,
    seq_len: int,
    windows: int,
    max_epochs: int,
    by: str,
    shape: str,
) -> None:
    """Ragged epochs, switches and ramps in any units, runs that end within an epoch."""
    plan = StepPlan(data.draw(st.integers(windows, 60)), seq_len=seq_len, windows_per_step=windows)
    taken = [
        (epoch, (epoch - 1) * plan.steps_per_epoch + index + 1, plan.step_tokens(index))
        for epoch in range(1, max_epochs + 1)
        for index in range(plan.steps_per_epoch)
    ]
    taken = taken[: data.draw(st.integers(1, len(taken)))]
    before = [sum(count for _, _, count in taken[:index]) for index in range(len(taken))]
    positions = {
        "epoch": [epoch for epoch, _, _ in taken],
        "step": [step for _, step, _ in taken],
        "token": before,
    }
    horizon = Horizon(max_epochs, len(taken), plan)
    for unit, own in positions.items():
        assert horizon.last(unit) == own[-1]
        for other, others in positions.items():
            expected = [own[others.index(place)] for place in others]
            assert [horizon.convert(place, other, unit) for place in others] == expected

    unit = data.draw(st.sampled_from(["epoch", "step", "token"]))
    at = data.draw(st.integers(1, max(1, positions[unit][-1])))
    ramp: dict[str, Any] = {"start": 2.0, "end": 1.0, "by": by, "shape": shape}
    if by == "token" or data.draw(st.booleans()):
        ramp["until"] = data.draw(st.integers(1, max(1, positions[by][-1])))
    schedule = Schedule({f"enable_p_at_{unit}": at, "t": ramp}, params={"t": "p"}, horizon=horizon)
    enabled = [place >= at for place in positions[unit]]
    assert enabled == [schedule.should_enable_plugin("p", step=step) for _, step, _ in taken]
    assert enabled == [
        schedule.should_enable_plugin("p", epoch=epoch, step=step, tokens=tokens)
        for (epoch, step, _), tokens in zip(taken, before, strict=True)
    ]
    if not any(enabled):
        assert schedule.first_step_of("p") > len(taken)
        return
    first = enabled.index(True)
    assert schedule.first_step_of("p") == first + 1
    values = [schedule.get_param("t", step=step) for _, step, _ in taken[first:]]
    assert values == sorted(values, reverse=True)
    own = positions[by][first:]
    last = ramp.get("until", own[-1])
    assert [value == 1.0 for value in values] == [place >= last for place in own]
    assert [value == 2.0 for value in values] == [place == own[0] < last for place in own]


@quick
@given(
    ends=st.tuples(st.floats(1e-300, 1e30), st.floats(1e-300, 1e30)),
    sign=st.sampled_from([1, -1]),
    last=st.integers(2, 50),
)
def test_an_exponential_ramp_takes_any_ends_of_one_sign(
    ends: tuple[float, float], sign: int, last: int
) -> None:
    entry = {"start": sign * ends[0], "end": sign * ends[1], "shape": "exponential"}
    values = epochs(Schedule({"t": entry}, horizon=Horizon(max_epochs=last)), "t", last)
    assert (values[0], values[-1]) == (sign * ends[0], sign * ends[1])
    assert values == sorted(values, reverse=values[0] > values[-1])


def test_a_plugins_parameters_count_from_its_moment() -> None:
    entries = {
        "enable_moe_at_epoch": 3,
        "t": {"start": 1.5, "end": 0.5},
        "u": {"start": 4, "end": 0},
    }
    schedule = Schedule(entries, params={"t": "moe"}, horizon=Horizon(max_epochs=5))
    assert epochs(schedule, "t", 5) == [1.5, 1.5, 1.5, 1.0, 0.5]
    assert epochs(schedule, "u", 5) == [4, 3, 2, 1, 0]
    by_step = {"start": 0, "end": 1, "by": "step", "warmup": 10}
    schedule = Schedule(
        {"enable_moe_at_epoch": 3, "w": by_step},
        params={"w": "moe"},
        horizon=Horizon(max_epochs=5, steps=steps_of(10)),
    )
    assert [schedule.get_param("w", step=at) for at in (21, 26, 31)] == [0, 0.5, 1]


REASONING = parse_config({"schedules": read_profile("gpt5_moe_reasoning").data["schedules"]})


@quick
@given(positions=st.lists(st.integers(1, 50), max_size=8), again=st.randoms(use_true_random=False))
def test_the_value_depends_on_nothing_but_the_position(positions: list[int], again: Any) -> None:
    schedule = Schedule(REASONING, params={"route_temp": "moe"})
    first = {at: schedule.get_param("route_temp", epoch=at) for at in positions}
    again.shuffle(positions)
    assert all(schedule.get_param("route_temp", epoch=at) == first[at] for at in positions)


# What it is made from


def test_a_config_a_profile_and_bare_entries_agree() -> None:
    entries = {"enable_p_at_epoch": 2, "t": {"start": 1, "end": 3}}
    profile = {"schedules": entries, "training": {"max_epochs": 3}, "someones": {"own": 1}}
    config = parse_config({"schedules": entries, "training": {"max_epochs": 3}})
    bare = Schedule(entries, horizon=Horizon(max_epochs=3))
    for schedule in (Schedule(config), Schedule(profile), bare):
        assert epochs(schedule, "t", 3) == [1, 2, 3]
        assert not schedule.should_enable_plugin("p", epoch=1)


@pytest.mark.parametrize(
    "entries",
    [{"enable_p_at_epoch": "2"}, {"t": {"start": 1}}, {"t": "x"}, {"enable_p_at_batch": 1}],
)
def test_entries_that_are_not_valid_are_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Schedule(entries)


# The timeline


def test_boundaries_come_in_the_order_of_the_run() -> None:
    entries = {
        "enable_a_at_epoch": 3,
        "enable_b_at_step": 15,
        "disable_c_at_epoch": 2,
        "enable_d_at_token": 5,
        "t": 1,
    }
    horizon = Horizon(max_epochs=5, steps=steps_of(10, 10))
    boundaries = Schedule(entries, horizon=horizon).boundaries()
    assert [boundary.plugin for boundary in boundaries] == ["d", "c", "b", "a"]
    assert boundaries[1] == Boundary("c", False, "epoch", 2)
    assert [boundary.plugin for boundary in Schedule(entries).boundaries()] == ["c", "a", "b", "d"]


# Against the plugins that there are


def check(
    profile: dict[str, Any],
    plugins: tuple[str, ...] = ("moe",),
    blocked: dict[str, str] | None = None,
    lenient: bool = False,
    overrides: tuple[str, ...] = (),
) -> tuple[list[Problem], list[InactiveKey]]:
    source = Source.from_dict(profile).with_overrides([parse_override(text) for text in overrides])
    return check_schedules(
        validate(source).config,
        source,
        plugins=plugins,
        params={"route_temp": "moe", "other": "gone"},
        blocked=blocked or {},
        lenient=lenient,
    )


def test_what_active_plugins_declare_is_fine() -> None:
    ramp = {"start": 1, "end": 2}
    assert check({"schedules": {"enable_moe_at_epoch": 2, "route_temp": ramp}}) == ([], [])


def test_a_schedule_of_an_absent_plugin_is_an_error() -> None:
    ((problem,), inactive) = check({"schedules": {"enable_mo_at_epoch": 2}})
    assert problem.key == "schedules.enable_mo_at_epoch"
    assert problem.hint == "did you mean 'moe'?"
    assert inactive == []


def test_a_parameter_that_nothing_declares_is_an_error() -> None:
    ((problem,), _) = check({"schedules": {"rout_temp": 1.0}})
    assert (problem.key, problem.hint) == ("schedules.rout_temp", "did you mean 'route_temp'?")


def test_schedules_of_a_blocked_plugin_are_inert() -> None:
    entries = {"enable_gone_at_epoch": 99, "other": 1.0, "its_own": 2.0}
    blocked = {"gone": "plugin gone is blocked", "its_own": "plugin gone is blocked"}
    problems, inactive = check({"schedules": entries}, blocked=blocked)
    assert problems == []
    assert {item.key for item in inactive} == {f"schedules.{key}" for key in entries}
    assert {item.reason for item in inactive} == {"plugin gone is blocked"}


def test_parameters_may_belong_to_a_plugin_that_could_not_be_asked() -> None:
    problems, (inactive,) = check({"schedules": {"unheard_of": 1.0}}, lenient=True)
    assert problems == [] and inactive.key == "schedules.unheard_of"


@pytest.mark.parametrize(
    ("profile", "key"),
    [
        (
            {"schedules": {"enable_moe_at_epoch": 4}, "training": {"max_epochs": 3}},
            "schedules.enable_moe_at_epoch",
        ),
        (
            {
                "schedules": {"enable_moe_at_step": 9},
                "training": {"max_steps": 8, "warmup_steps": 0},
            },
            "schedules.enable_moe_at_step",
        ),
        (
            {"schedules": {"enable_moe_at_epoch": 2}, "model": {"moe": {"enabled": False}}},
            "schedules.enable_moe_at_epoch",
        ),
        (
            {
                "schedules": {
                    "enable_moe_at_epoch": 2,
                    "route_temp": {"start": 1, "end": 2, "until": 2},
                }
            },
            "schedules.route_temp",
        ),
    ],
)
def test_contradictions_are_errors(profile: dict[str, Any], key: str) -> None:
    ((problem,), inactive) = check(profile)
    assert problem.key == key and problem.hint
    assert inactive == []


def test_a_run_shortened_from_the_command_line_makes_later_switches_inactive() -> None:
    profile = {"schedules": {"enable_moe_at_epoch": 4}, "training": {"max_epochs": 5}}
    problems, (inactive,) = check(profile, overrides=("training.max_epochs=1",))
    assert problems == [] and "training.max_epochs = 1" in inactive.reason


def test_schedules_are_checked_even_if_the_profile_has_other_problems() -> None:
    profile = {"model": {"d_model": "x"}, "schedules": {"enable_mo_at_epoch": 2, "route_temp": "x"}}
    ((problem,), _) = check(profile)
    assert problem.key == "schedules.enable_mo_at_epoch"
    assert check({"schedules": 3}) == ([], [])


def test_the_first_step_of_a_plugin_is_that_of_its_switch() -> None:
    horizon = Horizon(max_epochs=4, steps=StepPlan(105, seq_len=1, windows_per_step=11))
    entries = {"enable_a_at_epoch": 3, "enable_b_at_step": 7, "enable_c_at_token": 25}
    schedule = Schedule(entries, horizon=horizon)
    assert [schedule.first_step_of(name) for name in "abcd"] == [21, 7, 4, 1]
    with pytest.raises(ValueError, match="enable_a_at_epoch: the horizon must tell"):
        Schedule(entries).first_step_of("a")
