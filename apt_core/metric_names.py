"""Names in rows of metrics: which are the core's own, and how those of plugins begin."""

from __future__ import annotations

CROSS_ENTROPY = "loss/cross_entropy"
"""The loss without the terms of plugins, which is what the held-out loss compares with. The name of
a term has a dot, so that none is called this."""

LOSS, LR, MEMORY, PLUGIN = "loss", "lr", "memory", "plugin"
SCHEDULE, TASK, TIME = "schedule", "task", "time"

OWN_GROUPS = frozenset({LOSS, LR, MEMORY, PLUGIN, SCHEDULE, TASK, TIME})
"""What stands before the first slash in names that the core makes; a plugin may be called so."""


def of_term(plugin: str, term: str) -> str:
    """A loss term of a plugin; no plugin's name has a dot.

    >>> of_term("moe", "balance")
    'loss/moe.balance'
    """
    return f"{LOSS}/{plugin}.{term}"


def of_plugin(plugin: str, name: str) -> str:
    """What ``apt_metrics`` of a plugin calls ``name``. One that is called as metrics of the core
    are, or has a slash in its name, stands behind ``plugin/``.

    >>> of_plugin("moe", "drop_rate"), of_plugin("time", "data_ms")
    ('moe/drop_rate', 'plugin/time/data_ms')
    """
    group = f"{PLUGIN}/{plugin}" if plugin in OWN_GROUPS or "/" in plugin else plugin
    return f"{group}/{name}"


def of_rate(ratio: float, *, matrices: bool = False) -> str:
    """The learning rate of the groups whose peak is ``ratio`` times the profile's; of hidden
    matrices whose rate is the optimizer's own, times the largest of theirs.

    >>> of_rate(0.25), of_rate(1.0, matrices=True), of_rate(0.5, matrices=True)
    ('lr/x0.25', 'lr/matrices', 'lr/matrices_x0.5')
    """
    if not matrices:
        return f"{LR}/x{ratio:.4g}"
    return f"{LR}/matrices" if ratio == 1 else f"{LR}/matrices_x{ratio:.4g}"


def of_memory(part: str) -> str:
    """What a part of a run takes of memory, in MiB."""
    return f"{MEMORY}/{part}_mb"


def of_parameter(name: str) -> str:
    """The value of a scheduled parameter."""
    return f"{SCHEDULE}/{name}"


def of_task(task: str, metric: str) -> str:
    """A metric of a task on which the model is scored while it is trained.

    >>> of_task("arithmetic", "number_match")
    'task/arithmetic/number_match'
    """
    return f"{TASK}/{task}/{metric}"


def of_time(*parts: str) -> str:
    """Milliseconds of a part of a step, or of what a plugin takes of one.

    >>> of_time("hooks"), of_time("hooks", "moe")
    ('time/hooks_ms', 'time/hooks/moe_ms')
    """
    return f"{TIME}/{'/'.join(parts)}_ms"
