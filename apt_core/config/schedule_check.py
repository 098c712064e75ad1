"""Checks ``schedules`` against the plugins and the length of the run.

Shapes and types are checked by :func:`apt_core.config.validate`; this needs to know the plugins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apt_core.config.schema import Config
from apt_core.config.source import InactiveKey, Source
from apt_core.config.switches import Switch, looks_like_switch, read_switch
from apt_core.errors import Problem, did_you_mean
from apt_core.types import TrainableStage, Unit


def check_schedules(
    config: Config | None,
    source: Source,
    *,
    plugins: Collection[str],
    params: Mapping[str, str],
    blocked: Mapping[str, str],
    lenient: bool = False,
    permanent: Collection[str] = (),
) -> tuple[list[Problem], list[InactiveKey]]:
    """Problems, and keys that do nothing.

    ``plugins`` are the active ones, ``params`` maps each declared parameter to its plugin,
    ``blocked`` maps plugins that were left out (and parameters of theirs) to the reason. With
    ``lenient``, one of those could not be asked what it declares, so that an undeclared parameter
    may be its. ``permanent`` are plugins that change the structure of the model, which cannot be
    taken back. ``config`` may be None where the profile has other problems.
    """
    entries = source.get("schedules")
    if not isinstance(entries, dict):
        return [], []
    check = _Check(config, source, plugins, params, blocked, lenient, permanent)
    switches = {
        key: switch for key, value in entries.items() if (switch := read_switch(key, value))
    }
    for key, value in entries.items():
        if key in switches:
            check.switch(switches[key])
        elif not looks_like_switch(key):
            check.parameter(key, value, list(switches.values()))
    return check.problems, check.inactive


LENGTH_KEYS: Mapping[Unit, str] = {
    "epoch": "training.max_epochs",
    "step": "training.max_steps",
    "token": "training.max_tokens",
}
"""What ends the run, by unit."""


def beyond_the_end(unit: Unit, at: int, config: Config | None, source: Source) -> tuple[str, bool]:
    """A message where the position comes after the end of the run, as far as the profile alone
    tells, or ""; and whether the command line has chosen that end."""
    key = LENGTH_KEYS[unit]
    section, name = key.split(".")
    length: Any = source.get(key) if config is None else getattr(config.section(section), name)
    if not isinstance(length, int) or isinstance(length, bool):
        return "", False
    # Epochs and steps count from 1; the last step begins before all of the tokens are seen.
    if at < length or (at == length and unit != "token"):
        return "", False
    message = f"{unit} {at} comes after the last one ({key} = {length})"
    return message, source.where(key).startswith("--")


def check_stages(
    config: Config, source: Source, plugin: str, stages: Sequence[TrainableStage]
) -> tuple[list[Problem], list[InactiveKey]]:
    """Problems of the ``stages`` of a plugin that are seen without a model, and those that do
    nothing."""
    problems, inactive = [], []
    last: dict[Unit, int] = {}
    for stage in stages:
        key = stage.key or f"plugin {plugin}"
        where = source.where(stage.key) if stage.key else ""
        message, chosen = beyond_the_end(stage.unit, stage.at, config, source)
        if message and chosen:
            inactive.append(InactiveKey(key, message))
        elif message:
            hint = f"lower it, or raise {LENGTH_KEYS[stage.unit]}"
            problems.append(Problem(message, key, where, hint))
        before = last.get(stage.unit)
        if before is not None and stage.at <= before:
            at = f"{stage.unit} {stage.at}"
            order = f"{at} does not come after {stage.unit} {before}, where the stage before begins"
            problems.append(Problem(order, key, where, "put stages in the order of the run"))
        last[stage.unit] = stage.at
    return problems, inactive


@dataclass
class _Check:
    config: Config | None
    source: Source
    plugins: Collection[str]
    params: Mapping[str, str]
    blocked: Mapping[str, str]
    lenient: bool
    permanent: Collection[str]
    problems: list[Problem] = field(default_factory=list)
    inactive: list[InactiveKey] = field(default_factory=list)

    def switch(self, switch: Switch) -> None:
        if switch.plugin in self.blocked:
            self.ignore(switch.key, self.blocked[switch.plugin])
            return
        if switch.plugin not in self.plugins:
            hint = did_you_mean(switch.plugin, self.plugins)
            add = f"add {switch.plugin} to plugins, or take this key out"
            self.problem(f"no plugin {switch.plugin!r} is active", switch.key, hint or add)
            return
        if self.source.get(("model", switch.plugin, "enabled")) is False:
            self.problem(
                f"contradicts model.{switch.plugin}.enabled: false",
                switch.key,
                f"set model.{switch.plugin}.enabled to true (it then means: from that moment), or "
                "take this key out",
            )
        if not switch.enables and switch.plugin in self.permanent:
            self.problem(
                f"{switch.plugin} changes the structure of the model, which cannot be taken back",
                switch.key,
                f"take this key out, or leave the plugin out: --plugin no:{switch.plugin}",
            )
        self.within_run(switch)

    def within_run(self, switch: Switch) -> None:
        """A switch after the end never acts. Shortening a run from the command line, to try
        something, is no mistake, so that it only makes the switch inactive."""
        at: Any = switch.at  # as it is written
        if not isinstance(at, int):
            return
        message, chosen = beyond_the_end(switch.unit, at, self.config, self.source)
        if message and chosen:
            self.ignore(switch.key, message)
        elif message:
            self.problem(message, switch.key, f"lower it, or raise {LENGTH_KEYS[switch.unit]}")

    def parameter(self, key: str, value: Any, switches: list[Switch]) -> None:
        owner = self.params.get(key, "")
        reason = self.blocked.get(owner) or self.blocked.get(key)
        if key not in self.params or owner in self.blocked:
            if reason is not None:
                self.ignore(key, reason)
            elif self.lenient:
                reason = "no active plugin declares it; one that is blocked or broken may"
                self.ignore(key, reason, unclaimed=True)
            else:
                known = sorted(self.params)
                listed = f"declared are: {', '.join(known)}" if known else "no plugin declares any"
                self.problem(
                    "no active plugin declares this parameter",
                    key,
                    did_you_mean(key, known) or listed,
                )
            return
        if not isinstance(value, dict) or not isinstance(until := value.get("until"), int):
            return
        for switch in switches:
            same_unit = switch.unit == value.get("by", "epoch")
            if switch.enables and switch.plugin == owner and same_unit and until <= switch.at:
                self.problem(
                    f"ends at {switch.unit} {until}, and {owner} is enabled at {switch.at} only",
                    key,
                    "raise until: it counts from the start of the run",
                )

    def problem(self, message: str, key: str, hint: str) -> None:
        path = ("schedules", key)
        self.problems.append(Problem(message, f"schedules.{key}", self.source.where(path), hint))

    def ignore(self, key: str, reason: str, *, unclaimed: bool = False) -> None:
        self.inactive.append(InactiveKey(f"schedules.{key}", reason, unclaimed))
