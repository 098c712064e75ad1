"""What a run's length makes of its schedules and learning rate is told, by runs and by plans."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core import SectionSpec, hookimpl
from apt_core.data.order import StepPlan
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot
from apt_core.planning.plan import make_plan
from apt_core.planning.run_length import check_run_length
from apt_core.plugin_manager import PluginManager
from apt_core.schedules import Horizon
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_core.testing.tiny import TEXT

QUIET = {
    "training.log_every_steps": 1,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}
STEPS = StepPlan(26, seq_len=4, windows_per_step=3)
"""Nine steps an epoch, of 12 tokens but for the last one (8)."""


class Gentle:
    """Declares the parameter ``pull``, and reports what it is."""

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec(schedule_params=("pull",))]

    @hookimpl
    def apt_metrics(self, trainer: Any) -> dict[str, float]:
        return {"pull": trainer.param("pull")}


def kernel_of(
    schedules: dict[str, Any] | None = None, *, strict: bool = False, **training: Any
) -> Kernel:
    manager = PluginManager()
    manager.register(Gentle(), name="gentle")
    profile = {
        **TINY_PROFILE,
        "training": {**TINY_PROFILE["training"], **training},
        "schedules": schedules or {},
    }
    return boot(profile, manager=manager, strict=strict)


def told(
    schedules: dict[str, Any] | None = None, *, strict: bool = False, **training: Any
) -> tuple[list[str], dict[str, str]]:
    """Notices, and inactive keys with their reasons, of a run over ``STEPS``."""
    kernel = kernel_of(schedules, strict=strict, **training)
    lr_schedule = kernel.registry.get("lr_schedule", kernel.config.training.lr_schedule_name)
    schedule = kernel.schedule.with_horizon(Horizon.of(kernel.config, STEPS))
    check_run_length(kernel, schedule, lr_schedule)
    return kernel.notices, {item.key: item.reason for item in kernel.inactive}


def test_max_tokens_is_the_step_that_reaches_them():
    before = [STEPS.tokens_before(index) for index in range(10)]
    before += [104 + STEPS.tokens_before(index) for index in range(1, 10)]
    for tokens in range(1, 209):
        last = Horizon.of(kernel_of(max_tokens=tokens).config, STEPS).last("step")
        assert before[last - 1] < tokens <= before[last]


RAMP = {"start": 0, "end": 1}


@pytest.mark.parametrize(
    ("schedules", "training", "words"),
    [
        ({"pull": RAMP}, {"max_epochs": 1}, ["over as soon as gentle", "is 1", "by: step"]),
        ({"pull": RAMP}, {"max_steps": 9}, ["over as soon as gentle", "is 1"]),
        ({"pull": {**RAMP, "until": 1}}, {}, ["over as soon as gentle"]),
        (
            {"pull": {**RAMP, "by": "step", "until": 5}, "enable_gentle_at_epoch": 2},
            {},
            ["over as soon as gentle is enabled (step 10)"],
        ),
        ({"pull": {**RAMP, "by": "step"}, "enable_gentle_at_token": 195}, {}, ["(step 18)"]),
        ({"pull": {**RAMP, "until": 9}}, {}, ["0.125 in step 18", "ends later"]),
        ({"pull": {**RAMP, "warmup": 3}}, {"max_epochs": 1}, ["0 in step 9", "ends later"]),
        (
            {"pull": {**RAMP, "by": "step"}, "disable_gentle_at_epoch": 2},
            {},
            ["in step 9, the last one with gentle"],
        ),
        ({"pull": {**RAMP, "by": "token", "until": 202}}, {}, ["step 18", "ends later"]),
    ],
)
def test_a_ramp_that_does_not_take_its_course_is_told(schedules, training, words):
    notices, inactive = told(schedules, **training)
    (notice,) = [text for text in notices if text.startswith("schedules.pull: ")]
    assert all(word in notice for word in words), notice
    assert not inactive
    # It is no mistake: a longer run may follow.
    assert told(schedules, strict=True, **training)[0] == notices


@pytest.mark.parametrize(
    "schedules",
    [
        {"pull": RAMP},
        {"pull": {**RAMP, "by": "step"}, "enable_gentle_at_step": 17},
        {"pull": {**RAMP, "by": "step", "warmup": 17}},
        {"pull": {**RAMP, "by": "token", "until": 196}},
        {"pull": {**RAMP, "until": 2}, "enable_gentle_at_token": 90},
        {"pull": {"start": 1, "end": 1}},
        # Steps that begin after so many tokens, by their exact count and by no mean.
        {"enable_gentle_at_token": 196},
        {"enable_gentle_at_epoch": 2, "disable_gentle_at_step": 11},
    ],
)
def test_what_takes_its_course_is_not_told_of(schedules):
    assert told(schedules, strict=True) == ([], {})


@pytest.mark.parametrize(
    ("schedules", "reason"),
    [
        ({"enable_gentle_at_token": 201}, "the run ends with step 18, before token 201 (step 19)"),
        (
            {"enable_gentle_at_epoch": 2, "disable_gentle_at_step": 10},
            "gentle is disabled for good from step 10 on",
        ),
    ],
)
def test_a_plugin_that_is_never_enabled_is_inactive(schedules, reason):
    ((key, said),) = told(schedules)[1].items()
    assert key.startswith("schedules.enable_gentle_at_") and said == reason
    with pytest.raises(ConfigError, match=key):
        told(schedules, strict=True)


@pytest.mark.parametrize(
    "length", [{"max_epochs": 1}, {"max_tokens": 97}, {"max_tokens": 102, "max_epochs": 3}]
)
def test_a_warm_up_that_outlasts_the_run_is_told(length):
    (notice,), inactive = told(warmup_steps=20, **length)
    assert notice.startswith("training.warmup_steps: ") and "only rises, to 0.45 of" in notice
    assert "more than 20 steps" in notice and not inactive
    assert told(warmup_steps=8, strict=True, **length) == ([], {})
    assert "to 1 of" in told(warmup_steps=9, **length)[0][0]


def test_a_decay_that_would_begin_within_the_warm_up_is_told():
    (notice,), _ = told(warmup_steps=6, lr_schedule_name="wsd", decay_ratio=0.75)
    assert notice.startswith("training.decay_ratio: ") and "over the last 12 steps" in notice
    assert not told(warmup_steps=4, lr_schedule_name="wsd", decay_ratio=0.75)[0]
    assert not told(warmup_steps=6, lr_schedule_name="cosine")[0]


@pytest.mark.parametrize(
    "training",
    [{"lr_schedule_name": "constant"}, {"lr_schedule_name": "wsd", "decay_ratio": 0.0}],
)
def test_a_final_rate_that_is_never_reached_is_inactive(training):
    _, inactive = told(min_lr_ratio=0.1, **training)
    assert "training.min_lr_ratio" in inactive
    assert not told(min_lr_ratio=0.1)[1] and not told(**training)[1]


def test_a_run_and_its_plan_tell_the_same_and_values_are_those_of_the_steps(tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    schedules = {
        "pull": {"start": 0, "end": 1, "by": "token", "until": 1500},
        "enable_gentle_at_token": 770,
    }
    training = {"max_tokens": 1300, "warmup_steps": 40, "log_every_steps": 1}
    profile = {
        **TINY_PROFILE,
        "schedules": schedules,
        "training": {**TINY_PROFILE["training"], **training},
        "evaluation": {"eval_freq": 0, "sample_tokens": 0},
        "data": {"train_path": str(text)},
    }
    run = tiny_run(Gentle(), profile=profile, strict=False)
    rows = [row for row in run.metrics if "loss" in row]
    before = [0, *(row["tokens"] for row in rows)]
    pulls = [row.get("gentle/pull") for row in rows]
    first = next(tokens for tokens in before if tokens >= 770)
    assert pulls == [
        (tokens - first) / (1500 - first) if tokens >= first else None for tokens in before[:-1]
    ]
    manager = PluginManager()
    manager.register(Gentle(), name="gentle")
    plan = make_plan(boot(profile, manager=manager), world_size=1)
    assert [stage["name"] for stage in plan["stages"]] == ["start", "enable gentle"]
    said = [text for text in plan["notices"] if text.startswith(("schedules.", "training."))]
    assert len(said) == 2 and set(said) <= set(caplog.messages)
