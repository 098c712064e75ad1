"""``hookimpl`` and ``hookspec``: how hooks are marked, ordered, and what is decided by hook."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import GeneratorType
from typing import Any, TypeVar, overload

PROJECT = "apt"

F = TypeVar("F", bound=Callable[..., Any])

Returns = Callable[[Any, Mapping[str, Any]], Any]
"""From what an implementation returned, and the arguments of the call, to plain and checked types;
what it raises is a failure of the implementation. None stands for no result."""


def ignored(value: Any, arguments: Mapping[str, Any]) -> None:
    """no result: what is returned is not looked at"""
    if isinstance(value, GeneratorType):
        deque(value, maxlen=0)  # a hook that yields has not run before


class Priority(IntEnum):
    """Where an implementation stands among the others of its hook: lower runs earlier."""

    FIRST = 0
    EARLY = 25
    NORMAL = 50
    LATE = 75
    LAST = 100


@overload
def hookimpl(function: F) -> F: ...
@overload
def hookimpl(
    *,
    priority: int = ...,
    wrapper: bool = ...,
    specname: str | None = ...,
    collective: bool = ...,
    background: bool = ...,
) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None,
    *,
    priority: int = Priority.NORMAL,
    wrapper: bool = False,
    specname: str | None = None,
    collective: bool = False,
    background: bool = False,
) -> F | Callable[[F], F]:
    """Mark a function as the implementation of the hook that it is named after.

    ``priority`` is 0 to 100, lower runs earlier; ties break by plugin name. A ``wrapper`` is a
    generator that yields once, receives the inner result from the ``yield`` and returns the
    result to pass on (returning nothing passes the inner one on). ``specname`` implements a hook
    of another name than the function's. A ``collective`` implementation has a part to do in every
    process of a run: it communicates with the others, or changes what must stay the same in all.
    Where there are several, its failure in one ends the run. One in the ``background`` only
    reports: it runs beside the loop, on a thread of the plugin's own, after the call has returned.
    A plugin's calls keep their order; the hook's policy says which take that, and which parameters.

    >>> @hookimpl(priority=Priority.EARLY)
    ... def on_step_end(step, loss):
    ...     pass

    Raises ValueError for a priority outside 0 to 100.
    """
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 100:
        raise ValueError(f"hookimpl priority must be an integer from 0 to 100, not {priority!r}")

    def mark(func: F) -> F:
        options = {
            "wrapper": wrapper,
            "specname": specname,
            "priority": int(priority),
            "collective": collective,
            "background": background,
        }
        # Under @staticmethod and @classmethod it is the function that the manager looks at.
        setattr(getattr(func, "__func__", func), f"{PROJECT}_impl", options)
        return func

    return mark if function is None else mark(function)


class Stage(Enum):
    """When in the life of a run a hook is called."""

    LOADING = "while the plugin is loaded: one that fails is broken, and bad input unless isolated"
    BUILDING = "while the profile is checked, and whenever parts of the run are built"
    RUN = "in the run, outside of its steps"
    STEP = "in every step"
    MICRO_BATCH = "in every step, for each of its micro-batches"
    ENDING = "once the steps are over: StopTraining ends only what calls it"


def _told(sentence: str) -> Any:
    """A field of a policy, False by default; ``sentence`` says in the reference what True means."""
    return field(default=False, metadata={"told": sentence})


@dataclass(frozen=True, kw_only=True)
class HookPolicy:
    """What is decided by hook. It marks the function that specifies the hook.

    Everything that treats one hook unlike another reads it here: the manager, the commands, the
    checks of plugins, the reference of hooks, the fault matrix of the tests.
    """

    stage: Stage

    returns: Returns = ignored
    """Makes plain types of what an implementation returned, inside the guard."""

    copies: tuple[str, ...] = ()
    """Parameters, lists and mappings, of which each implementation gets its own."""

    failure_limit: int = 3
    """Failures in this hook at which a plugin is quarantined."""

    firstresult: bool = False
    """Whether the first result that is not None is the only one (pluggy's name)."""

    chained: bool = False
    """Whether each implementation gets the request as the previous one returned it."""

    dormant: bool = False
    """Whether it is called for a dormant plugin too."""

    background: tuple[str, ...] = ()
    """Parameters that an implementation in the background may take: nothing changes in them after
    the call. Empty: there are none of this hook."""

    alone: bool = _told("It is called for one plugin at a time: there are no wrappers of it.")
    """Whether it is called for one plugin at a time, so that a wrapper has nothing to wrap."""

    changes_weights: bool = _told("What it returns is part of the training.")
    """Whether its result is part of the training; an observer cannot implement it."""

    edits_gradients: bool = _told("It may edit gradients in place.")
    """Whether its changes of gradients are part of the training."""

    judges_input: bool = _told("A ConfigError is bad input.")
    """Whether a ConfigError is bad input (exit code 2) instead of a failure of the plugin."""

    fatal_among_processes: bool = _told("A failure ends a run of several processes.")
    """Whether a failure in one process would make the processes diverge."""

    may_last: bool = _told(
        "It may take longer than `training.hook_timeout`: that is told, and no failure."
    )
    """Whether an implementation that takes longer than ``training.hook_timeout`` is only
    reported."""

    sets_modes: bool = _told("Modes of modules that it sets are kept.")
    """Whether it may set the training mode of parts of the model; modes left changed by other hooks
    are put back."""

    permanent: bool = _told("A schedule cannot disable a plugin that implements it.")
    """Whether its effect stays when the plugin is disabled."""

    replayed: bool = _told("A step that a resume takes again calls it again.")
    """Whether a resume from the middle of a step calls it again for that step."""

    @property
    def in_step(self) -> bool:
        """Whether it is called within every step."""
        return self.stage in (Stage.STEP, Stage.MICRO_BATCH)

    @property
    def trains(self) -> bool:
        """Whether a plugin with such a hook changes weights, whatever the profile names."""
        return self.edits_gradients or (self.changes_weights and self.stage is not Stage.LOADING)

    def __call__(self, function: F) -> F:
        setattr(function, f"{PROJECT}_spec", {"firstresult": self.firstresult})
        setattr(function, f"{PROJECT}_policy", self)
        return function


hookspec = HookPolicy
"""``@hookspec(stage=…)`` marks a function as a hook, with all of its policy."""

CALLBACK = HookPolicy(stage=Stage.RUN)
"""The policy of functions that a plugin gives to others to call: that of a hook that only tells."""
