"""The weights of a mixture over a run: constants, scheduled parameters and switches.

The source NAME of ``data.mixture`` has the weight ``schedules.mixture_NAME`` where there is such an
entry, else its ``weight``; before ``enable_NAME_at_…`` and from ``disable_NAME_at_…`` on it has
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from apt_core.data.order import Segment
from apt_core.errors import ConfigError, Problem
from apt_core.providers.dataset import MixtureItem, mixture_param
from apt_core.schedules import FIRST, Schedule
from apt_core.sections import Ramp

PIECES = 1024
"""The most parts into which a ramp of weights is cut; in each the weights are constant."""


def mixture_segments(schedule: Schedule, items: Sequence[MixtureItem]) -> list[Segment]:
    """The weights of ``items`` from the first step on, with every step in which they change.

    ``schedule`` knows the length of the run. Raises ConfigError for weights that are negative or
    all zero.
    """
    last = schedule.horizon.last("step")
    changes = {FIRST["step"]}
    for item in items:
        changes.update(_changes(schedule, item))
    found: list[Segment] = []
    for step in sorted(changes):
        if last is not None and not FIRST["step"] <= step <= last:
            continue
        weights = tuple(_weight(schedule, item, step) for item in items)
        if not found or weights != found[-1].weights:
            found.append(Segment(step, weights))
    for segment in found:
        _check(segment, items)
    return found


def _weight(schedule: Schedule, item: MixtureItem, step: int) -> float:
    if not schedule.should_enable_plugin(item.name, step=step):
        return 0.0
    return float(schedule.get_param(mixture_param(item.name), step=step, default=item.weight))


def _changes(schedule: Schedule, item: MixtureItem) -> Iterator[int]:
    """The steps in which the weight of ``item`` may change."""
    horizon, name = schedule.horizon, mixture_param(item.name)
    for switch in schedule.switches_of(item.name):
        if (step := horizon.first_step_from(switch.at, switch.unit)) is not None:
            yield step
    ramp = schedule.values.get(name)
    if not isinstance(ramp, Ramp) or ramp.start == ramp.end:
        return
    first, last = schedule.span(name)
    if ramp.by == "epoch":
        places = range(first, last + 1)
        yield from filter(None, (horizon.first_step_from(epoch, "epoch") for epoch in places))
        return
    begin = horizon.first_step_from(first, ramp.by)
    end = horizon.first_step_from(last, ramp.by)
    if begin is not None and end is not None:
        yield from range(begin, end, max(1, -(-(end - begin) // PIECES)))
        yield end


def _check(segment: Segment, items: Sequence[MixtureItem]) -> None:
    negative = [i.name for i, w in zip(items, segment.weights, strict=True) if w < 0]
    if negative:
        raise ConfigError(
            Problem(
                f"the weight of {negative[0]} is negative from step {segment.first_step} on",
                key=f"schedules.{mixture_param(negative[0])}",
                hint="end the ramp at 0",
            )
        )
    if not sum(segment.weights):
        raise ConfigError(
            Problem(
                f"all weights are 0 from step {segment.first_step} on: nothing can be drawn",
                key="data.mixture",
                hint="give one of the sources a weight there",
            )
        )
