"""``hookimpl`` and ``hookspec``: how functions are marked, and in what order they run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import IntEnum
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
    *, priority: int = ..., wrapper: bool = ..., specname: str | None = ..., collective: bool = ...
) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None,
    *,
    priority: int = Priority.NORMAL,
    wrapper: bool = False,
    specname: str | None = None,
    collective: bool = False,
) -> F | Callable[[F], F]:
    """Mark a function as the implementation of the hook that it is named after.

    ``priority`` is 0 to 100, lower runs earlier; ties break by plugin name. A ``wrapper`` is a
    generator that yields once, receives the inner result from the ``yield`` and returns the
    result to pass on (returning nothing passes the inner one on). ``specname`` implements a hook
    of another name than the function's. A ``collective`` implementation has a part to do in every
    process of a run: it communicates with the others, or changes what must stay the same in all.
    Where there are several, its failure in one ends the run.

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
        }
        # Under @staticmethod and @classmethod it is the function that the manager looks at.
        setattr(getattr(func, "__func__", func), f"{PROJECT}_impl", options)
        return func

    return mark if function is None else mark(function)


@overload
def hookspec(function: F) -> F: ...
@overload
def hookspec(
    *,
    returns: Returns = ...,
    firstresult: bool = ...,
    dormant: bool = ...,
    alone: bool = ...,
    copies: tuple[str, ...] = ...,
    failure_limit: int = ...,
    judges_input: bool = ...,
    changes_weights: bool = ...,
    fatal_among_processes: bool = ...,
    sets_modes: bool = ...,
    may_last: bool = ...,
) -> Callable[[F], F]: ...
def hookspec(
    function: F | None = None,
    *,
    returns: Returns = ignored,
    firstresult: bool = False,
    dormant: bool = False,
    alone: bool = False,
    copies: tuple[str, ...] = (),
    failure_limit: int = 3,
    judges_input: bool = False,
    changes_weights: bool = False,
    fatal_among_processes: bool = False,
    sets_modes: bool = False,
    may_last: bool = False,
) -> F | Callable[[F], F]:
    """Mark a function as the specification of a hook, with all of its policy.

    ``returns`` makes plain types of what an implementation returned, inside the guard; by default
    that is not looked at. ``dormant``: does it fire for a plugin whose schedule has not enabled it
    yet? ``alone``: is it called for one plugin at a time, so that a wrapper would be around
    nothing? Of the parameters ``copies``, which are lists and mappings, each implementation gets
    its own. A plugin is quarantined once it has failed ``failure_limit`` times. With
    ``judges_input`` a ConfigError is no failure but bad input. ``changes_weights``: is what it
    returns part of the training (without it, a plugin that is left out leaves the weights as they
    are)?
    ``fatal_among_processes``: does its failure end a run of several processes, which would no
    longer do the same? ``sets_modes``: may it set the training mode of parts of the model? (What
    another hook leaves set is put back.) ``may_last``: is one that takes longer than
    ``training.hook_timeout`` only told of, and no failure?
    """

    def mark(func: F) -> F:
        options = {
            "returns": returns,
            "firstresult": firstresult,
            "dormant": dormant,
            "alone": alone,
            "copies": copies,
            "failure_limit": failure_limit,
            "judges_input": judges_input,
            "changes_weights": changes_weights,
            "fatal_among_processes": fatal_among_processes,
            "sets_modes": sets_modes,
            "may_last": may_last,
        }
        setattr(func, f"{PROJECT}_spec", options)
        return func

    return mark if function is None else mark(function)
