"""Measures the parts of a step's time."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

PARTS = ("data", "forward_backward", "optimizer", "hooks")


class StepClock:
    """Adds up the seconds of each of the PARTS, until they are read.

    ``lap`` ends a stretch of time and names its part. On a CPU every step counts. A GPU works
    asynchronously, so there only a step with ``sampling`` counts, by events on the device that
    nothing waits for before :meth:`read`. ``steps`` is the number of counted steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.sampling = device, False
        self.every_step = device.type != "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._last = 0.0
        self._events: list[tuple[str, Any]] = []

    def start(self, *, sampling: bool) -> None:
        """Begin a step."""
        self.sampling = sampling
        if not self.every_step:
            if sampling:
                self._events, self.steps = [("", self._event())], 1
            return
        self.steps += 1
        self._last = perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as ``part``."""
        if not self.every_step:
            if self.sampling:
                self._events.append((part, self._event()))
            return
        now = perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Milliseconds per step by part since the last call; waits for the device."""
        if not self.every_step:
            return self._read_events()
        steps, self.steps = max(1, self.steps), 0
        milliseconds = {part: 1e3 * value / steps for part, value in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return milliseconds

    def _read_events(self) -> dict[str, float]:
        milliseconds = dict.fromkeys(PARTS, 0.0)
        torch.cuda.synchronize(self.device)
        for (_, before), (part, after) in zip(self._events, self._events[1:], strict=False):
            milliseconds[part] += before.elapsed_time(after)
        self._events, self.steps = [], 0
        return milliseconds

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
