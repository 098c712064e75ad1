"""The order of the data: which windows an optimizer step sees, as a pure function of its number.

A step takes ``windows_per_step`` windows; the last one of an epoch may take fewer. Of one source,
an epoch sees each window once. Of a mixture, an epoch has as many windows as its sources have
together; each source is gone through at its own pace, all its windows once before any again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from threading import Lock
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from apt_core.data.permutation import mixed, permuted

Ints = npt.NDArray[Any]

CYCLE = 4096
"""The windows over which a mixture keeps its weights as exactly as whole numbers can."""

BLOCK = 4096
"""The places whose windows are computed at once."""


class StepPlan:
    """Counts the steps, windows and tokens of a run with ``num_windows`` windows of ``seq_len``
    tokens in an epoch. A window counts as ``seq_len`` tokens, whatever of it is padding."""

    def __init__(self, num_windows: int, *, seq_len: int, windows_per_step: int) -> None:
        self.num_windows, self.seq_len = num_windows, seq_len
        self.windows_per_step = windows_per_step
        self.steps_per_epoch = -(-num_windows // windows_per_step)
        self.tokens_per_epoch = num_windows * seq_len

    def windows_before(self, index: int) -> int:
        """The windows of an epoch in the steps before step ``index`` (from 0)."""
        return min(index * self.windows_per_step, self.num_windows)

    def step_windows(self, index: int) -> int:
        """The number of windows, over all processes, of step ``index`` (from 0) of an epoch.

        Raises IndexError for a step that an epoch does not have.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"step {index} of an epoch of {self.steps_per_epoch} steps")
        return self.windows_before(index + 1) - self.windows_before(index)

    def step_tokens(self, index: int) -> int:
        """The tokens of step ``index`` (from 0) of an epoch, over all processes."""
        return self.step_windows(index) * self.seq_len

    def tokens_before(self, index: int) -> int:
        """The tokens in the steps of an epoch before step ``index``."""
        return self.windows_before(index) * self.seq_len


class Drawn(NamedTuple):
    """The windows of a step: of which source each is, and which of its windows; both int64 [n]."""

    sources: Ints
    windows: Ints


class Segment(NamedTuple):
    """From ``first_step`` (from 1) on, the sources of a mixture have these weights."""

    first_step: int
    weights: tuple[float, ...]


