"""Checks ``schedules`` against the plugins and the length of the run.

Shapes and types are checked by :func:`apt_core.config.validate`; this needs to know the plugins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from apt_core.config.schema import Config
from apt_core.config.source import InactiveKey, Source
from apt_core.config.switches import Switch, Unit, looks_like_switch, read_switch
from apt_core.errors import Problem, did_you_mean


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
        length_key = LENGTH_KEYS[switch.unit]
        length = self.number(length_key)
        if length is None or not isinstance(switch.at, int):
            return
        # Epochs and steps count from 1; the last step begins before all of the tokens are seen.
        if switch.at < length or (switch.at == length and switch.unit != "token"):
            return
        message = f"{switch.unit} {switch.at} comes after the last one ({length_key} = {length})"
        if self.source.where(length_key).startswith("--"):
            self.ignore(switch.key, message)
        else:
            self.problem(message, switch.key, f"lower it, or raise {length_key}")

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

    def number(self, key: str) -> int | None:
        section, name = key.split(".")
        if self.config is not None:
            value = getattr(self.config.section(section), name)
        else:
            value = self.source.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def problem(self, message: str, key: str, hint: str) -> None:
        path = ("schedules", key)
        self.problems.append(Problem(message, f"schedules.{key}", self.source.where(path), hint))

    def ignore(self, key: str, reason: str, *, unclaimed: bool = False) -> None:
        self.inactive.append(InactiveKey(f"schedules.{key}", reason, unclaimed))
