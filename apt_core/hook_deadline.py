"""The deadline of hooks: reports a plugin that hangs, while it hangs."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from types import FrameType

from apt_core.errors import AptError, StopTraining
from apt_core.hook_plans import Call
from apt_core.log import get_logger

log = get_logger("apt.plugins")

SLACK = 1.0
"""Seconds by which a thread may wake late although the machine was not suspended."""

STOPPING_SECONDS = 1.0
"""How long the end of a run waits for the thread, which may be blocked by a handler of logging."""

NO_FAILURES = (AptError, StopTraining)
"""Errors that say more than that the call was late."""

DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd_bundle", "debugpy")
KERNEL = (
    "apt_core.plugin_manager",
    "apt_core.hook_plans",
    "apt_core.hook_wrappers",
    "apt_core.hook_deadline",
    "apt_core.discovery",
)
"""Modules whose frames surround a plugin's in a stack."""


class HookTimeoutError(TimeoutError):
    """A hook has returned after its deadline."""


class Running:
    """A call that has run since ``since``; ``outer`` is the call in which it was made. One object
    is reused for all calls of a hook. ``judged`` says whether being late is a failure; ``counted``
    are the seconds for which the process has run meanwhile, and the next report comes at ``due``
    seconds."""

    __slots__ = ("call", "counted", "deadline", "due", "judged", "limit", "outer", "since")

    def __init__(self, call: Call, deadline: HookDeadline) -> None:
        self.call, self.deadline, self.outer = call, deadline, deadline.running
        self.limit = self.due = deadline.seconds
        self.judged = True
        self.since, self.counted = time.monotonic(), 0.0

    def judge(self) -> None:
        """End the call after it has returned. Raises HookTimeoutError after the deadline."""
        late = self.deadline.late(self)
        if late is not None:
            raise late

    def failed(self, error: BaseException) -> BaseException:
        """End the call after it has raised ``error``; returns the error to handle, a
        HookTimeoutError if the call was late too."""
        late = self.deadline.late(self)
        if late is None or isinstance(error, NO_FAILURES) or not isinstance(error, Exception):
            return error
        if isinstance(error, HookTimeoutError):
            return error
        late.__cause__ = error
        return late.with_traceback(error.__traceback__)

    def end(self) -> None:
        """The calls are over."""
        self.deadline.running = self.outer


class HookDeadline:
    """Watches, on another thread, the calls of plugins that one thread makes.

    ``position`` says where the run is, ``may_last`` whether a late hook is only reported. Time in
    which the process was stopped, or a debugger has it, does not count.
    """

    def __init__(
        self,
        seconds: float,
        *,
        position: Callable[[], str],
        may_last: Callable[[str], bool],
        aloud: bool = False,
    ) -> None:
        self.seconds = seconds
        self.running: Running | None = None
        self._position, self._may_last = position, may_last
        self._level = logging.ERROR if aloud else logging.WARNING
        self._thread = threading.get_ident()
        self._last, self._cpu = time.monotonic(), time.process_time()
        self._asked = seconds / 4
        self._seen: tuple[Running, float] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._monitor = threading.Thread(
            target=copy_context().run, args=(self._watch,), name="apt-hook-deadline", daemon=True
        )

    def start(self) -> None:
        self._monitor.start()

    def stop(self) -> None:
        """End the thread, and wait for it within bounds."""
        self._ended.set()
        self._monitor.join(STOPPING_SECONDS)

    # Calls -----------------------------------------------------------------------------------

    def enter(self, call: Call) -> Running | None:
        """Begin a call; None on another thread, which is not watched."""
        if threading.get_ident() != self._thread:
            return None
        self.running = running = Running(call, self)
        return running

    def late(self, running: Running) -> HookTimeoutError | None:
        """The error for a call that took longer than it may, or None."""
        if time.monotonic() - running.since < self.seconds:
            return None
        self._count(running)
        if running.counted < self.seconds:
            return None
        if running.outer is not None:  # the outer call is not late because of this one
            running.outer.since, running.outer.counted = time.monotonic(), 0.0
        taken = f"{running.counted:.3g} seconds"
        running.since = time.monotonic()  # report once
        call = running.call
        if self._may_last(call.hook):
            log.warning("plugin %s: %s has returned after %s", call.plugin, call.hook, taken)
            return None
        return HookTimeoutError(
            f"it has returned after {taken}, training.hook_timeout is {self.seconds:g}"
        )

    # The thread ------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(self._asked):
            running = self.running
            due = self._count(running)
            if running is not None and due:
                self._report(running)
            running, asked = self.running, self.seconds / 4
            if running is not None:
                spent = running.counted
                if self._seen != (running, running.since):
                    spent = time.monotonic() - running.since
                asked = min(asked, max(running.due - spent, self.seconds / 100))
            self._asked = asked

    def _count(self, running: Running | None) -> bool:
        """Add the time since the last look to ``running``. Returns whether a report is due."""
        if not self._lock.acquire(timeout=STOPPING_SECONDS):  # in a child that was forked meanwhile
            return False
        try:
            now, cpu = time.monotonic(), time.process_time()
            passed, self._last = now - self._last, now
            computed, self._cpu = cpu - self._cpu, cpu
            if computed < passed / 2:
                # A call that does not release the interpreter's lock keeps this thread from
                # checking.
                passed = min(passed, self._asked + SLACK)
            seen = None if running is None else (running, running.since)
            known, self._seen = self._seen == seen, seen
            if running is None or self._in_debugger():
                return False
            if not known:
                running.counted, running.due = 0.0, self.seconds
                passed = min(now - running.since, passed)
            running.counted += passed
            if running.counted < running.due:
                return False
            while running.due <= running.counted:
                running.due *= 2
            return True
        finally:
            self._lock.release()

    def _frames(self) -> Iterator[FrameType]:
        """The stack of the watched thread, the innermost frame first."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            yield frame
            frame = frame.f_back

    def _in_debugger(self) -> bool:
        return any(
            str(frame.f_globals.get("__name__")).partition(".")[0] in DEBUGGERS
            for frame in self._frames()
        )

    def _report(self, running: Running) -> None:
        frames = []
        for frame in self._frames():
            if frame.f_globals.get("__name__") in KERNEL:
                break
            frames.append((frame, frame.f_lineno))
        stack = "".join(traceback.StackSummary.extract(reversed(frames)).format())
        del frames, frame
        if self.running is not running or self._seen != (running, running.since):
            return  # the call has returned meanwhile, so the stack is not its own
        call = running.call
        spared = self._may_last(call.hook) or not running.judged
        verdict = "" if spared else "; it is a failure once it returns"
        log.log(
            self._level,
            "plugin %s has been in %s for %.3g seconds%s (training.hook_timeout is %g)%s. It is "
            "at:\n%s",
            call.plugin,
            call.hook,
            running.counted,
            self._position(),
            self.seconds,
            verdict,
            stack.rstrip(),
        )


@contextmanager
def on_time(deadline: HookDeadline | None, call: Call, judged: bool = True) -> Iterator[None]:
    """Raise HookTimeoutError for a late call in the context if it is ``judged``; otherwise only
    report it."""
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
