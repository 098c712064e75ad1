"""Makes the plans by which hooks are called: the implementations that run now, in their order.

A plan is kept until the implementations of its hook, a priority or the state of a plugin changes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

from apt_core.hookspecs import policy_of
from apt_core.markers import Priority, Returns
from apt_core.plugin_records import PluginRecord


class Call(NamedTuple):
    """One implementation in a plan."""

    function: Callable[..., Any]
    argnames: tuple[str, ...]
    plugin: str
    hook: str
    priority: int
    wrapper: bool


class Plan(NamedTuple):
    """The implementations of one hook that run now, in order, and how their results are
    combined."""

    methods: Sequence[Any]
    wrappers: tuple[Call, ...]
    calls: tuple[Call, ...]
    returns: Returns
    seconds: list[float]
    """The seconds of each call, while calls are timed."""
    in_step: bool
    sets_modes: bool


class HookPlans:
    """Makes plans of the plugins in ``records``, and keeps them in ``known``, by hook.

    While ``timing``, the calls of :data:`~apt_core.hookspecs.STEP_HOOKS` are timed. ``deferred``
    makes of a call that is marked ``background=True`` the function that puts it off; without it,
    such a call is made like any other.
    """

    shared_timings: ClassVar[dict[tuple[str, str], list[float]] | None] = None
    """Seconds of every call by (hook, plugin), of all managers, while tracing is on."""

    def __init__(self, records: Mapping[str, PluginRecord]) -> None:
        self.known: dict[str, Plan] = {}
        self.timing = False
        self.deferred: Callable[[Call], Callable[..., Any]] | None = None
        self._records = records
        self._former: list[Plan] = []
        self._seconds: dict[tuple[str, str], float] = {}

    def forget(self) -> None:
        """Drop all plans, because implementations, priorities or states have changed."""
        # A dropped plan may be running: the times of its calls still count.
        self._former += self.known.values()
        self.known.clear()

    def plan(self, hook_name: str, methods: Sequence[Any]) -> Plan:
        """A new plan of a hook, whose implementations are ``methods``."""
        calls = self.in_order(hook_name, methods)
        policy = policy_of(hook_name)
        plan = Plan(
            methods,
            tuple(call for call in calls if call.wrapper),
            tuple(call for call in calls if not call.wrapper),
            policy.returns,
            [0.0] * sum(not call.wrapper for call in calls),
            policy.in_step,
            policy.sets_modes,
        )
        if hook_name in self.known:
            self._former.append(self.known[hook_name])
        self.known[hook_name] = plan
        return plan

    def in_order(
        self, hook_name: str, methods: Sequence[Any], *, dormant: bool = False
    ) -> list[Call]:
        """The calls that may be made now, by priority, and with ``dormant`` those of dormant
        plugins."""
        calls = [self._as_call(hook_name, method) for method in methods]
        calls = [call for call in calls if self._may_run(call, dormant)]
        return sorted(calls, key=lambda c: (c.priority, c.plugin, c.function.__name__))

    def _as_call(self, hook_name: str, method: Any) -> Call:
        record = self._records.get(method.plugin_name)
        own = method.opts.get("priority", Priority.NORMAL)
        priority = own if record is None or record.priority is None else record.priority
        function = method.function
        argnames = tuple(inspect.signature(function).parameters)
        policy = policy_of(hook_name)
        key = (hook_name, method.plugin_name)
        timing = timed_wrapper if method.wrapper else timed
        if self.shared_timings is not None:
            function = timing(function, self.shared_timings.setdefault(key, []).append)
        call = Call(function, argnames, method.plugin_name, hook_name, priority, method.wrapper)
        if self.deferred is not None and method.opts.get("background"):
            function = self.deferred(call)
        # Around what puts a call off: it is to see what there was when the hook was called.
        places = [place for place, name in enumerate(argnames) if name in policy.copies]
        if places:
            function = on_copies(function, places)
        if method.wrapper and policy.in_step:
            function = timed_wrapper(function, partial(self._add_timed, key))
        return call._replace(function=function)

    def _may_run(self, call: Call, dormant: bool) -> bool:
        record = self._records.get(call.plugin)
        if record is not None and record.state == "dormant":
            return dormant or policy_of(call.hook).dormant
        return record is None or record.state in ("active", "available")

    def take_call_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds of the calls that were timed since the last time, by (hook, plugin)."""
        for plan in (*self.known.values(), *self._former):
            for place, (call, seconds) in enumerate(zip(plan.calls, plan.seconds, strict=True)):
                if seconds:
                    self._add_seconds((call.hook, call.plugin), seconds)
                    plan.seconds[place] = 0.0
        self._former.clear()
        taken, self._seconds = self._seconds, {}
        return taken

    def _add_timed(self, key: tuple[str, str], seconds: float) -> None:
        if self.timing:
            self._add_seconds(key, seconds)

    def _add_seconds(self, key: tuple[str, str], seconds: float) -> None:
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds


def on_copies(function: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """A wrapper of ``function`` that copies the arguments in these places; keeps name and
    source."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        own = list(args)
        for place in places:
            own[place] = copy.copy(own[place])
        return function(*own)

    return run


Add = Callable[[float], object]


def timed(function: Callable[..., Any], add: Add) -> Callable[..., Any]:
    """A wrapper of ``function`` that passes the seconds of each call to ``add``; keeps name and
    source."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            add(time.perf_counter() - start)

    return run


def timed_wrapper(function: Callable[..., Any], add: Add) -> Callable[..., Any]:
    """As :func:`timed`, for a wrapper: one entry per call, without the time of the wrapped
    calls."""

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
            add(spent)

    return run
