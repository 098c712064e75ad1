"""Checks schedules and the learning rate against the length of the run."""

from __future__ import annotations

from collections.abc import Iterator

from apt_core.config import Config, InactiveKey, Ramp
from apt_core.kernel import Kernel
from apt_core.optim.lr_schedules import WSDProvider
from apt_core.providers.lr_schedule import LRScheduleProvider
from apt_core.schedules import Horizon, Schedule


def check_run_length(kernel: Kernel, schedule: Schedule, lr_schedule: LRScheduleProvider) -> None:
    """Report keys that are inactive in a run of this length, and add notices about ramps and rates
    that do not reach their end.

    ``schedule`` is the kernel's with its horizon. Raises ConfigError for inactive keys under
    ``strict``.
    """
    last = schedule.horizon.last("step")
    if last is None:
        return
    kernel.add_inactive(
        [
            *_late_switches(kernel, schedule, last),
            *_unreached_min_rate(kernel.config, last, lr_schedule),
        ]
    )
    kernel.notices += _short_warmup(kernel.config, last, lr_schedule)
    kernel.notices += _cut_ramps(kernel, schedule)
    kernel.notices += _overlap(kernel.config, last, lr_schedule)


def changes_of_length(
    kernel: Kernel, before: Horizon, now: Horizon, lr_schedule: LRScheduleProvider, steps: int
) -> str:
    """What differs in the first ``steps`` steps between a run of the length ``before`` and one of
    the length ``now``, as a text; empty if these steps are the same."""
    training, totals = kernel.config.training, (before.last("step"), now.last("step"))
    if totals[0] == totals[1]:
        return ""
    for step in range(1, steps + 1):
        was, would = (
            lr_schedule.factor(step, total or 0, training.warmup_steps, training.min_lr_ratio)
            for total in totals
        )
        if was != would:
            return (
                f"the learning rate of step {step} was {was:.4g} of its peak, and would have been "
                f"{would:.4g}"
            )
    schedules = [kernel.schedule.with_horizon(horizon) for horizon in (before, now)]
    for name in kernel.schedule.annealed:
        plugin = kernel.schedule.params[name]
        # A ramp depends on the length only through its span.
        if not _takes_part(kernel, plugin) or len({s.span(name) for s in schedules}) == 1:
            continue
        for step in range(schedules[0].first_step_of(plugin), steps + 1):
            was, would = (schedule.get_param(name, step=step) for schedule in schedules)
            if was != would:
                return (
                    f"schedules.{name} was {was:.4g} in step {step}, and would have been "
                    f"{would:.4g}"
                )
    return ""


def _takes_part(kernel: Kernel, name: str) -> bool:
    """Whether this is a plugin of the run, or a source of its mixture."""
    return kernel.manager.has_plugin(name) or kernel.schedule.has_source(name)


def _late_switches(kernel: Kernel, schedule: Schedule, last: int) -> Iterator[InactiveKey]:
    """Report plugins that are scheduled to be enabled after the last step, or after they are
    disabled. (If the profile alone shows it, validation has refused it.)"""
    for boundary in schedule.boundaries():
        plugin, unit = boundary.plugin, boundary.unit
        step = schedule.horizon.first_step_from(boundary.at, unit)
        if step is None or not (boundary.enables and kernel.manager.has_plugin(plugin)):
            continue
        key = f"schedules.enable_{plugin}_at_{unit}"
        ends = schedule.last_step_of(plugin)
        if step > last:
            moment = f"{unit} {boundary.at}" + ("" if unit == "step" else f" (step {step})")
            yield InactiveKey(key, f"the run ends with step {last}, before {moment}")
        elif ends is not None and step > ends:
            yield InactiveKey(key, f"{plugin} is disabled for good from step {ends + 1} on")


def _cut_ramps(kernel: Kernel, schedule: Schedule) -> Iterator[str]:
    """Notices about ramps that do not reach their end, or have passed it, while their plugin is
    enabled."""
    for name in schedule.annealed:
        plugin, ramp = schedule.params[name], schedule.values[name]
        if not _takes_part(kernel, plugin) or not isinstance(ramp, Ramp):
            continue
        try:
            first, last = schedule.first_step_of(plugin), schedule.last_step_of(plugin)
            if last is None or first > last or ramp.start == ramp.end:
                continue
            before, after = (schedule.get_param(name, step=step) for step in (first, last))
        except ValueError:  # units cannot be converted without the data
            continue
        if before == ramp.end:
            finer = "; by: step, it would move" if ramp.by == "epoch" and first < last else ""
            yield (
                f"schedules.{name}: over as soon as {plugin} is enabled (step {first}), so that it "
                f"is {ramp.end:g} from the first{finer}"
            )
        elif after != ramp.end:
            yield (
                f"schedules.{name}: {after:.4g} in step {last}, the last one with {plugin}; the "
                f"ramp to {ramp.end:g} ends later"
            )


def _short_warmup(config: Config, last: int, schedule: LRScheduleProvider) -> Iterator[str]:
    """A notice about a warm-up that is longer than the run. (If the profile alone shows it,
    validation has refused it.)"""
    warmup, least = config.training.warmup_steps, config.training.min_lr_ratio
    if warmup < last or schedule.factor(1, last, warmup, least) >= 1.0:
        return
    reached = schedule.factor(last, last, warmup, least)
    yield (
        f"training.warmup_steps: a warm-up of {warmup} steps is not over before the last step, "
        f"{last}: the learning rate only rises, to {reached:.3g} of training.learning_rate (lower "
        f"it, or train for more than {warmup} steps)"
    )


def _unreached_min_rate(
    config: Config, last: int, schedule: LRScheduleProvider
) -> Iterator[InactiveKey]:
    """Report ``min_lr_ratio`` if the learning-rate schedule does not use it."""
    warmup, least = config.training.warmup_steps, config.training.min_lr_ratio
    if not least:
        return
    with_it, without = (schedule.factor(last, last, warmup, ratio) for ratio in (least, 0.0))
    if with_it == without:
        name = config.training.lr_schedule_name
        reason = (
            f"with lr_schedule {name} the run ends at {with_it:.3g} of the peak, whatever it is"
        )
        yield InactiveKey("training.min_lr_ratio", reason)


def _overlap(config: Config, last: int, schedule: LRScheduleProvider) -> list[str]:
    """A notice about a wsd decay that would begin within the warm-up."""
    training = config.training
    begin = last * (1 - training.decay_ratio)
    if not isinstance(schedule, WSDProvider) or not begin < training.warmup_steps < last:
        return []
    return [
        f"training.decay_ratio: {training.decay_ratio:g} of {last} steps would begin within the "
        f"warm-up of {training.warmup_steps}: the rate decays over the last "
        f"{last - training.warmup_steps} steps, and is stable in none"
    ]
