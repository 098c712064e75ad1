"""Handles failures of plugins: counts and reports them, quarantines plugins, or ends the run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from logging import DEBUG, WARNING
from typing import Any, Protocol
from weakref import WeakSet

from apt_core.background_hooks import Dropped
from apt_core.code_source import is_code_of, source_of
from apt_core.error_text import frames_of, one_line, where_raised
from apt_core.errors import ConfigError, PluginError, Problem, StopTraining
from apt_core.event_log import EventLog
from apt_core.hook_deadline import HookTimeoutError
from apt_core.hook_plans import Call
from apt_core.hookspecs import STEP_HOOKS, policy_of
from apt_core.log import get_logger
from apt_core.plugin_objects import options_of
from apt_core.plugin_records import PluginRecord
from apt_core.types import PluginFailure

log = get_logger("apt.plugins")

PASSES = (StopTraining, KeyboardInterrupt)
"""Errors that the guard lets through, beside the PluginErrors that end a run. Any other error of a
hook is a failure of its plugin."""

MAX_LOG_ERRORS = 20
"""The most errors of logging that are kept until they are counted, since they keep frames alive."""


class Plugins(Protocol):
    """The parts of the manager that failures need: the plugins and the state of the run."""

    strict: bool
    step: int
    stop_together: Callable[[str], None] | None
    records: dict[str, PluginRecord]
    events: EventLog

    @property
    def hook(self) -> Any: ...
    def list_name_plugin(self) -> list[tuple[str, Any]]: ...
    def get_plugin(self, name: str) -> Any: ...
    def in_background(self) -> Sequence[Call]: ...
    def set_state(self, name: str, state: str, reason: str = "") -> None: ...
    def is_quarantined(self, plugin: str) -> bool: ...
    def order(self, hook_name: str) -> list[Call]: ...


class PluginFailures:
    """Counts and reports failures of plugins, and raises PluginError for those that end the run.

    A failure is isolated, and its plugin quarantined at the limit of the hook, unless --strict, the
    plugin's ``on_failure`` or the other processes of the run make it fatal: that is a PluginError.
    """

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._telling = False
        self._pending: PluginError | None = None
        self._raised_here: WeakSet[PluginError] = WeakSet()
        self._log_errors: list[BaseException] = []
        self._told: set[Hashable] = set()

    # What is raised --------------------------------------------------------------------------

    def raise_or_count(self, call: Call, error: BaseException, step: int | None = None) -> None:
        """Handle the ``error`` of an implementation: raise what the guard lets through, unless the
        other processes have to stop too, and count the rest. ``step`` is that of the call, if not
        the present one."""
        if isinstance(error, StopTraining) and self._plugins.stop_together is not None:
            self._plugins.stop_together(error.reason)
        elif self.lets_through(error):
            raise error
        else:
            self._failed(call, error, step)

    def lets_through(self, error: BaseException) -> bool:
        """Whether the guard must raise ``error``: a stop by a plugin or a person, or this manager's
        decision."""
        return isinstance(error, PASSES) or self.ends_run(error)

    def ends_run(self, error: BaseException) -> bool:
        """Whether ``error`` is the PluginError by which this manager ends the run. (One that a
        plugin raises itself is an ordinary failure.)"""
        return type(error) is PluginError and error in self._raised_here

    def _failed(self, call: Call, error: BaseException, step: int | None = None) -> None:
        policy = policy_of(call.hook)
        if policy.judges_input and isinstance(error, ConfigError):
            known = [p for p in getattr(error, "problems", ()) if isinstance(p, Problem)]
            problems = known or [Problem(one_line(error))]
            raise ConfigError(
                [replace(p, message=f"plugin {call.plugin}: {p.message}") for p in problems]
            ) from error
        record = self._record_of(call)
        failure = record.add_failure(
            error,
            hook=call.hook,
            limit=1 if isinstance(error, HookTimeoutError) else policy.failure_limit,
            step=self._plugins.step if step is None else step,
            code=call.function,
        )
        at = f"plugin {failure.plugin} failed in {failure.hook} at step {failure.step}"
        message = f"{at} ({failure.where}): {failure.error}"
        outcome = f"failure {failure.count}"
        if failure.quarantined:
            outcome = "quarantined: it is not called any more"
        self._plugins.events.record(
            "failed",
            f"{message} [{outcome}]",
            step=failure.step,
            log=log,
            level=WARNING,
            plugin=failure.plugin,
            hook=failure.hook,
            where=failure.where,
            error=failure.error,
        )
        log.debug("%s", failure.traceback)
        if failure.quarantined:
            self._quarantine(failure)
        fatal = None
        because = self._fatal_because(call, record)
        if because:
            fatal = PluginError(
                f"{message}; the run stops because {because}",
                plugin=failure.plugin,
                hook=failure.hook,
                where=failure.where,
            )
            self._mark_own(fatal)
        self._announce(failure, fatal, error)

    def _quarantine(self, failure: PluginFailure) -> None:
        reason = f"{failure.error} ({failure.where})"
        self._plugins.set_state(failure.plugin, "quarantined", reason)
        self._plugins.events.record(
            "quarantined",
            f"plugin {failure.plugin} is quarantined: {reason}",
            step=failure.step,
            log=log,
            level=DEBUG,
            plugin=failure.plugin,
            reason=reason,
        )

    def _record_of(self, call: Call) -> PluginRecord:
        known = PluginRecord(call.plugin, state="active")
        return self._plugins.records.setdefault(call.plugin, known)

    def _fatal_because(self, call: Call, record: PluginRecord, *, to_others: bool = True) -> str:
        """Why a failure of ``call`` ends the run, or an empty string. ``to_others`` says whether it
        affects the other processes."""
        if self._plugins.strict:
            return "--strict"
        if record.on_failure == "required":
            return "the profile says on_failure: required"
        if self._plugins.stop_together is None or not to_others:
            return ""
        if policy_of(call.hook).fatal_among_processes:
            return "the processes of a run must train on the same loss"
        collective = (options_of(call.function) or {}).get("collective")
        if collective:
            return "every process of it must do its part of a collective hook"
        return ""

    def _announce(
        self, failure: PluginFailure, fatal: PluginError | None, error: BaseException | None
    ) -> None:
        """Fire on_plugin_failure, unless this is a failure inside it, then raise what is fatal."""
        if self._telling:
            self._pending = self._pending or fatal
            return
        self._telling = True
        stopped = None
        try:
            self._plugins.hook.on_plugin_failure(failure=failure)
        except StopTraining as stopping:
            stopped = stopping
        finally:
            self._telling = False
            pending, self._pending = self._pending, None
        stop = fatal or pending or stopped
        if stop is not None:
            raise stop from error

    @property
    def telling(self) -> bool:
        """Whether on_plugin_failure is being called."""
        return self._telling

    @contextmanager
    def told_no_more(self) -> Iterator[None]:
        """Do not call on_plugin_failure for failures in the context, which are its own."""
        self._telling = True
        try:
            yield
        finally:
            self._telling = False
            pending, self._pending = self._pending, None
        if pending is not None:
            raise pending

    # What is raised elsewhere -----------------------------------------------------------------

    def fail(self, plugin: str, hook_name: str, error: BaseException, *, code: Any = None) -> None:
        """Count a failure of something that a plugin handed over, as if the hook had raised it.

        ``code`` is the function, class or module that failed where that is no implementation of
        the hook. Raises PluginError where the policy says that the run must stop.
        """
        self._failed(self.call_for(plugin, hook_name, code), error)

    def call_for(self, plugin: str, hook_name: str, code: Any) -> Call:
        """The call to blame for an error in ``code``, by default the implementation, that runs
        later."""
        if code is None:
            methods = getattr(self._plugins.hook, hook_name).get_hookimpls()
            own = [method.function for method in methods if method.plugin_name == plugin]
            code = own[0] if own else self._plugins.get_plugin(plugin)
        return Call(code, (), plugin, hook_name, 0, False)

    def callback_failed(self, plugin: str, function: Any, error: BaseException) -> None:
        """Count a failure of a callback that the plugin has registered elsewhere. Raises as a call
        of a hook does."""
        self.raise_or_count(
            Call(function, (), plugin, self.callback_name(function), 0, False), error
        )

    @staticmethod
    def callback_name(function: Any) -> str:
        """The name that stands for the hook in the failure of a callback."""
        return f"{getattr(function, '__name__', type(function).__name__)} (a callback)"

    def count_log_errors(self) -> None:
        """Count the errors of logging handlers and filters since the last call, and raise
        PluginError if one ends the run. (The log call itself never raises.)"""
        # Reporting here uses the same handlers: their new errors are left to the next call.
        errors, self._log_errors = self._log_errors, []
        for error in errors:
            found = self.culprit(error)
            if found is None:
                text = one_line(error)
                self._warn_once(text, f"a handler or filter of logging failed: {text}")
            elif not self._plugins.is_quarantined(found[0]):
                plugin, function = found
                code: Any = self._plugins.get_plugin(plugin)
                self._failed(Call(code, (), plugin, f"{function} (logging)", 0, False), error)

    def keep_log_error(self, error: BaseException) -> None:
        """Keep an error of a foreign logging handler or filter, which is counted later."""
        if len(self._log_errors) < MAX_LOG_ERRORS:
            self._log_errors.append(error)

    # What is left changed in the process ---------------------------------------------------

    def report_leftovers(self, changes: Sequence[str], hooks: Sequence[str] = STEP_HOOKS) -> None:
        """Report changes of the process that were put back after calls of ``hooks``, or of
        callbacks. Raises PluginError as a call of a hook does."""
        self.report_leftovers_of_one(
            [call for name in hooks for call in self._plugins.order(name)], changes
        )

    def report_leftovers_of_one(self, calls: Sequence[Call], changes: Sequence[str]) -> None:
        """Report changes left by one of the ``calls``, or, without calls, by any plugin. Calls in
        the background may have made them, too."""
        calls = [*calls, *self._plugins.in_background()] if calls else calls
        called = {call.plugin: call for call in calls}
        if len(called) == 1:
            (call,) = called.values()
            self.report_leftovers_of(call, changes)
            return
        names = ", ".join(called) or ", ".join(name for name, _ in self._plugins.list_name_plugin())
        text = f"one of the plugins {names} left changed: {'; '.join(changes)}; it is put back"
        if self._plugins.strict:
            where = ", ".join(dict.fromkeys(call.hook for call in calls))
            stop = f"{text}; the run stops because --strict"
            raise self._mark_own(PluginError(stop, plugin=names, hook=where))
        self._warn_once((tuple(called), _names_of(changes)), text)

    def report_leftovers_of(
        self, call: Call, changes: Sequence[str], step: int | None = None
    ) -> None:
        """Report changes left by this ``call``, which was made in ``step``, by default now."""
        step = self._plugins.step if step is None else step
        where = where_raised(Exception(), *source_of(call.function))
        at = f"plugin {call.plugin} left changed in {call.hook} at step {step}"
        text = f"{at} ({where}): {'; '.join(changes)}"
        record = self._record_of(call)
        because = self._fatal_because(call, record, to_others=False)
        if because:
            stop = PluginError(
                f"{text}; the run stops because {because}",
                plugin=call.plugin,
                hook=call.hook,
                where=where,
            )
            raise self._mark_own(stop)
        what = call.plugin, call.hook, _names_of(changes)
        error = f"left changed: {'; '.join(changes)}"
        told = {"plugin": call.plugin, "hook": call.hook, "where": where, "error": error}
        if self._warn_once(what, f"{text}; it is put back", **told):
            left = PluginFailure(
                plugin=call.plugin,
                hook=call.hook,
                step=step,
                error=error,
                where=where,
                count=len(record.failures) + len(record.leftovers) + 1,
                quarantined=False,
                traceback="",
            )
            record.leftovers.append(left)
            self._announce(left, None, None)

    def report_dropped(self, dropped: Dropped) -> None:
        """Count calls in the background that were not made, and report the first of a hook. Raises
        PluginError where a failure of the plugin ends the run."""
        call, record = dropped.call, self._record_of(dropped.call)
        before = record.dropped.get(call.hook, 0)
        record.dropped[call.hook] = before + dropped.count
        because = self._fatal_because(call, record, to_others=False)
        text = _lost(call.plugin, call.hook, dropped.count, dropped.reason)
        if not before:
            self._record_dropped(call.plugin, call.hook, dropped.count, dropped.reason, text)
        if because:
            stop = f"{text}; the run stops because {because}"
            raise self._mark_own(PluginError(stop, plugin=call.plugin, hook=call.hook))

    def report_all_dropped(self) -> None:
        """Report how many calls in the background were not made in the whole run."""
        for record in self._plugins.records.values():
            for hook, count in record.dropped.items():
                reason = "in the whole run"
                self._record_dropped(
                    record.name, hook, count, reason, _lost(record.name, hook, count, reason)
                )

    def _record_dropped(self, plugin: str, hook: str, count: int, reason: str, text: str) -> None:
        self._plugins.events.record(
            "dropped",
            text,
            step=self._plugins.step,
            log=log,
            level=WARNING,
            plugin=plugin,
            hook=hook,
            count=count,
            reason=reason,
        )

    def _warn_once(self, what: Hashable, text: str, **data: str) -> bool:
        if what in self._told:
            return False
        self._told.add(what)
        self._plugins.events.record(
            "failed",
            text,
            step=self._plugins.step,
            log=log,
            level=WARNING,
            **{"error": text, **data},
        )
        return True

    def _mark_own(self, error: PluginError) -> PluginError:
        self._raised_here.add(error)
        return error

    # What a checkpoint keeps ---------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Failures and quarantines, as JSON values, for the checkpoint."""
        return {
            name: {
                "state": record.state,
                "reason": record.reason,
                "failures": [asdict(failure) for failure in record.failures],
            }
            for name, record in self._plugins.records.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore failures and quarantines of the plugins that are active now."""
        for name, record in self._plugins.records.items():
            if name in state:
                saved = state[name]
                record.failures = [PluginFailure(**failure) for failure in saved["failures"]]
                if saved["state"] == "quarantined":
                    self._plugins.set_state(name, "quarantined", saved["reason"])

    # Whose code it is ----------------------------------------------------------------------

    def author_of(self, code: Any) -> str | None:
        """The registered plugin in whose file a function, or the class of an object, is defined."""
        try:
            filename, _ = source_of(code)
        except Exception:  # an object that has every attribute
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
        for name, plugin in self._plugins.list_name_plugin() if filename else ():
            if is_code_of(filename, source_of(plugin)[0]):
                return name
        return None


def _lost(plugin: str, hook: str, count: int, reason: str) -> str:
    times = "a call" if count == 1 else f"{count:,} calls"
    return f"plugin {plugin} has lost {times} of {hook} in the background: {reason}"


def _names_of(changes: Sequence[str]) -> tuple[str, ...]:
    """The names of the changes, without the values."""
    return tuple(change.partition(" from ")[0] for change in changes)
