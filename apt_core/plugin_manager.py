"""The plugin manager: registers plugins, and calls their hooks behind a guard.

A ``pluggy.PluginManager`` with one private touch-point, ``_hookexec``, which pluggy calls for every
hook call with the hook's implementations. Instead of pluggy's own loop it runs a cached plan: the
implementations that may run now, sorted by priority, each behind a guard that turns a failure into
a record. The plan is rebuilt when the implementations, a priority or a plugin's state changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import monotonic
from typing import Any, TypeVar

import pluggy

from apt_core import hookspecs
from apt_core.background_hooks import BackgroundHooks, Trouble
from apt_core.errors import ConfigError, Problem
from apt_core.event_log import EventLog
from apt_core.hook_deadline import HookDeadline, on_time
from apt_core.hook_plans import Call, HookPlans, Plan
from apt_core.hook_wrappers import Owned, run_wrapped, values_of
from apt_core.hookspecs import REACHES_WEIGHTS, hooks_where, policy_of
from apt_core.markers import PROJECT, HookPolicy
from apt_core.plugin_checks import check_plugin_object, hooks_beside_class
from apt_core.plugin_failures import PluginFailures
from apt_core.plugin_names import normalized_name
from apt_core.plugin_objects import (
    canonical_name,
    implementation_options,
    make,
    plugin_class,
    plugin_info,
)
from apt_core.plugin_records import PluginRecord
from apt_core.process_watch import Watch
from apt_core.requirements import unmet
from apt_core.types import CORE, PluginInfo, RewrittenPrompt

T = TypeVar("T")


class PluginManager(pluggy.PluginManager):
    """Registers plugins and calls their hooks.

    ``manager.hook.on_step_end(step=…, loss=…, trainer=…)`` calls a hook as in any pluggy project.
    ``strict`` makes the first failure of any plugin fatal. ``listing`` allows plugins that
    conflict, for lists of all plugins. ``step`` is the position that failures are recorded with;
    the trainer moves it. In a run of several processes it sets ``stop_together``, which is called
    with the reason if a hook raises StopTraining, since all processes must stop at the same step. A
    loss term or a collective implementation that fails is fatal there. A run sets ``watch`` too,
    which puts back what a call changes in the process. ``events`` records what happens, also before
    the run has a folder.
    """

    def __init__(self, *, strict: bool = False, listing: bool = False) -> None:
        super().__init__(PROJECT)
        self.strict = strict
        self.listing = listing
        self.step = 0
        self.stop_together: Callable[[str], None] | None = None
        self.watch: Watch | None = None
        self.deadline: HookDeadline | None = None
        self.background: BackgroundHooks | None = None
        self.records: dict[str, PluginRecord] = {}
        self.events = EventLog()
        self.plans = HookPlans(self.records)
        self._plans = self.plans.known  # saves a look-up in every call
        self.failures = PluginFailures(self)
        self._facts: dict[str, PluginInfo] = {}
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
        if cls is not None:
            problems = unusable + hooks_beside_class(plugin, name)
            if problems:  # what it needs to be made may be missing
                raise ConfigError(problems)
            plugin = make(cls, name)
        problems = check_plugin_object(plugin, name, self._specs())
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
        self.plans.forget()
        return plugin

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return implementation_options(plugin, name)

    def _specs(self) -> dict[str, Any]:
        return {name: caller.spec for name, caller in vars(self.hook).items() if caller.spec}

    # State -----------------------------------------------------------------------------------

    def set_priority(self, name: str, priority: int | None) -> None:
        """Let all implementations of a plugin run at ``priority`` (None: their own again)."""
        self.records[name].priority = priority
        self.plans.forget()

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        record = self.records[name]
        record.state, record.reason = state, reason
        self.plans.forget()

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
            plan = self.plans.plan(hook_name, methods)
        if plan[1]:
            return values_of(self._wrapped(plan, kwargs, firstresult), firstresult)
        owned = self._all(plan, kwargs, firstresult) if plan[2] else None
        if not owned:
            return None if firstresult else []
        return values_of(owned, firstresult)

    def _all(self, plan: Plan, kwargs: Mapping[str, object], firstresult: bool) -> list[Owned]:
        """The results of the implementations other than wrappers; called in every step."""
        owned: list[Owned] = []
        _, _, calls, returns, seconds, in_step, sets_modes = plan
        watch = each = self.watch
        before = unchanged = None
        known = False
        if watch is not None and in_step and watch.stepping:
            known = True
            if watch.checks_each_call:
                unchanged = watch.unchanged
            else:  # Compared once for all calls: comparing after each costs more than they do.
                each = None
        running = None if self.deadline is None or not calls else self.deadline.enter(calls[0])
        timed = in_step and self.plans.timing
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
                    # A local name for the error would keep its frames and their tensors alive.
                    self.failures.raise_or_count(
                        call, error if running is None else running.failed(error)
                    )
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
                watch.accept_modes()
        return owned

    def _plan_of(self, hook_name: str) -> Plan:
        methods = getattr(self.hook, hook_name).get_hookimpls()
        plan = self._plans.get(hook_name)
        return plan if plan and plan.methods == methods else self.plans.plan(hook_name, methods)

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
            self.failures.raise_or_count,
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

    def chain(self, hook_name: str, request: Any, attribute: str, **others: Any) -> Any:
        """Pass ``request`` along the implementations: each result becomes its ``attribute``.

        A result may bring sources along, which are added to the request's. Returns the last
        request. ``request`` is a dataclass and is not changed in place. ``others`` are the hook's
        further arguments.
        """
        plan = self._plan_of(hook_name)

        def inner() -> list[Owned]:
            owner, current = "", request
            for call in plan.calls:
                value = self._guarded(call, {"request": current, **others}, plan)
                if value is not None:
                    owner, current = call.plugin, _replaced(current, attribute, value)
            return [(owner, _added_to(request, current, attribute))]

        given, failed = {"request": request, **others}, self.failures.raise_or_count
        ((_, value),) = run_wrapped(plan, given, True, inner, failed, self._watching)
        return _replaced(request, attribute, value)

    def attempt(self, plugin: str, hook_name: str, function: Callable[[], T]) -> T | None:
        """Call ``function``, which uses a result of the hook. Returns its result, or None after an
        error, which counts as a failure of the plugin in that hook. Raises as a call of the hook
        does."""
        call = self.failures.call_for(plugin, hook_name, None)
        try:
            with self._watching(call):
                return function()
        except BaseException as error:
            self.failures.raise_or_count(call, error)
            return None

    # What calls leave behind -----------------------------------------------------------------

    @contextmanager
    def watching(
        self, plugin: str, what: str, code: Any = None, *, judged: bool = False
    ) -> Iterator[None]:
        """Put back changes of the process made in the context, and attribute them to the plugin.
        ``what`` names the part of the plugin that runs, if it is not a hook, and ``code`` its code;
        the plugin may be registered inside. If it is ``judged``, HookTimeoutError is raised after
        the deadline."""
        watch = self.watch
        before = watch.before() if watch else None
        try:
            with on_time(self.deadline, Call(code, (), plugin, what, 0, False), judged):
                yield
        finally:
            changes = watch.put_back(before) if watch else ()
            if changes:
                code = self.get_plugin(plugin) if code is None else code
                self.failures.report_leftovers_of(Call(code, (), plugin, what, 0, False), changes)

    @contextmanager
    def hook_deadline(self, seconds: float, process: str = "") -> Iterator[None]:
        """Report calls of plugins on this thread that take longer than ``seconds`` while the
        context lasts; 0 watches nothing. ``process`` names the process if it is not the first."""
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

    # Calls in the background -----------------------------------------------------------------

    @contextmanager
    def background_hooks(self, size: int, report_after: float) -> Iterator[None]:
        """Make calls of implementations that are marked ``background=True`` on threads of their own
        while the context lasts. At most ``size`` calls of a plugin wait; one that takes longer than
        ``report_after`` seconds is reported. In a context within, they are called like others."""
        self.background = BackgroundHooks(
            size, report_after, step=lambda: self.step, telling=lambda: self.failures.telling
        )
        self.plans.deferred = self.background.deferred
        self.plans.forget()
        try:
            yield
        finally:
            self.background.end(0.0)
            self.background = self.plans.deferred = None
            self.plans.forget()

    def settle_background(self) -> None:
        """Handle what went wrong in the background since the last time: failures, changes of the
        process, calls that were dropped. Raises as a call of a hook does."""
        background = self.background
        if background is None:
            return
        self.put_back_of_background()
        background.report_late()
        for trouble in background.take_troubles():
            self._handle(trouble)
        for name in self.records:
            if self.is_quarantined(name):
                background.forget(name)
        for dropped in background.take_dropped():
            self.failures.report_dropped(dropped)

    def put_back_of_background(self) -> None:
        """Put back what calls in the background have left changed in the process. To be called in
        no hook, which may have changed it for a moment. Raises as a call of a hook does."""
        if self.background is None:
            return
        for task, changes in self.background.take_changes():
            with self.failures.told_no_more() if task.telling else nullcontext():
                self.failures.report_leftovers_of(task.call, changes, task.step)

    def finish_background(self, seconds: float) -> None:
        """Make the calls that wait in the background, for at most so many ``seconds``, and end its
        threads; nothing waits for a call that is not over then. Raises as a call of a hook does."""
        background = self.background
        if background is None:
            return
        watch, until = self.watch, monotonic() + seconds
        self.put_back_of_background()
        before = None if watch is None else watch.before()
        while not background.drained(until):
            self.settle_background()
        left = background.end(seconds)
        self.put_back_of_background()
        if watch is not None and (changes := watch.put_back(before)):
            self.failures.report_leftovers_of_one(self.in_background(), changes)
        self.settle_background()
        self.failures.report_all_dropped()
        for trouble in left:
            self._handle(trouble)

    def _handle(self, trouble: Trouble) -> None:
        call, _, step, telling = trouble.task
        with self.failures.told_no_more() if telling else nullcontext():
            if not self.is_quarantined(call.plugin):
                self.failures.raise_or_count(call, trouble.error, step)

    def in_background(self) -> Sequence[Call]:
        """The calls in the background that were made since the last time that this was asked."""
        return () if self.background is None else self.background.running()

    @contextmanager
    def _watching(
        self, call: Call, *, in_step: bool = False, sets_modes: bool = False
    ) -> Iterator[None]:
        watch = self.watch
        known = watch is not None and in_step and watch.stepping
        before = None if watch is None or known else watch.before()
        try:
            with on_time(self.deadline, call):
                yield
        finally:
            if watch is not None and not (known and watch.unchanged()):
                self._put_back(watch, (call,), before, sets_modes)

    def _put_back(self, watch: Watch, calls: Sequence[Call], before: Any, sets_modes: bool) -> None:
        if changes := watch.put_back(before, sets_modes=sets_modes):
            self.failures.report_leftovers_of_one(calls, changes)

    # What plugins implement -------------------------------------------------------------------

    def is_quarantined(self, plugin: str) -> bool:
        record = self.records.get(plugin)
        return record is not None and record.state == "quarantined"

    def implements(self, plugin: str, hook_name: str) -> bool:
        """Whether a registered plugin implements the hook, whatever its state."""
        methods = getattr(self.hook, hook_name).get_hookimpls()
        return any(method.plugin_name == plugin for method in methods)

    def implements_where(self, plugin: str, applies: Callable[[HookPolicy], bool]) -> bool:
        """Whether a registered plugin implements a hook whose policy satisfies the condition."""
        return any(self.implements(plugin, hook) for hook in hooks_where(applies))

    def only_observes(self, plugin: str) -> bool:
        """Whether a registered plugin declares itself an observer, or gets no object through which
        it could change a weight."""
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

        With ``dormant``, the implementations of dormant plugins are included where they will run.
        """
        methods = getattr(self.hook, hook_name).get_hookimpls()
        calls = self.plans.in_order(hook_name, methods, dormant=dormant)
        return sorted(calls, key=lambda call: not call.wrapper)


def _replaced(request: Any, attribute: str, value: Any) -> Any:
    """``request`` with ``value`` as its ``attribute``, and with the sources that came along."""
    if isinstance(value, RewrittenPrompt):
        sources = (*request.sources, *value.sources)
        return replace(request, **{attribute: value.prompt}, sources=sources)
    return replace(request, **{attribute: value})


def _added_to(before: Any, after: Any, attribute: str) -> Any:
    """What makes the request ``after`` of the one ``before``, as an implementation returns it."""
    value, sources = getattr(after, attribute), after.sources[len(before.sources) :]
    return RewrittenPrompt(value, sources) if sources else value