class Order:
    """The windows of each step, of sources with ``names`` and ``sizes`` (numbers of windows).

    ``segments`` are the weights of a mixture in the order of steps, the first from step 1 on; a
    lone source needs none. Its memory does not depend on the number of windows. Threads may
    share it.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        steps: StepPlan,
        *,
        seed: int,
        segments: Sequence[Segment] = (),
    ) -> None:
        self.names, self.sizes, self.steps, self.seed = list(names), list(sizes), steps, seed
        self._keys = [mixed(seed, crc32(name.encode())) for name in names]
        self._segments = list(segments)
        self._firsts = [segment.first_step for segment in segments]
        self._before: list[Ints] = [np.zeros(len(sizes), dtype=np.int64)]
        self._lock = Lock()  # of what is computed on demand: threads make batches ahead

    def step(self, epoch: int, index: int) -> Drawn:
        """The windows of step ``index`` (from 0) of ``epoch`` (from 1), over all processes. Raises
        IndexError for a step that the epoch does not have."""
        count, first = self.steps.step_windows(index), self.steps.windows_before(index)
        if len(self.sizes) == 1:
            key = mixed(self._keys[0], epoch - 1)
            return Drawn(
                np.zeros(count, np.int64), windows_in_order(first, count, self.sizes[0], key)
            )
        number = bisect_right(self._firsts, (epoch - 1) * self.steps.steps_per_epoch + index + 1)
        return self._mixed(number - 1, self._slots_before(epoch, index), count)

    def drawn_before(self, step: int) -> Ints:
        """The windows that each source gives in the steps of the run before ``step`` (from 1)."""
        epoch, index = divmod(step - 1, self.steps.steps_per_epoch)
        slot = self._slots_before(epoch + 1, index)
        if len(self.sizes) == 1:
            return np.array([slot], dtype=np.int64)
        segment = max(0, bisect_right(self._firsts, step) - 1)
        return self._given_before(segment) + self._given_in(segment, slot)

    @property
    def known_steps(self) -> float:
        """The steps whose windows are known."""
        return inf

    def weights(self, step: int) -> tuple[float, ...]:
        """The weight of each source of a mixture in ``step`` (from 1) of the run."""
        return self._segments[bisect_right(self._firsts, step) - 1].weights

    @property
    def changes(self) -> list[int]:
        """The steps from which on the weights of a mixture are others than before."""
        return self._firsts[1:]

    def _mixed(self, segment: int, first_slot: int, count: int) -> Drawn:
        cycle = _cycle(self._segments[segment].weights)
        offset = self._offset(segment)
        here = first_slot - self._first_slot(segment) + offset
        slots = np.arange(here, here + count)
        sources = cycle.sources[slots % CYCLE]
        # What the source gave before: in earlier segments, and in this one.
        given = self._given_before(segment)
        before = cycle.counts * (slots // CYCLE)[:, None] + cycle.before[slots % CYCLE]
        begun = cycle.before[offset]
        windows = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            places = given[source] + before[chosen, source] - begun[source]
            windows[chosen] = self._windows(int(source), places)
        return Drawn(sources, windows)

    def _windows(self, source: int, places: Ints) -> Ints:
        """The windows that ``source`` gives at these places of its own sequence."""
        size, key = self.sizes[source], self._keys[source]
        found = np.empty(len(places), dtype=np.int64)
        rounds, within = np.divmod(places, size)
        for number in np.unique(rounds).tolist():
            chosen = rounds == number
            found[chosen] = _in_round(within[chosen], size, mixed(key, number))
        return found

    def _slots_before(self, epoch: int, index: int) -> int:
        return (epoch - 1) * self.steps.num_windows + self.steps.windows_before(index)

    def _first_slot(self, segment: int) -> int:
        epoch, index = divmod(self._firsts[segment] - 1, self.steps.steps_per_epoch)
        return self._slots_before(epoch + 1, index)

    def _offset(self, segment: int) -> int:
        """Where in the cycle a segment begins: by chance, since one that is shorter than a cycle
        would else always have what comes first."""
        return mixed(self.seed, segment) % CYCLE if segment else 0

    def _given_before(self, segment: int) -> Ints:
        """The windows that each source gave in the segments before."""
        with self._lock:
            while len(self._before) <= segment:
                last = len(self._before) - 1
                given = self._given_in(last, self._first_slot(last + 1))
                self._before.append(self._before[last] + given)
            return self._before[segment]

    def _given_in(self, segment: int, slot: int) -> Ints:
        """The windows that each source gave in a segment before ``slot`` of the run."""
        cycle, offset = _cycle(self._segments[segment].weights), self._offset(segment)
        end = slot - self._first_slot(segment) + offset
        given: Ints = cycle.counts * (end // CYCLE) + cycle.before[end % CYCLE]
        return given - cycle.before[offset]


def windows_in_order(first: int, count: int, size: int, key: int) -> Ints:
    """The permutation that ``key`` chooses, at the places ``first`` to ``first + count``."""
    block, within = divmod(first, BLOCK)
    if within + count <= BLOCK:
        return _block(block, size, key)[within : within + count]
    return _in_round(np.arange(first, first + count), size, key)


def _in_round(places: Ints, size: int, key: int) -> Ints:
    """The permutation that ``key`` chooses, at ``places``, most of which are neighbours."""
    found = np.empty(len(places), dtype=np.int64)
    blocks = places // BLOCK
    for block in range(int(blocks.min()), int(blocks.max()) + 1):
        chosen = blocks == block
        if chosen.any():
            found[chosen] = _block(block, size, key)[places[chosen] - block * BLOCK]
    return found


@lru_cache(maxsize=32)
def _block(block: int, size: int, key: int) -> Ints:
    first = block * BLOCK
    found = permuted(np.arange(first, min(first + BLOCK, size)), size, key)
    found.flags.writeable = False
    return found


class _Cycle(NamedTuple):
    """The sources of CYCLE slots in a row, the number of slots of each, and before each slot."""

    sources: Ints
    counts: Ints
    before: Ints


@lru_cache(maxsize=16)
def _cycle(weights: tuple[float, ...]) -> _Cycle:
    """The slots of each source, spread evenly; a source with any weight has one at least."""
    shares = np.array(weights, dtype=np.float64)
    exact = shares / shares.sum() * CYCLE
    counts = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := CYCLE - int(counts.sum())) != 0:
        behind = np.where(shares > 0, exact - counts, -np.inf)
        if missing > 0:
            counts[int(behind.argmax())] += 1
        else:
            counts[int(np.where(counts > 1, behind, np.inf).argmin())] -= 1
    owner = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((nth + 0.5) / counts[owner], kind="stable")
    sources = owner[order]
    taken = np.eye(len(counts), dtype=np.int64)[sources]
    return _Cycle(sources, counts, np.cumsum(taken, axis=0) - taken)
