"""Names in rows of metrics: which are the core's own, and how those of plugins begin."""

from __future__ import annotations

CROSS_ENTROPY = "loss/cross_entropy"
"""The loss without the terms of plugins, which is what the held-out loss compares with. The name of
a term has a dot, so that none is called this."""

LOSS, MEMORY, SCHEDULE, TIME = "loss", "memory", "schedule", "time"

OWN_GROUPS = frozenset({LOSS, MEMORY, SCHEDULE, TIME})
"""What stands before the first slash in names of the core."""


def of_term(plugin: str, term: str) -> str:
    """A loss term of a plugin; no plugin's name has a dot.

    >>> of_term("moe", "balance")
    'loss/moe.balance'
    """
    return f"{LOSS}/{plugin}.{term}"


def of_plugin(plugin: str, name: str) -> str:
    """What ``apt_metrics`` of a plugin calls ``name``."""
    return f"{plugin}/{name}"


def of_memory(part: str) -> str:
    """What a part of a run takes of memory, in MiB."""
    return f"{MEMORY}/{part}_mb"


def of_parameter(name: str) -> str:
    """The value of a scheduled parameter."""
    return f"{SCHEDULE}/{name}"


def of_time(*parts: str) -> str:
    """Milliseconds of a part of a step, or of what a plugin takes of one.

    >>> of_time("hooks"), of_time("hooks", "moe")
    ('time/hooks_ms', 'time/hooks/moe_ms')
    """
    return f"{TIME}/{'/'.join(parts)}_ms"


def why_not(plugin: str) -> str:
    """Why metrics of a plugin of this name could be taken for others, or an empty string."""
    if plugin in OWN_GROUPS:
        return f"metrics of this plugin would be called {plugin}/…, as the core's own are"
    if "/" in plugin:
        return "metrics of this plugin would be called as those of another: its name has a slash"
    return ""
