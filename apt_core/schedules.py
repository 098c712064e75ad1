"""Schedules: the enabled plugins and the values of parameters at a position of the run.

Everything is a pure function of the position, so nothing can be missed or repeated by a resume.
A position is given by any of ``epoch`` (from 1), ``step`` (optimizer steps of the whole run, from
1) and ``tokens`` (those in the windows of the steps before it, from 0). What one unit needs and
another gives is converted where the :class:`Horizon` knows the steps of the run; no other count of
tokens is made anywhere.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from apt_core.config import Config, Ramp, parse_config
from apt_core.config.schedule_check import check_schedules
from apt_core.config.switches import UNITS, Switch, read_switch
from apt_core.types import FIRST, Unit

__all__ = ["FIRST", "Boundary", "Horizon", "Schedule", "Steps", "check_schedules"]


class Steps(Protocol):
    """The steps of a run: how many an epoch has, and the tokens that each trains on."""

    steps_per_epoch: int
    tokens_per_epoch: int

    def tokens_before(self, index: int) -> int:
        """The tokens of those steps of an epoch that come before step ``index`` (from 0)."""


@dataclass(frozen=True)
class Horizon:
    """How long the run is, and its ``steps``, by which positions are converted from one unit to
    another; None where the data is not known."""

    max_epochs: int | None = None
    max_steps: int | None = None
    steps: Steps | None = None

    @classmethod
    def of(cls, config: Config, steps: Steps) -> Horizon:
        """The horizon of a run with all its limits; ``training.max_tokens`` is converted to
        steps."""
        training = config.training
        limits = [] if training.max_steps is None else [training.max_steps]
        if training.max_tokens is not None:
            # The step that reaches them is the last.
            after = cls(steps=steps).first_step_from(training.max_tokens, "token")
            assert after is not None
            limits.append(after - 1)
        return cls(training.max_epochs, min(limits, default=None), steps)

    def convert(self, value: int, given: Unit, wanted: Unit) -> int | None:
        """The position in another unit, or None where the steps are not known.

        An epoch's is its first. A number of tokens that is reached within a step is converted as
        the beginning of that step is.
        """
        if given == wanted:
            return value
        steps = self.steps
        if steps is None:
            return None
        if given == "epoch":
            epoch, index = value, 0
        elif given == "step":
            epoch, index = divmod(value - 1, steps.steps_per_epoch)
            epoch += 1
        else:
            epoch, rest = divmod(value, steps.tokens_per_epoch)
            epoch += 1
            index = _step_at(steps, rest)
        if wanted == "epoch":
            return epoch
        if wanted == "step":
            return (epoch - 1) * steps.steps_per_epoch + index + 1
        return (epoch - 1) * steps.tokens_per_epoch + steps.tokens_before(index)

    def first_step_from(self, at: int, unit: Unit) -> int | None:
        """The first step that begins at this position or after it, or None where it is not known.
        A number of tokens is mostly reached within a step, so that it is the next one."""
        step = self.convert(at, unit, "step")
        if step is None or unit != "token":
            return step
        before = self.convert(step, "step", "token")
        return step + (before is not None and before < at)

    def last(self, unit: Unit) -> int | None:
        """The last position of the run in this unit, or None where it is not known."""
        last = self.max_steps
        if self.steps is not None and self.max_epochs:
            whole = self.max_epochs * self.steps.steps_per_epoch
            last = whole if last is None else min(whole, last)
            return self.convert(last, "step", unit)
        if unit == "epoch":
            return self.max_epochs
        return last if unit == "step" else None


def _step_at(steps: Steps, tokens: int) -> int:
    """The step of an epoch (from 0) in which the number of tokens is reached."""
    every = range(steps.steps_per_epoch)
    return bisect_right(every, tokens, key=steps.tokens_before) - 1 if tokens else 0


class Placed(Protocol):
    """Something that has a position in the run."""

    @property
    def unit(self) -> Unit: ...
    @property
    def at(self) -> int: ...


AnyPlaced = TypeVar("AnyPlaced", bound=Placed)


@dataclass(frozen=True)
class Boundary:
    """From this position on, a plugin is enabled, or disabled."""

    plugin: str
    enables: bool
    unit: Unit
    at: int


class Schedule:
    """The ``schedules`` of a profile.

    ``config`` is a :class:`~apt_core.config.Config`, a whole profile as a mapping, or only what
    stands under ``schedules``. ``params`` maps each parameter to the plugin that owns it; its
    parameters count from the moment at which that plugin is enabled. ``sources`` are the names of
    a mixture's sources, which are enabled as plugins are. Raises ConfigError for a mapping that is
    not valid.

    >>> schedule = Schedule({"enable_moe_at_epoch": 2})
    >>> [schedule.should_enable_plugin("moe", epoch=epoch) for epoch in (1, 2, 3)]
    [False, True, True]
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any],
        *,
        params: Mapping[str, str] | None = None,
        sources: Collection[str] = (),
        horizon: Horizon | None = None,
    ) -> None:
        entries, known = _read(config)
        horizon = horizon or Horizon()
        self.horizon = replace(
            horizon,
            max_epochs=horizon.max_epochs or known.max_epochs,
            max_steps=horizon.max_steps or known.max_steps,
        )
        self.params = dict(params or {})
        self._sources = frozenset(sources)
        self.values: dict[str, int | float | Ramp] = {}
        self._switches: dict[str, list[Switch]] = {}
        for key, value in entries.items():
            switch = read_switch(key, value)
            if switch is None:
                self.values[key] = value
            else:
                self._switches.setdefault(switch.plugin, []).append(switch)
        self._spans: dict[str, tuple[int, int]] = {}
        self._first_steps: dict[str, int | None] = {}

    def with_horizon(self, horizon: Horizon) -> Schedule:
        """The same schedule, once the length of the run is known.

        Where ``horizon`` has no ``max_epochs``, the profile's length limits it too.
        """
        known = self.horizon
        if horizon.max_epochs is None:
            max_steps = horizon.max_steps or known.max_steps
            horizon = replace(horizon, max_epochs=known.max_epochs, max_steps=max_steps)
        scheduled = copy.copy(self)
        scheduled.horizon = horizon
        scheduled._spans, scheduled._first_steps = {}, {}
        return scheduled

    def should_enable_plugin(
        self,
        name: str,
        *,
        epoch: int | None = None,
        step: int | None = None,
        tokens: int | None = None,
    ) -> bool:
        """Whether the plugin is enabled at this position; always true without a schedule. Raises
        ValueError if the position is not given in a unit that decides it.
        """
        enabled, disabled = True, False
        for switch in self._switches.get(name, ()):
            here = self._position(switch.unit, switch.key, epoch, step, tokens)
            if switch.enables:
                enabled = here >= switch.at
            else:
                disabled = here >= switch.at
        return enabled and not disabled

    def get_param(
        self,
        name: str,
        *,
        epoch: int | None = None,
        step: int | None = None,
        tokens: int | None = None,
        default: Any = None,
    ) -> Any:
        """The value of a parameter at this position, or ``default`` where it has no schedule.

        From the last position of its ramp on it is the ramp's end, also where that position is the
        first one or lies before it: a ramp without length is at its end.

        Raises ValueError where the position, or the length of the run, is not given in a unit
        that tells.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, Ramp):
            return value
        if value.start == value.end:
            return value.start
        here = self._position(value.by, name, epoch, step, tokens)
        first, last = self.span(name)
        if here >= last:
            return value.end
        return value.start if here <= first else _between(value, (here - first) / (last - first))

    def span(self, name: str) -> tuple[int, int]:
        """The first and the last position of the ramp ``name`` in its own unit; the last one may
        come before the first. Raises ValueError where the horizon does not tell."""
        if name not in self._spans:
            ramp = self.values[name]
            assert isinstance(ramp, Ramp)
            first = self._first(name, ramp)
            self._spans[name] = first, self._last(name, ramp, first)
        return self._spans[name]

    def has_source(self, name: str) -> bool:
        """Whether this is a source of the run's mixture."""
        return name in self._sources

    def switches_of(self, name: str) -> Sequence[Switch]:
        """The switches of a plugin, or of a source of a mixture."""
        return self._switches.get(name, ())

    def boundaries(self) -> list[Boundary]:
        """When plugins become enabled or disabled, in the order of the run
        (:meth:`in_order`)."""
        found = [
            Boundary(switch.plugin, switch.enables, switch.unit, switch.at)
            for name, switches in self._switches.items()
            for switch in switches
            if name not in self._sources
        ]
        return self.in_order(sorted(found, key=lambda found: (found.plugin, found.enables)))

    def in_order(self, placed: Sequence[AnyPlaced]) -> list[AnyPlaced]:
        """``placed`` by position; what stands at the same one keeps its order. Positions in
        different units are ordered where the horizon tells, else epochs come first."""
        steps = [self.horizon.first_step_from(each.at, each.unit) for each in placed]
        comparable = None not in steps

        def order(numbered: tuple[int, AnyPlaced]) -> tuple[int, int, int]:
            number, each = numbered
            moment = steps[number] if comparable else None
            return moment or 0, UNITS.index(each.unit), each.at

        return [each for _, each in sorted(enumerate(placed), key=order)]

    def is_reached(self, placed: Placed, *, epoch: int, step: int, tokens: int) -> bool:
        """Whether the run has come to where something is placed."""
        name = f"{placed.unit} {placed.at}"
        return self._position(placed.unit, name, epoch, step, tokens) >= placed.at

    def first_step_of(self, name: str) -> int:
        """The step from which on the plugin is enabled: the first one if it has no schedule.

        Raises ValueError where the horizon does not tell.
        """
        switch = self._enabling(name)
        if switch is None:
            return FIRST["step"]
        step = self._first_step(switch)
        if step is None:
            raise ValueError(f"schedules.{switch.key}: the horizon must tell its step")
        return step

    def last_step_of(self, name: str) -> int | None:
        """The last step in which the plugin is enabled, if the run comes to it: that of the run, or
        the one before it is disabled. None where the horizon does not tell."""
        last = self.horizon.last("step")
        for switch in self._switches.get(name, ()):
            if not switch.enables:
                step = self._first_step(switch)
                if step is None or last is None:
                    return None
                last = min(last, step - 1)
        return last

    @property
    def annealed(self) -> list[str]:
        """The parameters of active plugins whose values move."""
        return [
            n for n, value in self.values.items() if isinstance(value, Ramp) and n in self.params
        ]

    def _position(
        self, unit: Unit, name: str, epoch: int | None, step: int | None, tokens: int | None
    ) -> int:
        given: tuple[tuple[Unit, int | None], ...] = (
            ("token", tokens),
            ("step", step),
            ("epoch", epoch),
        )
        # The unit itself first, then the finest one that can be converted.
        for other, value in sorted(given, key=lambda pair: pair[0] != unit):
            if value is not None:
                here = self.horizon.convert(value, other, unit)
                if here is not None:
                    return here
        argument = "tokens" if unit == "token" else unit
        raise ValueError(f"schedules.{name} counts by {unit}: give {argument}=")

    def _enabling(self, plugin: str) -> Switch | None:
        """The switch that enables the plugin; None if it is enabled from the start."""
        return next((s for s in self._switches.get(plugin, ()) if s.enables), None)

    def _first_step(self, switch: Switch) -> int | None:
        if switch.key not in self._first_steps:
            step = self.horizon.first_step_from(switch.at, switch.unit)
            self._first_steps[switch.key] = step
        return self._first_steps[switch.key]

    def _first(self, name: str, ramp: Ramp) -> int:
        """Where a ramp starts: when its plugin is enabled, or with the run."""
        switch = self._enabling(self.params.get(name, ""))
        if switch is None:
            return FIRST[ramp.by]
        step = self._first_step(switch)
        first = None if step is None else self.horizon.convert(step, "step", ramp.by)
        if first is None and switch.unit == ramp.by:
            first = switch.at
        if first is None:
            raise ValueError(
                f"schedules.{name} counts by {ramp.by} from {switch.key}: "
                "the horizon must tell the steps of an epoch"
            )
        return first

    def _last(self, name: str, ramp: Ramp, first: int) -> int:
        if ramp.warmup is not None:
            return first + ramp.warmup
        last = ramp.until if ramp.until is not None else self.horizon.last(ramp.by)
        if last is None:
            raise ValueError(
                f"schedules.{name} ends with the run: the horizon must tell its last {ramp.by}, "
                "or the profile an `until`"
            )
        return last


def _between(ramp: Ramp, share: float) -> float:
    """The value ``share`` of the way, 0 < share < 1."""
    start, end = ramp.start, ramp.end
    if ramp.shape == "exponential":
        # In logarithms: the quotient of the ends may overflow.
        logs = math.log(abs(start)), math.log(abs(end))
        value = math.copysign(math.exp(logs[0] + (logs[1] - logs[0]) * share), start)
    elif ramp.shape == "cosine":
        value = start + (end - start) * (1 - math.cos(math.pi * share)) / 2
    else:
        value = start + (end - start) * share
    return min(max(value, min(start, end)), max(start, end))  # rounding may pass the end


def _read(config: Config | Mapping[str, Any]) -> tuple[Mapping[str, Any], Horizon]:
    """The entries of the schedule, and what the profile says about the length of the run."""
    if not isinstance(config, Config):
        if not any(key in Config.model_fields for key in config):
            return parse_config({"schedules": config}).schedules, Horizon()
        relevant = {key: config[key] for key in ("schedules", "training") if key in config}
        config = parse_config(relevant)
    training = config.training
    return config.schedules, Horizon(training.max_epochs, training.max_steps)
