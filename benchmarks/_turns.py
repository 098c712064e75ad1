"""Times loops that cannot be split into calls: each runs in a thread, a few steps at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Semaphore, Thread
from time import perf_counter_ns, process_time_ns
from typing import Generic, TypeVar

from _harness import Timings

Result = TypeVar("Result")
Loop = Callable[[Callable[[], None]], Result]
"""A whole run of a trainer. It calls its argument once a step, where it fetches a batch."""


class _Abandoned(BaseException):
    """Raised in a loop to end it; no Exception, which the loop might catch."""


class Turns(Generic[Result]):
    """A loop in a thread of its own, which waits except in its turns.

    ``start()`` runs it to its first batch, ``turn()`` for the next ``steps`` steps, from batch to
    batch; ``finish()`` runs it to its end and returns its result. These methods raise the errors of
    the loop. ``abandon()`` ends the loop early and frees what it holds.
    """

    def __init__(self, loop: Loop[Result], steps: int) -> None:
        self._loop, self._steps = loop, steps
        self._may_go, self._has_stopped = Semaphore(0), Semaphore(0)
        self._left, self._free, self._ended = 0, False, False
        self._abandoned = False
        self._started = self._spent = (0, 0)
        self._results: list[Result] = []
        self._error: BaseException | None = None
        # A daemon thread: a loop that does not end would keep the process from exiting.
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._wait(ends=False)

    def turn(self) -> tuple[int, int]:
        """Run one turn; return its CPU time, of all threads, and its wall-clock time in ns.

        Raises RuntimeError where the loop ends before its turn does.
        """
        self._may_go.release()
        self._wait(ends=False)
        return self._spent

    def finish(self) -> Result:
        self._free = True
        self._may_go.release()
        self._wait(ends=True)
        return self._results[0]

    def abandon(self) -> None:
        if self._thread.ident is None or self._ended:
            return
        self._abandoned = True
        self._may_go.release()
        self._thread.join()

    def _wait(self, *, ends: bool) -> None:
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error
        if self._ended and not ends:
            raise RuntimeError("a loop took fewer steps than were to be timed")

    def _run(self) -> None:
        try:
            self._results.append(self._loop(self._fetched))
        except BaseException as error:
            self._error = error
        self._ended = True
        self._has_stopped.release()

    def _fetched(self) -> None:
        if self._abandoned:
            raise _Abandoned
        if self._left:
            self._left -= 1
            return
        if self._free:
            return
        cpu, wall = process_time_ns(), perf_counter_ns()
        self._spent = cpu - self._started[0], wall - self._started[1]
        self._has_stopped.release()
        self._may_go.acquire()
        if self._abandoned:
            raise _Abandoned
        self._left = self._steps - 1
        self._started = process_time_ns(), perf_counter_ns()


@dataclass(frozen=True)
class TurnTimings(Generic[Result]):
    """Nanoseconds per step in CPU time and in wall-clock time, and the results of the loops, which
    took ``steps`` steps."""

    cpu: Timings
    wall: Timings
    steps: int
    results: Mapping[str, Result]


def take_turns(
    loops: Mapping[str, Loop[Result]], *, baseline: str, rounds: int, warmup: int, steps: int
) -> TurnTimings[Result]:
    """Time all ``loops`` in turns of ``steps`` steps, each once a round, from another starting side
    each round. The ``baseline`` is run twice, as two loops, for the A/A comparison.

    The first ``warmup`` rounds are thrown away. A loop must take ``(rounds + warmup) * steps + 1``
    steps: the last one, which no fetch follows, is not timed. The garbage collector runs between
    rounds only. Raises the errors of loops, and RuntimeError for one that takes too few steps.
    """
    sides = {name: Turns(loop, steps) for name, loop in loops.items()}
    sides[""] = Turns(loops[baseline], steps)
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    collecting = gc.isenabled()
    try:
        for side in sides.values():
            side.start()
        for number in range(-warmup, rounds):
            gc.collect()
            gc.disable()
            start = number % len(order)
            for name in order[start:] + order[:start]:
                cpu_ns, wall_ns = sides[name].turn()
                if number >= 0:
                    cpu[name].append(cpu_ns / steps)
                    wall[name].append(wall_ns / steps)
            gc.enable()
        results = {name: side.finish() for name, side in sides.items()}
    finally:
        (gc.enable if collecting else gc.disable)()
        for side in sides.values():
            side.abandon()
    del results[""]
    taken = (rounds + warmup) * steps + 1
    return TurnTimings(
        _timings(cpu, baseline, steps), _timings(wall, baseline, steps), taken, results
    )


def _timings(samples: dict[str, list[float]], baseline: str, steps: int) -> Timings:
    again = samples.pop("")
    return Timings(samples=samples, baseline=baseline, again=again, calls=steps)
