"""Histograms of weights and gradients, which the loop makes and the tracker's thread takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BINS = 64
WAITING = 4
"""Sets of histograms that may wait for the thread; older ones are dropped."""


@dataclass(frozen=True)
class Histogram:
    """``counts`` [BINS] of the values between ``edges`` [BINS + 1], with their sums."""

    name: str
    counts: list[float]
    edges: list[float]
    total: float
    squares: float


class Histograms:
    """Makes histograms at every so many steps; 0 makes none."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._made: deque[tuple[int, list[Histogram]]] = deque(maxlen=WAITING)

    def make(self, step: int, model: Any) -> None:
        """Make those of a step's end, where they are due. Waits for the device."""
        if not self._every or step % self._every:
            return
        made = []
        for name, parameter in model.named_parameters():
            for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
                histogram = None if values is None else _histogram(f"{kind}/{name}", values)
                if histogram is not None:
                    made.append(histogram)
        self._made.append((step, made))

    def take(self) -> Iterator[tuple[int, list[Histogram]]]:
        """Those that were made since the last time, by step."""
        while self._made:
            yield self._made.popleft()


def _histogram(name: str, values: Any) -> Histogram | None:
    """The histogram of a tensor's finite values; of a sharded one, those of this process."""
    import torch

    with torch.no_grad():
        local = getattr(values, "to_local", lambda: values)().detach().float().flatten()
        finite = local[torch.isfinite(local)]
        if not finite.numel():
            return None
        low, high, total, squares = torch.stack(
            (finite.min(), finite.max(), finite.sum(), finite.square().sum())
        ).tolist()
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(finite, BINS, low, high).tolist()
    width = (high - low) / BINS
    edges = [low + width * index for index in range(BINS)] + [high]
    return Histogram(name, counts, edges, total, squares)
