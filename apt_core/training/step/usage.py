"""What a run takes: seconds, memory, and the share of the device's peak."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from apt_core.device import peak_memory_bytes, synchronize
from apt_core.modeling.costs import BACKWARD_AND_FORWARD
from apt_core.monitor import Throughput
from apt_core.parallel.peak import measured_peak_flops
from apt_core.parallel.world import World
from apt_core.runs.run_state import Progress

MEMORY_SECONDS = 1.0
"""Asking the system takes it up to half a millisecond."""

TIMES = ("seconds", "training_seconds", "training_tokens")


class Usage:
    """Measures the run since its start, and adds what its parts before a resume took.

    ``flops_per_token`` are those of a forward and backward of the model, None where they are not
    known.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        world: World,
        progress: Progress,
        flops_per_token: float | None,
    ) -> None:
        self._device, self._dtype = device, dtype or torch.float32
        self._world, self._progress = world, progress
        self.throughput = Throughput()
        self._started = time.perf_counter()
        self._before: dict[str, float] = {}
        self._flops_per_token = flops_per_token
        self._memory, self._memory_due = 0.0, 0.0
        self._peak_flops = 0.0

    def add_flops(self, flops: int) -> None:
        """From now on the forward of a token computes so much more."""
        if self._flops_per_token is not None:
            self._flops_per_token += BACKWARD_AND_FORWARD * flops

    def go_on(self, spent: Mapping[str, float]) -> None:
        """Go on after a part of the run that had :attr:`spent` so much when it was saved."""
        self._before = {**spent, "steps": self._progress.step, "tokens": self._progress.tokens}

    def start(self) -> None:
        """The run begins, or goes on."""
        self._started = time.perf_counter()

    def start_training(self) -> None:
        """The first step is about to be taken: what came before it is no training time."""
        self.throughput = Throughput()

    def pause(self) -> None:
        """What follows is no training time, until ``throughput`` is resumed; what the device has
        still to do of the steps before is."""
        synchronize(self._device)
        self.throughput.pause()

    @property
    def spent(self) -> dict[str, float]:
        """Seconds and memory that the run has taken so far, all its parts together; of the seconds
        those of training, and the tokens trained on in them."""
        tokens, training = self.throughput.overall()
        own = {
            "seconds": time.perf_counter() - self._started,
            "training_seconds": training,
            "training_tokens": tokens,
        }
        whole = {name: self._before.get(name, 0.0) + value for name, value in own.items()}
        whole["memory_mb"] = max(self._memory_mb(), self._before.get("memory_mb", 0.0))
        return whole

    def figures(self, ended: Mapping[str, Any]) -> dict[str, float]:
        """Of the run as a whole: its length in steps, tokens and seconds, speed and memory. After a
        resume ``part_…`` are of what came since. ``ended`` are the figures that the end of the run
        had recorded before it."""
        spent = self.spent
        length = {"steps": self._progress.step, "tokens": self._progress.tokens}
        figures = {**length, **_pace(spent), "memory_mb": spent["memory_mb"]}
        if self._before:
            own = {name: spent[name] - self._before.get(name, 0.0) for name in TIMES}
            part = {name: value - self._before[name] for name, value in length.items()}
            figures |= {f"part_{name}": value for name, value in {**part, **_pace(own)}.items()}
            if not part["steps"] and ended.get("steps") == length["steps"]:
                # Nothing was trained: what the end of the run has recorded stands.
                timed = ("seconds", "tokens_per_s", "memory_mb")
                figures |= {name: ended[name] for name in timed if name in ended}
        return figures

    def speed(self) -> dict[str, float]:
        """Throughput since the last call, model FLOPs utilisation, and memory, as metrics."""
        tokens_per_s = self.throughput.read()
        row = {"tokens_per_s": round(tokens_per_s, 1)}
        if self._flops_per_token is not None:
            self._peak_flops = self._peak_flops or measured_peak_flops(self._device, self._dtype)
            used = self._flops_per_token * tokens_per_s / self._world.size
            row["mfu"] = float(f"{used / self._peak_flops:.3g}")
        row["memory_mb"] = self._memory_mb()
        return row

    def _memory_mb(self) -> float:
        """The peak so far, at most MEMORY_SECONDS old."""
        now = time.monotonic()
        if now >= self._memory_due:
            self._memory_due = now + MEMORY_SECONDS
            self._memory = round(peak_memory_bytes(self._device) / 2**20, 1)
        return self._memory


def _pace(spent: Mapping[str, float]) -> dict[str, float]:
    seconds, tokens = spent["training_seconds"], spent["training_tokens"]
    return {
        "seconds": round(spent["seconds"], 2),
        "tokens_per_s": round(tokens / seconds if seconds else 0.0, 1),
    }
