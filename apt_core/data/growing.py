"""The order of the data of a run that begins while its store is still being built.

The windows that are known are gone through once, in an order of their own. Whenever they are used
up, the run *looks*: windows that have come since are gone through next; where there are none, all
known ones once more. After a look that finds the whole store, epochs of all windows follow. What
the looks have found is recorded, so that the windows of a step are a function of the seed, the
step and the looks.
"""

from __future__ import annotations

from bisect import bisect_right
from math import inf

import numpy as np

from apt_core.data.looks import Look
from apt_core.data.order import Drawn, Order, StepPlan, windows_in_order
from apt_core.data.permutation import mixed


class GrowingOrder(Order):
    """The windows of each step of a run with ``steps``, as far as its looks tell. Threads may share
    it; :meth:`add` is called while none of them uses it."""

    def __init__(self, steps: StepPlan, *, seed: int) -> None:
        super().__init__([""], [], steps, seed=seed)
        self.looks: list[Look] = []
        self._key = self._keys[0]
        self._begins: list[int] = []
        """The first place of the windows that follow each look."""

    @property
    def known_steps(self) -> float:
        """The steps whose windows are known."""
        if not self.looks:
            return 0
        if self.looks[-1].whole:
            return inf
        last = self.looks[-1]
        return (self._begins[-1] + last.stop - last.start) // self.steps.windows_per_step

    def next_look(self, step: int, windows: int, shards: int, *, whole: bool, sha256: str) -> Look:
        """What a look before ``step`` makes of a store that has so many ``windows`` now."""
        reached = max((look.stop for look in self.looks), default=0)
        stop = max(windows, reached)
        start = reached if stop > reached else 0
        return Look(step=step, start=start, stop=stop, shards=shards, whole=whole, sha256=sha256)

    def add(self, look: Look) -> None:
        """Go on with what a look has found."""
        if self.looks:
            last = self.looks[-1]
            self._begins.append(self._begins[-1] + last.stop - last.start)
        else:
            self._begins.append(0)
        self.looks.append(look)

    def step(self, epoch: int, index: int) -> Drawn:
        """The windows of step ``index`` (from 0), over all processes. Raises IndexError for a step
        that is not known."""
        count = self.steps.step_windows(index)
        if index >= self.known_steps:
            raise IndexError(f"the windows of step {index + 1} are not known yet")
        first = index * self.steps.windows_per_step
        parts = []
        while count:
            number = bisect_right(self._begins, first) - 1
            look, within = self.looks[number], first - self._begins[number]
            size, start, key = look.stop - look.start, look.start, mixed(self._key, number)
            if within >= size:  # of a whole store, epochs of all its windows follow
                rounds, within = divmod(within - size, look.stop)
                size, start, key = look.stop, 0, mixed(self._key, number + 1 + rounds)
            taken = min(count, size - within)
            parts.append(start + windows_in_order(within, taken, size, key))
            first, count = first + taken, count - taken
        windows = np.concatenate(parts)
        return Drawn(np.zeros(len(windows), np.int64), windows)
