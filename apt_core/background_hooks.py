"""Calls implementations that are marked ``background=True`` on threads beside the loop.

Each plugin has a thread of its own, which makes its calls in their order. The loop only puts a call
into the plugin's queue; where that is full, the call is dropped and counted. What went wrong on a
thread is kept until the loop asks for it, so that failures are handled where all others are.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

from apt_core.code_source import short_path, source_of
from apt_core.hook_plans import Call
from apt_core.hookspecs import policy_of
from apt_core.log import get_logger
from apt_core.process_watch import SharedState, watching_thread

log = get_logger("apt.plugins")

WAKE_SECONDS = 0.1
"""How often the end of a run looks whether it was interrupted while it waits."""

TELLS_AFTER = 2.0
"""Seconds for which the end of a run waits without a word."""


class AbandonedCallError(TimeoutError):
    """A call had not returned when its run was over."""


class Task(NamedTuple):
    """A call that waits, with its arguments and the step of the run that made it; ``telling`` says
    that it tells of a failure."""

    call: Call
    arguments: tuple[Any, ...]
    step: int
    telling: bool


@dataclass(frozen=True)
class Trouble:
    """What went wrong in a task."""

    task: Task
    error: BaseException


@dataclass(frozen=True)
class Dropped:
    """How many calls of a hook a plugin has lost since the last time, the last one in ``step``, and
    why."""

    call: Call
    step: int
    count: int
    reason: str


@dataclass
class BackgroundHooks:
    """The queues and threads of one run's plugins.

    At most ``size`` calls of a plugin wait, twice as many where the hook may last, which is seldom
    called. ``step`` returns the step of the run, ``telling`` whether a failure is being told; a
    call that takes longer than ``report_after`` seconds is reported with its stack (0: never).
    ``state`` is the state of the process that all threads share, as it is to be.
    """

    size: int
    report_after: float
    step: Callable[[], int]
    telling: Callable[[], bool]
    state: SharedState = field(default_factory=SharedState)
    _workers: dict[str, _Worker] = field(default_factory=dict, init=False)
    _ended: bool = field(default=False, init=False)
    _waits_since: float | None = field(default=None, init=False)
    _told: _Worker | None = field(default=None, init=False)

    def deferred(self, call: Call) -> Callable[..., None]:
        """What stands for the implementation in a plan: it queues a call with its arguments."""

        @wraps(call.function)
        def put(*arguments: Any) -> None:
            self._put(Task(call, arguments, self.step(), self.telling()))

        return put

    def _put(self, task: Task) -> None:
        if self._ended:
            return
        worker = self._workers.get(task.call.plugin)
        if worker is None:
            worker = self._workers[task.call.plugin] = _Worker(task.call.plugin)
        worker.put(task, self.size * (2 if policy_of(task.call.hook).may_last else 1))

    # What the loop asks -----------------------------------------------------------------------

    def take_troubles(self) -> Iterator[Trouble]:
        """What went wrong since the last time, in the order of each plugin's calls."""
        for worker in list(self._workers.values()):
            while worker.troubles:
                yield worker.troubles.popleft()

    def take_changes(self) -> Iterator[tuple[Task, list[str]]]:
        """What calls since the last time have left changed in the process, as texts, put back. To
        be asked where the loop itself has changed nothing."""
        for worker in list(self._workers.values()):
            while worker.suspected:
                task, states = worker.suspected.popleft()
                if changes := self.state.put_back(states):
                    yield task, changes

    def take_dropped(self) -> list[Dropped]:
        """The calls that were dropped since the last time, by plugin and hook."""
        return [each for worker in self._workers.values() for each in worker.take_dropped()]

    def running(self) -> list[Call]:
        """The calls that are being made, or were since the last time that this was asked."""
        return [call for worker in self._workers.values() for call in worker.take_seen()]

    def forget(self, plugin: str) -> None:
        """Make no more of the plugin's calls that wait: it is quarantined."""
        if plugin in self._workers:
            self._workers[plugin].clear()

    def report_late(self) -> None:
        """Log each call that has not returned for so long, once, with its stack."""
        if not self.report_after:
            return
        for worker in self._workers.values():
            late = worker.late(self.report_after)
            if late is not None:
                task, seconds = late
                log.warning(
                    "plugin %s has been in %s of step %d, in the background, for %.3g seconds "
                    "(training.hook_timeout is %g): the run goes on, and %d calls wait. It is "
                    "at:\n%s",
                    task.call.plugin,
                    task.call.hook,
                    task.step,
                    seconds,
                    self.report_after,
                    worker.waits,
                    worker.stack() or "(it has returned)",
                )

    def drained(self, until: float) -> bool:
        """Wait until all calls are made or the monotonic clock is ``until``. Returns False earlier
        where something went wrong that is to be handled meanwhile."""
        for worker in list(self._workers.values()):
            while not worker.idle.wait(max(0.0, min(WAKE_SECONDS, until - time.monotonic()))):
                now = time.monotonic()
                if now >= until:
                    return True
                if worker.troubles:
                    return False
                if now - self._began_to_wait(now) >= TELLS_AFTER and worker is not self._told:
                    self._told = worker
                    log.info(
                        "waiting for plugin %s, which has %d calls in the background to make, at "
                        "most %.0f seconds (training.background_timeout)",
                        worker.plugin,
                        worker.waits + 1,
                        until - now,
                    )
        return not any(worker.troubles for worker in self._workers.values())

    def _began_to_wait(self, now: float) -> float:
        self._waits_since = now if self._waits_since is None else self._waits_since
        return self._waits_since

    def end(self, seconds: float) -> list[Trouble]:
        """Let no call be queued any more, and end the threads. A call that is not over is left
        behind as a failure after ``seconds`` of waiting, and those that wait are dropped."""
        self._ended = True
        troubles = []
        for worker in self._workers.values():
            left = worker.end()
            if left is not None:
                at = worker.place(left.call)
                where = f", and is at {at}" if at else ""
                text = f"it has not returned {seconds:g} seconds after the run was over{where}"
                troubles.append(Trouble(left, AbandonedCallError(text)))
        return troubles


