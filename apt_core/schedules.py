"""Schedules: which plugins are enabled, and what a parameter is, at a position of the run.

Everything is a pure function of the position, so nothing can be missed or repeated by a resume.
A position is given by any of ``epoch`` (from 1), ``step`` (optimizer steps of the whole run, from
1) and ``tokens`` (target tokens trained on before it, from 0). What one unit needs and another
gives is converted where the :class:`Horizon` is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from apt_core.config import Config, Ramp
from apt_core.config.schedule_check import check_schedules
from apt_core.config.switches import UNITS, Switch, Unit, read_switch

__all__ = ["FIRST", "Boundary", "Horizon", "Schedule", "check_schedules"]

FIRST: Mapping[Unit, int] = {"epoch": 1, "step": 1, "token": 0}
"""The first position of a run in each unit."""


@dataclass(frozen=True)
class Horizon:
    """How long the run is: lets positions be converted from one unit to another."""

    max_epochs: int | None = None
    steps_per_epoch: int | None = None
    tokens_per_epoch: int | None = None
    max_steps: int | None = None

    def convert(self, value: int, given: Unit, wanted: Unit) -> int | None:
        """The position in another unit (an epoch's is its first), or None where it is not known."""
        if given == wanted:
            return value
        lengths: dict[Unit, int | None] = {
            "epoch": 1,
            "step": self.steps_per_epoch,
            "token": self.tokens_per_epoch,
        }
        per_given, per_wanted = lengths[given], lengths[wanted]
        if not per_given or not per_wanted:
            return None
        return (value - FIRST[given]) * per_wanted // per_given + FIRST[wanted]

    def last(self, unit: Unit) -> int | None:
        """The last position of the run in this unit, or None where it is not known.

        ``max_steps`` does not end a ramp by epoch early: an epoch's value depends on epochs alone.
        """
        if unit == "epoch":
            return self.max_epochs
        if unit == "token" or not (self.max_epochs and self.steps_per_epoch):
            return self.max_steps if unit == "step" else None
        steps = self.max_epochs * self.steps_per_epoch
        return min(steps, self.max_steps) if self.max_steps else steps


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
    parameters count from the moment at which that plugin is enabled. Raises ConfigError for a
    mapping that is not valid.

    >>> schedule = Schedule({"enable_moe_at_epoch": 2})
    >>> [schedule.should_enable_plugin("moe", epoch=epoch) for epoch in (1, 2, 3)]
    [False, True, True]
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any],
        *,
        params: Mapping[str, str] | None = None,
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
        self.values: dict[str, int | float | Ramp] = {}
        self._switches: dict[str, list[Switch]] = {}
        for key, value in entries.items():
            switch = read_switch(key, value)
            if switch is None:
                self.values[key] = value
            else:
                self._switches.setdefault(switch.plugin, []).append(switch)

    def with_horizon(self, horizon: Horizon) -> Schedule:
        """The same schedule, once the length of the run is known."""
        scheduled = copy.copy(self)
        scheduled.horizon = replace(
            horizon,
            max_epochs=horizon.max_epochs or self.horizon.max_epochs,
            max_steps=horizon.max_steps or self.horizon.max_steps,
        )
        return scheduled

    def should_enable_plugin(
        self,
        name: str,
        *,
        epoch: int | None = None,
        step: int | None = None,
        tokens: int | None = None,
    ) -> bool:
        """Is the plugin enabled at this position? One without a schedule always is.

        Raises ValueError where the position is not given in a unit that tells.
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
        first = self._first(name, value)
        length = self._length(name, value, first)
        return _between(value, min(1.0, max(0.0, (here - first) / length)) if length > 0 else 0.0)

    def boundaries(self) -> list[Boundary]:
        """When plugins become enabled or disabled, in the order of the run.

        Positions in different units are ordered where the horizon tells, else epochs come first.
        """
        found = [
            Boundary(switch.plugin, switch.enables, switch.unit, switch.at)
            for switches in self._switches.values()
            for switch in switches
        ]
        steps = {b: self.horizon.convert(b.at, b.unit, "step") for b in found}
        comparable = None not in steps.values()

        def order(boundary: Boundary) -> tuple[int, int, int, str, bool]:
            moment = steps[boundary] if comparable else None
            unit = UNITS.index(boundary.unit)
            return (moment or 0, unit, boundary.at, boundary.plugin, boundary.enables)

        return sorted(found, key=order)

    def first_step_of(self, name: str) -> int:
        """The step from which on the plugin is enabled: the first one if it has no schedule.

        Raises ValueError where the horizon does not tell.
        """
        for switch in self._switches.get(name, ()):
            if switch.enables:
                step = self.horizon.convert(*self._moment(switch), "step")
                if step is None:
                    raise ValueError(f"schedules.{switch.key}: the horizon must tell its step")
                return step
        return FIRST["step"]

    @property
    def is_annealed(self) -> bool:
        """Does any value depend on the run's length? Then it is not to be resumed with another."""
        return any(_ends_with_run(value) for value in self.values.values())

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

    def _first(self, name: str, ramp: Ramp) -> int:
        """Where a ramp starts: when its plugin is enabled, or with the run."""
        for switch in self._switches.get(self.params.get(name, ""), ()):
            if switch.enables:
                first = self.horizon.convert(*self._moment(switch), ramp.by)
                if first is None:
                    raise ValueError(
                        f"schedules.{name} counts by {ramp.by} from {switch.key}: "
                        "the horizon must tell how long an epoch is"
                    )
                return first
        return FIRST[ramp.by]

    def _moment(self, switch: Switch) -> tuple[int, Unit]:
        """When a switch acts. A number of tokens is mostly reached within a step, so that the next
        one is the first that the plugin takes part in."""
        step = self.horizon.convert(switch.at, "token", "step") if switch.unit == "token" else None
        if step is None:
            return switch.at, switch.unit
        before = self.horizon.convert(step, "step", "token")
        return step + (before is not None and before < switch.at), "step"

    def _length(self, name: str, ramp: Ramp, first: int) -> int:
        if ramp.warmup is not None:
            return ramp.warmup
        last = ramp.until if ramp.until is not None else self.horizon.last(ramp.by)
        if last is None:
            raise ValueError(
                f"schedules.{name} ends with the run: the horizon must tell its last {ramp.by}, "
                "or the profile an `until`"
            )
        return last - first


def _ends_with_run(value: int | float | Ramp) -> bool:
    return (
        isinstance(value, Ramp)
        and value.until is None
        and value.warmup is None
        and value.start != value.end
    )


def _between(ramp: Ramp, share: float) -> float:
    """The value ``share`` (0 to 1) of the way; exact at both ends."""
    if share <= 0.0:
        return ramp.start
    if share >= 1.0:
        return ramp.end
    if ramp.shape == "exponential":
        return ramp.start * math.exp(share * math.log(ramp.end / ramp.start))
    if ramp.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return ramp.start + (ramp.end - ramp.start) * share


def _read(config: Config | Mapping[str, Any]) -> tuple[Mapping[str, Any], Horizon]:
    """The entries of the schedule, and what the profile says about the length of the run."""
    if not isinstance(config, Config):
        if not any(key in Config.model_fields for key in config):
            return Config.from_dict({"schedules": config}).schedules, Horizon()
        relevant = {key: config[key] for key in ("schedules", "training") if key in config}
        config = Config.from_dict(relevant)
    training = config.training
    return config.schedules, Horizon(training.max_epochs, max_steps=training.max_steps)
