"""Calls of hook implementations: what a plan consists of, and wrappers as guarded generators."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from apt_core.errors import PluginError, StopTraining

Owned = tuple[str, Any]
"""A result, after the name of the plugin that it is from."""

PASSES = (StopTraining, KeyboardInterrupt, GeneratorExit, PluginError)
"""What the guard lets through; everything else that a hook raises is a failure of its plugin."""


class Call(NamedTuple):
    """One implementation in a plan."""

    function: Callable[..., Any]
    argnames: tuple[str, ...]
    plugin: str
    hook: str
    priority: int
    wrapper: bool


class Plan(NamedTuple):
    """The implementations of one hook that run now, in order."""

    methods: Sequence[Any]
    wrappers: tuple[Call, ...]
    calls: tuple[Call, ...]


Failed = Callable[[Call, BaseException], None]
"""Told of what an implementation raised; raises it, or another error, where that ends the run."""


def run_wrapped(
    wrappers: Sequence[Call],
    kwargs: Mapping[str, object],
    firstresult: bool,
    inner: Callable[[], list[Owned]],
    failed: Failed,
) -> list[Owned]:
    """Run ``inner`` inside ``wrappers``; the results with their owners.

    A wrapper that fails before its yield is left out; one that fails after it leaves the
    inner result as it was; what ends the run inside is seen by every wrapper and raised.
    """
    running: list[tuple[Any, Call]] = []
    results: list[Owned] = []
    ending: BaseException | None = None
    try:
        for call in wrappers:
            generator = _enter(call, kwargs, failed)
            if generator is not None:
                running.append((generator, call))
        results = inner()
    except BaseException as error:
        ending = error
    for generator, call in reversed(running):
        result = values_of(results, firstresult)
        try:
            replaced = _leave(generator, call, result, ending, firstresult, failed)
        except BaseException as error:
            ending = error if ending is None else ending
            continue
        if replaced is not None:
            results = _attributed([replaced] if firstresult else replaced, results, call.plugin)
    if ending is not None:
        raise ending
    return results


def _enter(call: Call, kwargs: Mapping[str, object], failed: Failed) -> Any:
    arguments = [kwargs[name] for name in call.argnames]
    try:
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
    result: Any,
    ending: BaseException | None,
    first: bool,
    failed: Failed,
) -> Any:
    """End one wrapper; returns what it puts in the place of ``result``, or None."""
    try:
        if ending is not None:
            generator.throw(ending)
        else:
            generator.send(result)
        generator.close()
    except StopIteration as stop:
        if ending is not None or stop.value is None or first or isinstance(stop.value, list):
            return None if ending is not None else stop.value
        failed(
            call,
            TypeError(f"the wrapper returned {type(stop.value).__name__}, not a list"),
        )
        return None
    except BaseException as error:
        if error is not ending:
            failed(call, error)
        return None
    failed(call, RuntimeError("the wrapper yielded more than once"))
    return None


def values_of(owned: Sequence[Owned], firstresult: bool) -> Any:
    """The results as a caller or a wrapper sees them."""
    if firstresult:
        return owned[0][1] if owned else None
    return [value for _, value in owned]


def _attributed(values: Sequence[Any], before: Sequence[Owned], plugin: str) -> list[Owned]:
    """What a wrapper of ``plugin`` returned, with owners: what was there keeps its own."""
    left = list(before)
    owned = []
    for value in values:
        index = next((i for i, (_, known) in enumerate(left) if known is value), None)
        owned.append((plugin, value) if index is None else left.pop(index))
    return owned


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """``function``, appending the seconds of each call; it keeps its name and source."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds.append(time.perf_counter() - start)

    return run


def timed_wrapper(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """As :func:`timed`, for a wrapper: one entry a call, without what the wrapper is around."""

    @functools.wraps(function)
    def run(*args: Any) -> Generator[Any, Any, Any]:
        spent, steps = 0.0, function(*args)
        resume: Callable[[], Any] = functools.partial(next, steps)
        try:
            while True:
                start = time.perf_counter()
                try:
                    value = resume()
                except StopIteration as stop:
                    return stop.value
                finally:
                    spent += time.perf_counter() - start
                try:
                    sent = yield value
                except GeneratorExit:
                    steps.close()
                    raise
                except BaseException as error:
                    resume = functools.partial(steps.throw, error)
                else:
                    resume = functools.partial(steps.send, sent)
        finally:
            seconds.append(spent)

    return run
