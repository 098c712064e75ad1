"""Wrappers of hooks: generators, each part of which runs behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from apt_core.hook_plans import Call, Plan
from apt_core.markers import Returns

Owned = tuple[str, Any]
"""The name of a plugin, and its result."""


Failed = Callable[[Call, BaseException], None]
"""Handles the error of an implementation; raises it, or another error, if it ends the run."""


def run_wrapped(
    plan: Plan,
    kwargs: Mapping[str, object],
    firstresult: bool,
    inner: Callable[[], list[Owned]],
    failed: Failed,
    watching: Callable[[Call], AbstractContextManager[None]],
) -> list[Owned]:
    """Run ``inner`` inside the wrappers of ``plan``; the results with their owners.

    A wrapper that fails before its yield is skipped; if one fails after it, the inner results are
    unchanged. An error that ends the run is raised in every wrapper and then here. ``watching`` is
    around each part of a wrapper.
    """
    running: list[tuple[Any, Call]] = []
    results: list[Owned] = []
    ending: BaseException | None = None
    try:
        for call in plan.wrappers:
            generator = _enter(call, kwargs, failed, watching)
            if generator is not None:
                running.append((generator, call))
        results = inner()
    except BaseException as error:
        ending = error
    for generator, call in reversed(running):
        try:
            with watching(call):
                after = _leave(generator, call, plan.returns, kwargs, results, ending, firstresult)
        except BaseException as error:
            if error is not ending:
                try:
                    failed(call, error)
                except BaseException as fatal:
                    ending = fatal if ending is None else ending
        else:
            results = results if after is None else after
    if ending is not None:
        raise ending
    return results


def _enter(
    call: Call,
    kwargs: Mapping[str, object],
    failed: Failed,
    watching: Callable[[Call], AbstractContextManager[None]],
) -> Any:
    arguments = [kwargs[name] for name in call.argnames]
    try:
        with watching(call):
            generator = call.function(*arguments)
            next(generator)
    except StopIteration:
        failed(call, RuntimeError("the wrapper did not yield"))
    except BaseException as error:
        failed(call, error)
    else:
        return generator
    return None


def _leave(
    generator: Any,
    call: Call,
    returns: Returns,
    kwargs: Mapping[str, object],
    results: Sequence[Owned],
    ending: BaseException | None,
    first: bool,
) -> list[Owned] | None:
    """End one wrapper. Returns the new results, or None if they are unchanged.

    It is shown converted results, of which the containers are copies: what it edits in them and
    does not return is lost. Raises whatever is a failure of the wrapper, and ``ending``.
    """
    shown = [(plugin, returns(value, kwargs)) for plugin, value in results]
    try:
        if ending is not None:
            generator.throw(ending)
        else:
            generator.send(values_of(shown, first))
        generator.close()
    except StopIteration as stop:
        value = stop.value
    else:
        raise RuntimeError("the wrapper yielded more than once")
    if ending is not None or value is None:
        return None
    if not first and not isinstance(value, list):
        raise TypeError(f"the wrapper returned {type(value).__name__}, not a list")
    owned = []
    for item in [value] if first else list(value):
        index = next((i for i, (_, known) in enumerate(shown) if known is item), None)
        owner = call.plugin if index is None else shown.pop(index)[0]
        converted = returns(item, kwargs)
        if converted is not None:
            owned.append((owner, converted))
    return owned


def values_of(owned: Sequence[Owned], firstresult: bool) -> Any:
    """The results as a caller or a wrapper sees them."""
    if firstresult:
        return owned[0][1] if owned else None
    return [value for _, value in owned]
