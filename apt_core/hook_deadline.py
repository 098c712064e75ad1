"""The deadline of hooks: a plugin that hangs is told of while it hangs."""

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
"""Seconds by which a thread may wake late without the machine having stood still."""

STOPPING_SECONDS = 1.0
"""How long the end of a run waits for the thread, which may be blocked by a handler of logging."""

NO_FAILURES = (AptError, StopTraining)
"""What says more than that it came late."""

DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd_bundle", "debugpy")
KERNEL = (
    "apt_core.plugin_manager",
    "apt_core.hook_plans",
    "apt_core.hook_wrappers",
    "apt_core.hook_deadline",
    "apt_core.discovery",
)
"""Modules whose frames are around what a plugin does."""


class HookTimeoutError(TimeoutError):
    """A hook has returned after its deadline."""


class Running:
    """A call that has not returned, since ``since``; ``outer`` is the one in which it was made. One
    object serves all the calls of a hook, one after the other. ``judged`` says whether being late
    is a failure; ``counted`` are the seconds in which the process was seen to run, ``due`` those at
    which the next report is."""

    __slots__ = ("call", "counted", "deadline", "due", "judged", "limit", "outer", "since")

    def __init__(self, call: Call, deadline: HookDeadline) -> None:
        self.call, self.deadline, self.outer = call, deadline, deadline.running
        self.limit = self.due = deadline.seconds
        self.judged = True
        self.since, self.counted = time.monotonic(), 0.0

    def judge(self) -> None:
        """The call has returned. Raises HookTimeoutError where that was after the deadline."""
        late = self.deadline.late(self)
        if late is not None:
            raise late

    def failed(self, error: BaseException) -> BaseException:
        """The call has raised ``error``: that, or a HookTimeoutError where it was late too."""
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
    """Watches the calls that one thread makes of plugins, from another thread.

    ``position`` says where the run is, ``may_last`` whether a hook is told of only. Time in which
    the process was stopped, or a debugger has it, does not count.
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
        """A call begins; None where another thread makes it, which is not watched."""
        if threading.get_ident() != self._thread:
            return None
        self.running = running = Running(call, self)
        return running

    def late(self, running: Running) -> HookTimeoutError | None:
        """What to make of a call that is over: an error where it took too long, and may not."""
        if time.monotonic() - running.since < self.seconds:
            return None
        self._count(running)
        if running.counted < self.seconds:
            return None
        if running.outer is not None:  # it is not blamed for what was called in it
            running.outer.since, running.outer.counted = time.monotonic(), 0.0
        taken = f"{running.counted:.3g} seconds"
        running.since = time.monotonic()  # said once
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
                # One that computes without letting go of the interpreter lets nobody look.
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
        """Of the thread that is watched, the innermost first."""
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
            return  # it has returned meanwhile: the stack is another one's
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
    """Raise HookTimeoutError for what is late inside, if it is ``judged``; else only tell."""
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
