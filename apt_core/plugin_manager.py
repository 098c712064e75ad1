"""The plugin manager: order, guard, quarantine, records.

A ``pluggy.PluginManager`` with one private touch-point, ``_hookexec``, which pluggy calls for every
hook call with the hook's implementations. Instead of pluggy's own loop it runs a cached plan: the
implementations that may run now, sorted by priority, each behind a guard that turns a failure into
a record. The plan is rebuilt when the implementations, a priority or a plugin's state changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from time import monotonic
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

import pluggy

from apt_core import hookspecs
from apt_core.errors import ConfigError, PluginError, Problem, StopTraining
from apt_core.failures import frames_of, is_code_of, one_line, source_of, where_raised
from apt_core.hook_calls import (
    PASSES,
    Call,
    Owned,
    Plan,
    on_copies,
    run_wrapped,
    timed,
    timed_wrapper,
    values_of,
)
from apt_core.hook_deadline import HookDeadline, HookTimeoutError
from apt_core.hookspecs import POLICIES, REACHES_WEIGHTS, STEP_HOOKS, hooks_where
from apt_core.log import get_logger
from apt_core.markers import CALLBACK, PROJECT, HookPolicy, Priority
from apt_core.plugin_names import normalized_name
from apt_core.plugin_objects import (
    canonical_name,
    implementation_options,
    loose_hooks,
    make,
    options_of,
    plugin_class,
    plugin_info,
)
from apt_core.plugin_records import PluginRecord
from apt_core.requirements import unmet
from apt_core.types import CORE, PluginFailure, PluginInfo
from apt_core.validation import check_plugin_object
from apt_core.watch import Watch

log = get_logger("apt.plugins")

T = TypeVar("T")

MAX_LOG_ERRORS = 20
"""Errors of logging that are kept until they are counted; they hold on to frames."""


class PluginManager(pluggy.PluginManager):
    """Registers plugins and calls their hooks.

    ``manager.hook.on_step_end(step=…, loss=…, trainer=…)`` calls a hook as in any pluggy project.
    ``strict`` makes the first failure of any plugin fatal. ``listing`` is for showing plugins side
    by side that no run would have together: their conflicts are not checked. ``step`` is the
    position that failures are recorded with; the trainer moves it. In a run of several processes
    it sets ``stop_together``, which is called with the reason where a hook raises StopTraining:
    none may leave the others at once. A loss term or a collective implementation that fails is
    fatal there. A run sets ``watch`` too: what a call changes in the process is put back.
    """

    shared_timings: ClassVar[dict[tuple[str, str], list[float]] | None] = None
    """Seconds of every call by (hook, plugin), of all managers, while tracing is on."""

    def __init__(self, *, strict: bool = False, listing: bool = False) -> None:
        super().__init__(PROJECT)
        self.strict = strict
        self.listing = listing
        self.step = 0
        self.stop_together: Callable[[str], None] | None = None
        self.records: dict[str, PluginRecord] = {}
        self._plans: dict[str, Plan] = {}
        self._former_plans: list[Plan] = []
        self.watch: Watch | None = None
        self.deadline: HookDeadline | None = None
        self._timing = False
        self._seconds: dict[tuple[str, str], float] = {}
        self._telling = False
        self._pending: PluginError | None = None
        self._facts: dict[str, PluginInfo] = {}
        self._raised_here: WeakSet[PluginError] = WeakSet()
        self._log_errors: list[BaseException] = []
        self._told: set[Hashable] = set()
        self.add_hookspecs(hookspecs)

    # Registration ----------------------------------------------------------------------------

    def register(
        self,
        plugin: Any,
        name: str | None = None,
        *,
        record: PluginRecord | None = None,
    ) -> str:
        """Validate and register a plugin; returns its name, normalised.

        A module of functions and an object are taken as they are. Of a class, and of a module that
        names one, a new object is made, which is this manager's alone: :meth:`get_plugin` has it.

        Nothing is changed when it raises ConfigError: an unknown hook, parameters that would
        never be passed, a class that cannot be made, an unmet requirement, a conflict with
        an active plugin, a name that is taken.
        """
        name = normalized_name(name or canonical_name(plugin))
        info, cls = plugin_info(plugin), plugin_class(plugin)
        unusable = self._unusable(name, info)
        problems = []
        if cls is not None:
            problems += [
                Problem(
                    f"its module has hooks beside its class {cls.__name__}",
                    key=f"plugin {name}, {hook}",
                    hint="put them all into the class, or all into the module",
                )
                for hook in loose_hooks(plugin)
            ]
            if unusable or problems:  # what it needs to be made may be missing
                raise ConfigError(unusable + problems)
            plugin = make(cls, name)
        problems += check_plugin_object(plugin, name, self._specs())
        if name == CORE:
            problems.append(Problem("the name is the core's own", key=f"plugin {name}"))
        if name in self._name2plugin:
            problems.append(
                Problem("the name is taken by another active plugin", key=f"plugin {name}")
            )
        taken = self.get_name(plugin) if cls is None else self._name_of_class(cls)
        if taken is not None and taken != name:
            problems.append(Problem(f"it is active already as {taken!r}", key=f"plugin {name}"))
        problems += unusable
        if problems:
            raise ConfigError(problems)
        super().register(plugin, name)
        record = record or PluginRecord(name)
        record.state = "active"
        record.summary = record.summary or info.summary
        record.version = record.version or info.version
        self.records[name], self._facts[name] = record, info
        return name

    def _name_of_class(self, cls: type[Any]) -> str | None:
        active = self.list_name_plugin()
        return next((name for name, plugin in active if type(plugin) is cls), None)

    def _unusable(self, name: str, info: PluginInfo) -> list[Problem]:
        reasons = [(f"it cannot be used: {reason}", "") for reason in unmet(info.requires)]
        conflicts = list(map(normalized_name, info.conflicts))
        reasons += [
            (f"it conflicts with the active plugin {other!r}", f"block one: --plugin no:{other}")
            for other, _ in self.list_name_plugin()
            if not self.listing
            and other != name
            and (other in conflicts or name in map(normalized_name, self._facts[other].conflicts))
        ]
        return [Problem(reason, key=f"plugin {name}", hint=hint) for reason, hint in reasons]

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        name = name or self.get_name(plugin)
        plugin = super().unregister(plugin, name)
        self.records.pop(name or "", None)
        self._facts.pop(name or "", None)
        self._forget_plans()
        return plugin

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return implementation_options(plugin, name)

    def _specs(self) -> dict[str, Any]:
        return {name: caller.spec for name, caller in vars(self.hook).items() if caller.spec}

    # State -----------------------------------------------------------------------------------

    def set_priority(self, name: str, priority: int | None) -> None:
        """Let all implementations of a plugin run at ``priority`` (None: their own again)."""
        self.records[name].priority = priority
        self._forget_plans()

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        record = self.records[name]
        record.state, record.reason = state, reason
        self._forget_plans()

    def state_dict(self) -> dict[str, Any]:
        """Failures and quarantines, as JSON values, for the checkpoint."""
        return {
            name: {
                "state": record.state,
                "reason": record.reason,
                "failures": [asdict(failure) for failure in record.failures],
            }
            for name, record in self.records.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take failures and quarantines back; plugins that are not active now are passed over."""
        for name, saved in state.items():
            if name in self.records:
                self.records[name].failures = [PluginFailure(**f) for f in saved["failures"]]
                if saved["state"] == "quarantined":
                    self.set_state(name, "quarantined", saved["reason"])

    # Calls -----------------------------------------------------------------------------------

    def _hookexec(
        self,
        hook_name: str,
        methods: Sequence[Any],
        kwargs: Mapping[str, object],
        firstresult: bool,
    ) -> Any:
        if not methods:
            return None if firstresult else []
        plan = self._plans.get(hook_name)
        if plan is None or plan[0] != methods:
            plan = self._plan(hook_name, methods)
        if plan[1]:
            return values_of(self._wrapped(plan, kwargs, firstresult), firstresult)
        owned = self._all(plan, kwargs, firstresult) if plan[2] else None
        if not owned:
            return None if firstresult else []
        return values_of(owned, firstresult)

    def _all(self, plan: Plan, kwargs: Mapping[str, object], firstresult: bool) -> list[Owned]:
        """The results of the implementations that are no wrappers: the path of every step."""
        owned: list[Owned] = []
        _, _, calls, returns, seconds, in_step, sets_modes = plan
        watch = each = self.watch
        before = unchanged = None
        known = False
        if watch is not None and in_step and watch.stepping:
            known = True
            if watch.closely:
                unchanged = watch.unchanged
            else:  # All of the calls are compared at once: each by itself costs more than they do.
                each = None
        running = None if self.deadline is None or not calls else self.deadline.enter(calls[0])
        timed = self._timing and in_step
        timing = timed or running is not None
        start = end = monotonic() if timing else 0.0
        argument = kwargs.__getitem__
        try:
            for place, call in enumerate(calls):
                arguments = (*map(argument, call[1]),)
                if each is not None and not known:
                    before = each.before()
                if running is not None:
                    running.call, running.since = call, start
                try:
                    result = call[0](*arguments)
                    if result is not None:
                        result = returns(result, kwargs)
                    if timing:
                        end = monotonic()
                        if running is not None and end - start >= running.limit:
                            running.judge()
                except BaseException as error:
                    if watch is not None:
                        suspects = calls[: place + 1] if each is None else (call,)
                        self._put_back(watch, suspects, before, sets_modes)
                    # A name for what is to be raised would hold on to the frames and their tensors.
                    self._raised(call, error if running is None else running.failed(error))
                    result, end = None, monotonic()
                else:
                    if each is not None and (unchanged is None or not unchanged()):
                        self._put_back(each, (call,), before, sets_modes)
                        unchanged = each.unchanged if known else None
                        end = monotonic()
                if timed:
                    seconds[place] += end - start
                start = end
                if result is not None:
                    owned.append((call[2], result))
                    if firstresult:
                        break
        finally:
            if running is not None:
                running.end()
        if watch is not None and known:
            if each is None and not watch.unchanged():
                self._put_back(watch, calls, None, sets_modes)
            if sets_modes:
                watch.note_modes()
        return owned

    def _guarded(self, call: Call, kwargs: Mapping[str, object], plan: Plan) -> Any:
        owned = self._all(plan._replace(calls=(call,), seconds=[0.0]), kwargs, True)
        return owned[0][1] if owned else None

    def _wrapped(self, plan: Plan, kwargs: Mapping[str, object], firstresult: bool) -> list[Owned]:
        """The results of all implementations, those of wrappers around the others."""
        return run_wrapped(
            plan,
            kwargs,
            firstresult,
            lambda: self._all(plan, kwargs, firstresult),
            self._raised,
            lambda call: self._watching(call, in_step=plan.in_step, sets_modes=plan.sets_modes),
        )

    def call_each(self, hook_name: str, **kwargs: Any) -> list[tuple[str, Any]]:
        """Call a list hook; returns ``(plugin, result)`` pairs in the order of the results.

        An item that a wrapper added belongs to the wrapper's plugin.
        """
        plan = self._plan_of(hook_name)
        return self._wrapped(plan, kwargs, False)

    def call_first(self, hook_name: str, **kwargs: Any) -> tuple[str, Any] | None:
        """Call a first-result hook; the plugin that answered and its result, or None."""
        plan = self._plan_of(hook_name)
        owned = self._wrapped(plan, kwargs, True)
        return owned[0] if owned else None

    def call_plugin(self, plugin: str, hook_name: str, **kwargs: Any) -> Any:
        """Call one plugin's implementation of a hook; the first result that is not None."""
        plan = self._plan_of(hook_name)
        for call in plan.calls:
            if call.plugin == plugin:
                result = self._guarded(call, kwargs, plan)
                if result is not None:
                    return result
        return None

    def chain(self, hook_name: str, request: Any, attribute: str) -> Any:
        """Pass ``request`` along the implementations: each result becomes its ``attribute``.

        Returns the last request. ``request`` is a dataclass and is not changed in place.
        """
        plan = self._plan_of(hook_name)

        def inner() -> list[Owned]:
            owner, current = "", request
            for call in plan.calls:
                value = self._guarded(call, {"request": current}, plan)
                if value is not None:
                    owner, current = call.plugin, replace(current, **{attribute: value})
            return [(owner, getattr(current, attribute))]

        ((_, value),) = run_wrapped(
            plan, {"request": request}, True, inner, self._raised, self._watching
        )
        return replace(request, **{attribute: value})

    def attempt(
        self, plugin: str, hook_name: str, function: Callable[[], T], *, code: Any = None
    ) -> T | None:
        """Call ``function``, which looks at or calls what the hook has handed over: its result, or
        None where it raised, which is a failure of the plugin in that hook.

        ``code`` is as in :meth:`fail`. Raises as a call of the hook does.
        """
        call = self._call_for(plugin, hook_name, code)
        try:
            with self._watching(call):
                return function()
        except BaseException as error:
            self._raised(call, error)
            return None

    # What calls leave behind -----------------------------------------------------------------

    @contextmanager
    def watching(
        self, plugin: str, what: str, code: Any = None, *, judged: bool = False
    ) -> Iterator[None]:
        """Put back what is changed in the process inside, in the name of the plugin. ``what`` says
        which part of it runs, where that is no hook, and ``code`` is what runs; the plugin itself
        may be registered inside. What comes back after the deadline raises HookTimeoutError if it
        is ``judged``."""
        watch = self.watch
        before = watch.before() if watch else None
        try:
            with self._timed(Call(code, (), plugin, what, 0, False), judged):
                yield
        finally:
            changes = watch.put_back(before) if watch else ()
            if changes:
                code = self.get_plugin(plugin) if code is None else code
                self._left_behind(Call(code, (), plugin, what, 0, False), changes)

    @contextmanager
    def _timed(self, call: Call, judged: bool = True) -> Iterator[None]:
        """Raise HookTimeoutError for what is late inside, if it is ``judged``; else only tell."""
        deadline = self.deadline
        running = None if deadline is None else deadline.enter(call)
        if running is None:
            yield
            return
        running.judged = judged
        try:
            yield
            if judged:
                running.judge()
        except BaseException as error:
            known = running.failed(error) if judged else error
            if known is error:
                raise
            raise known from error
        finally:
            running.end()

    @contextmanager
    def hook_deadline(self, seconds: float, process: str = "") -> Iterator[None]:
        """Tell of calls of plugins that this thread makes and that take longer, while the context
        lasts; 0 watches nothing. ``process`` names the process where it is not the first."""
        if not seconds:
            yield
            return
        deadline = HookDeadline(
            seconds,
            position=lambda: f" at step {self.step}{process}",
            may_last=lambda hook: policy_of(hook).may_last,
            aloud=bool(process),
        )
        before, self.deadline = self.deadline, deadline
        deadline.start()
        try:
            yield
        finally:
            self.deadline = before
            deadline.stop()

    @contextmanager
    def _watching(
        self, call: Call, *, in_step: bool = False, sets_modes: bool = False
    ) -> Iterator[None]:
        watch = self.watch
        known = watch is not None and in_step and watch.stepping
        before = None if watch is None or known else watch.before()
        try:
            with self._timed(call):
                yield
        finally:
            if watch is not None and not (known and watch.unchanged()):
                self._put_back(watch, (call,), before, sets_modes)

    def _put_back(self, watch: Watch, calls: Sequence[Call], before: Any, sets_modes: bool) -> None:
        if changes := watch.put_back(before, sets_modes=sets_modes):
            self._left_by_one(calls, changes)

    def left_behind(self, changes: Sequence[str], hooks: Sequence[str] = STEP_HOOKS) -> None:
        """Tell of what was put back after calls of ``hooks``, or of what plugins have handed
        over. Raises PluginError as a call of a hook does."""
        self._left_by_one([call for name in hooks for call in self.order(name)], changes)

    def _left_by_one(self, calls: Sequence[Call], changes: Sequence[str]) -> None:
        """Tell of what one of the ``calls``, of any plugin if there are none, has left changed."""
        called = {call.plugin: call for call in calls}
        if len(called) == 1:
            (call,) = called.values()
            self._left_behind(call, changes)
            return
        names = ", ".join(called) or ", ".join(name for name, _ in self.list_name_plugin())
        text = f"one of the plugins {names} left changed: {'; '.join(changes)}; it is put back"
        if self.strict:
            where = ", ".join(dict.fromkeys(call.hook for call in calls))
            stop = f"{text}; the run stops because --strict"
            raise self._own(PluginError(stop, plugin=names, hook=where))
        self._tell_once((tuple(called), _what(changes)), text)

    def _left_behind(self, call: Call, changes: Sequence[str]) -> None:
        where = where_raised(Exception(), *source_of(call.function))
        at = f"plugin {call.plugin} left changed in {call.hook} at step {self.step}"
        text = f"{at} ({where}): {'; '.join(changes)}"
        record = self.records.setdefault(call.plugin, PluginRecord(call.plugin, state="active"))
        because = self._fatal_because(call, record, to_others=False)
        if because:
            stop = PluginError(
                f"{text}; the run stops because {because}",
                plugin=call.plugin,
                hook=call.hook,
                where=where,
            )
            raise self._own(stop)
        what = call.plugin, call.hook, _what(changes)
        if self._tell_once(what, f"{text}; it is put back"):
            left = PluginFailure(
                plugin=call.plugin,
                hook=call.hook,
                step=self.step,
                error=f"left changed: {'; '.join(changes)}",
                where=where,
                count=len(record.failures) + len(record.leftovers) + 1,
                quarantined=False,
                traceback="",
            )
            record.leftovers.append(left)
            self._tell(left, None, None)

    def _tell_once(self, what: Hashable, text: str) -> bool:
        if what in self._told:
            return False
        self._told.add(what)
        log.warning("%s", text)
        return True

    def _own(self, error: PluginError) -> PluginError:
        self._raised_here.add(error)
        return error

    # Plans -----------------------------------------------------------------------------------

    def time_calls(self, on: bool) -> None:
        """Time what every plugin does within a step (STEP_HOOKS) from now on, or no more."""
        self._timing = on

    def _add_timed(self, key: tuple[str, str], seconds: float) -> None:
        if self._timing:
            self._add_seconds(key, seconds)

    def _add_seconds(self, key: tuple[str, str], seconds: float) -> None:
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def take_call_seconds(self) -> dict[tuple[str, str], float]:
        """By (hook, plugin), the seconds of the calls that were timed since they were last
        taken."""
        for plan in (*self._plans.values(), *self._former_plans):
            for place, (call, seconds) in enumerate(zip(plan.calls, plan.seconds, strict=True)):
                if seconds:
                    self._add_seconds((call.hook, call.plugin), seconds)
                    plan.seconds[place] = 0.0
        self._former_plans.clear()
        taken, self._seconds = self._seconds, {}
        return taken

    def _forget_plans(self) -> None:
        # One of them may be running: what its calls take counts.
        self._former_plans += self._plans.values()
        self._plans.clear()

    def _plan_of(self, hook_name: str) -> Plan:
        methods = getattr(self.hook, hook_name).get_hookimpls()
        plan = self._plans.get(hook_name)
        return plan if plan and plan.methods == methods else self._plan(hook_name, methods)

    def _plan(self, hook_name: str, methods: Sequence[Any]) -> Plan:
        calls = self._sorted(hook_name, methods)
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
        if hook_name in self._plans:
            self._former_plans.append(self._plans[hook_name])
        self._plans[hook_name] = plan
        return plan

    def _sorted(
        self, hook_name: str, methods: Sequence[Any], *, dormant: bool = False
    ) -> list[Call]:
        calls = [self._as_call(hook_name, method) for method in methods]
        calls = [call for call in calls if self._may_run(call, dormant)]
        return sorted(calls, key=lambda c: (c.priority, c.plugin, c.function.__name__))

    def _as_call(self, hook_name: str, method: Any) -> Call:
        record = self.records.get(method.plugin_name)
        own = method.opts.get("priority", Priority.NORMAL)
        priority = own if record is None or record.priority is None else record.priority
        function = method.function
        argnames = tuple(inspect.signature(function).parameters)
        policy = policy_of(hook_name)
        places = [place for place, name in enumerate(argnames) if name in policy.copies]
        if places:
            function = on_copies(function, places)
        key = (hook_name, method.plugin_name)
        timing = timed_wrapper if method.wrapper else timed
        if self.shared_timings is not None:
            function = timing(function, self.shared_timings.setdefault(key, []).append)
        if method.wrapper and policy.in_step:
            function = timed_wrapper(function, partial(self._add_timed, key))
        return Call(function, argnames, method.plugin_name, hook_name, priority, method.wrapper)

    def _may_run(self, call: Call, dormant: bool) -> bool:
        record = self.records.get(call.plugin)
        if record is not None and record.state == "dormant":
            return dormant or policy_of(call.hook).dormant
        return record is None or record.state in ("active", "available")

    def implements(self, plugin: str, hook_name: str) -> bool:
        """Does a registered plugin implement the hook, whatever its state?"""
        methods = getattr(self.hook, hook_name).get_hookimpls()
        return any(method.plugin_name == plugin for method in methods)

    def implements_where(self, plugin: str, applies: Callable[[HookPolicy], bool]) -> bool:
        """Does a registered plugin implement a hook to whose policy something applies?"""
        return any(self.implements(plugin, hook) for hook in hooks_where(applies))

    def only_observes(self, plugin: str) -> bool:
        """Does a registered plugin say that it is an observer, or get nothing through which it
        could change a weight?"""
        if self._facts[plugin].observer:
            return True
        if self.implements_where(plugin, lambda policy: policy.changes_weights):
            return False
        return not any(
            REACHES_WEIGHTS & {*method.argnames}
            for caller in self.get_hookcallers(self.get_plugin(plugin)) or ()
            for method in caller.get_hookimpls()
            if method.plugin_name == plugin
        )

    def order(self, hook_name: str, *, dormant: bool = False) -> list[Call]:
        """The effective order of a hook: wrappers from the outside in, then the others.

        With ``dormant``, implementations that wait for a schedule stand where they will run.
        """
        methods = getattr(self.hook, hook_name).get_hookimpls()
        calls = self._sorted(hook_name, methods, dormant=dormant)
        return sorted(calls, key=lambda call: not call.wrapper)

    # Failures --------------------------------------------------------------------------------

    def fail(self, plugin: str, hook_name: str, error: BaseException, *, code: Any = None) -> None:
        """Count a failure of something that a plugin handed over, as if the hook had raised it.

        ``code`` is the function, class or module that failed where that is no implementation of
        the hook. Raises PluginError where the policy says that the run must stop.
        """
        self._failed(self._call_for(plugin, hook_name, code), error)

    def _call_for(self, plugin: str, hook_name: str, code: Any) -> Call:
        if code is None:
            methods = getattr(self.hook, hook_name).get_hookimpls()
            own = [method.function for method in methods if method.plugin_name == plugin]
            code = own[0] if own else self.get_plugin(plugin)
        return Call(code, (), plugin, hook_name, 0, False)

    def author_of(self, code: Any) -> str | None:
        """The registered plugin whose file a function, or the class of an object, is from."""
        try:
            filename, _ = source_of(code)
        except Exception:  # an object that answers to every name
            return None
        return self._owner(filename)

    def culprit(self, error: BaseException) -> tuple[str, str] | None:
        """The plugin in whose code ``error`` was raised, deepest first, and the function's name."""
        for frame, _ in reversed(list(frames_of(error))):
            owner = self._owner(frame.f_code.co_filename)
            if owner is not None:
                return owner, frame.f_code.co_name
        return None

    def _owner(self, filename: str) -> str | None:
        for name, plugin in self.list_name_plugin() if filename else ():
            if is_code_of(filename, source_of(plugin)[0]):
                return name
        return None

    def is_quarantined(self, plugin: str) -> bool:
        record = self.records.get(plugin)
        return record is not None and record.state == "quarantined"

    def callback_failed(self, plugin: str, function: Any, error: BaseException) -> None:
        """Count a failure of something that the plugin gave to others to call. Raises as a call of
        a hook does."""
        self._raised(Call(function, (), plugin, self.callback_name(function), 0, False), error)

    @staticmethod
    def callback_name(function: Any) -> str:
        """What stands for the hook where a function that was given to others fails."""
        return f"{getattr(function, '__name__', type(function).__name__)} (a callback)"

    def settle(self) -> None:
        """Count what handlers and filters of logging have raised since the last call, and raise
        what the policy makes of it. (A log call itself never raises it.)"""
        # What is told here goes through the same handlers: that is left to the next call.
        errors, self._log_errors = self._log_errors, []
        for error in errors:
            found = self.culprit(error)
            if found is None:
                text = one_line(error)
                self._tell_once(text, f"a handler or filter of logging failed: {text}")
            elif not self.is_quarantined(found[0]):
                plugin, function = found
                code: Any = self.get_plugin(plugin)
                self._failed(Call(code, (), plugin, f"{function} (logging)", 0, False), error)

    def note_log_error(self, error: BaseException) -> None:
        """Keep, for :meth:`settle`, what a foreign handler or filter of logging has raised."""
        if len(self._log_errors) < MAX_LOG_ERRORS:
            self._log_errors.append(error)

    def _raised(self, call: Call, error: BaseException) -> None:
        """What an implementation raised: raise what the guard lets through, unless it has to wait
        for the other processes, and count the rest."""
        if isinstance(error, StopTraining) and self.stop_together is not None:
            self.stop_together(error.reason)
        elif self.lets_through(error):
            raise error
        else:
            self._failed(call, error)

    def lets_through(self, error: BaseException) -> bool:
        """Is it what no guard keeps: a plugin stops the run, a person, or this manager?"""
        return isinstance(error, PASSES) or self.ends_run(error)

    def ends_run(self, error: BaseException) -> bool:
        """Is it this manager's own word that a failure ends the run, on its way up? (A PluginError
        that a plugin raises by itself is a failure like any other.)"""
        return type(error) is PluginError and error in self._raised_here

    def _failed(self, call: Call, error: BaseException) -> None:
        policy = policy_of(call.hook)
        if policy.judges_input and isinstance(error, ConfigError):
            known = [p for p in getattr(error, "problems", ()) if isinstance(p, Problem)]
            problems = known or [Problem(one_line(error))]
            raise ConfigError(
                [replace(p, message=f"plugin {call.plugin}: {p.message}") for p in problems]
            ) from error
        record = self.records.setdefault(call.plugin, PluginRecord(call.plugin, state="active"))
        failure = record.add_failure(
            error,
            hook=call.hook,
            limit=1 if isinstance(error, HookTimeoutError) else policy.failure_limit,
            step=self.step,
            code=call.function,
        )
        at = f"plugin {failure.plugin} failed in {failure.hook} at step {failure.step}"
        message = f"{at} ({failure.where}): {failure.error}"
        outcome = f"failure {failure.count}"
        if failure.quarantined:
            self.set_state(call.plugin, "quarantined", f"{failure.error} ({failure.where})")
            outcome = "quarantined: it is not called any more"
        log.warning("%s [%s]", message, outcome)
        log.debug("%s", failure.traceback)
        fatal = None
        because = self._fatal_because(call, record)
        if because:
            fatal = PluginError(
                f"{message}; the run stops because {because}",
                plugin=failure.plugin,
                hook=failure.hook,
                where=failure.where,
            )
            self._own(fatal)
        self._tell(failure, fatal, error)

    def _fatal_because(self, call: Call, record: PluginRecord, *, to_others: bool = True) -> str:
        """Why a failure of ``call`` ends the run, or an empty string. ``to_others``: does it make a
        difference to the other processes?"""
        if self.strict:
            return "--strict"
        if record.on_failure == "required":
            return "the profile says on_failure: required"
        if self.stop_together is None or not to_others:
            return ""
        if policy_of(call.hook).fatal_among_processes:
            return "the processes of a run must train on the same loss"
        collective = (options_of(call.function) or {}).get("collective")
        if collective:
            return "every process of it must do its part of a collective hook"
        return ""

    def _tell(
        self, failure: PluginFailure, fatal: PluginError | None, error: BaseException | None
    ) -> None:
        """Fire on_plugin_failure, unless this is a failure inside it, then raise what is fatal."""
        if self._telling:
            self._pending = self._pending or fatal
            return
        self._telling = True
        stopped = None
        try:
            self.hook.on_plugin_failure(failure=failure)
        except StopTraining as stopping:
            stopped = stopping
        finally:
            self._telling = False
            pending, self._pending = self._pending, None
        stop = fatal or pending or stopped
        if stop is not None:
            raise stop from error


def policy_of(hook_name: str) -> HookPolicy:
    """The policy of a hook, or of a callback, whose name is that of no hook."""
    return POLICIES.get(hook_name, CALLBACK)


def _what(changes: Sequence[str]) -> tuple[str, ...]:
    """The names of what has changed, without the values."""
    return tuple(change.partition(" from ")[0] for change in changes)