class _Worker:
    """The queue and the thread of one plugin."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.troubles: deque[Trouble] = deque()
        self.suspected: deque[tuple[Task, Sequence[str]]] = deque()
        self.idle = threading.Event()
        self._waiting: deque[Task] = deque()
        self._changed = threading.Condition()
        self._running: Task | None = None
        self._since = 0.0
        self._seen: dict[str, Call] = {}
        self._told: Task | None = None
        self._dropped: dict[tuple[str, str], Dropped] = {}
        self._ended = False
        self.idle.set()
        # The context says to which run belongs what is logged.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._work,),
            name=f"apt-background-{plugin}",
            daemon=True,
        )
        self._thread.start()

    @property
    def waits(self) -> int:
        return len(self._waiting)

    # On the thread of the run -----------------------------------------------------------------

    def put(self, task: Task, room: int) -> None:
        with self._changed:
            if len(self._waiting) >= room:
                self._drop(task, f"{room} calls wait already")
                return
            self._waiting.append(task)
            self.idle.clear()
            self._changed.notify()

    def clear(self) -> None:
        with self._changed:
            self._waiting.clear()
            if self._running is None:
                self.idle.set()

    def end(self) -> Task | None:
        """End the thread; returns the call that is not over."""
        with self._changed:
            self._ended = True
            for task in self._waiting:
                self._drop(task, "the run was over")
            self._waiting.clear()
            self._changed.notify()
            left = self._running
        if left is None:
            self._thread.join()
        return left

    def _drop(self, task: Task, reason: str) -> None:
        key = task.call.hook, reason
        before = self._dropped.get(key)
        count = 1 if before is None else before.count + 1
        self._dropped[key] = Dropped(task.call, task.step, count, reason)

    def take_dropped(self) -> list[Dropped]:
        with self._changed:
            taken, self._dropped = list(self._dropped.values()), {}
        return taken

    def take_seen(self) -> list[Call]:
        with self._changed:
            seen, self._seen = self._seen, {}
            if self._running is not None:
                seen[self._running.call.hook] = self._seen[self._running.call.hook] = (
                    self._running.call
                )
        return list(seen.values())

    def late(self, seconds: float) -> tuple[Task, float] | None:
        """The call that has run for longer than ``seconds``, and for how long; each once."""
        task, spent = self._running, time.monotonic() - self._since
        if task is None or task is self._told or spent < seconds:
            return None
        self._told = task
        return task, spent

    def stack(self) -> str:
        """Where the thread is, without the frames of this module."""
        frames = [
            entry
            for entry in traceback.extract_stack(self._frame())
            if entry.filename not in (__file__, threading.__file__)
        ]
        return "".join(traceback.format_list(frames)).rstrip()

    def place(self, call: Call) -> str:
        """The deepest line of the plugin that the thread is at."""
        home = source_of(call.function)[0]
        own = [e for e in traceback.extract_stack(self._frame()) if e.filename == home]
        return f"{short_path(home)}:{own[-1].lineno}" if own else ""

    def _frame(self) -> Any:
        return sys._current_frames().get(self._thread.ident or 0)

    # On the thread of the plugin --------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                if not self._waiting:
                    self.idle.set()
                while not self._waiting:
                    if self._ended:
                        return
                    self._changed.wait()
                task = self._running = self._waiting.popleft()
                self._since = time.monotonic()
                self._seen[task.call.hook] = task.call
            self._make(task)
            del task

    def _make(self, task: Task) -> None:
        states: list[str] = []
        try:
            with watching_thread(states):
                task.call.function(*task.arguments)
        except BaseException as error:  # handled by the thread of the run
            self.troubles.append(Trouble(task, error))
        # A hook or a forward may have changed them for a moment, so the loop decides later.
        if states:
            self.suspected.append((task, states))
