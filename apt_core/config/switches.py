"""``enable_PLUGIN_at_epoch: N`` and its relatives, as keys of the section ``schedules``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from apt_core.plugin_names import normalized_name
from apt_core.types import FIRST, Unit

UNITS: tuple[Unit, ...] = tuple(FIRST)

_SWITCH = re.compile(r"(enable|disable)_(.+)_at_(epoch|step|token)", re.DOTALL)


@dataclass(frozen=True)
class Switch:
    """A plugin, by its normalised name, is enabled or disabled at every position from ``at`` on."""

    key: str
    plugin: str
    enables: bool
    unit: Unit
    at: int


def looks_like_switch(key: str) -> bool:
    """Whether this is the name of a switch, well formed or not; no parameter begins like one."""
    return key.startswith(("enable_", "disable_"))


def read_switch(key: str, value: Any) -> Switch | None:
    """The switch that an entry of ``schedules`` is, or None."""
    match = _SWITCH.fullmatch(key)
    if match is None:
        return None
    unit = next(unit for unit in UNITS if unit == match[3])
    return Switch(key, normalized_name(match[2]), match[1] == "enable", unit, value)
