"""Measures what a run uses: seconds, memory, and the share of the device's peak FLOPs."""

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
"""The interval between measurements of memory, each of which takes up to half a millisecond."""

TIMES = ("seconds", "training_seconds", "training_tokens")


class Usage:
    """Measures the run since its start, and adds what its parts before a resume used.

    ``flops_per_token`` counts a forward and backward of the model; None if it is not known.
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
        """Add ``flops`` to the FLOPs of a token's forward, after the model grew."""
        if self._flops_per_token is not None:
            self._flops_per_token += BACKWARD_AND_FORWARD * flops

    def resize(self, before: float | None, after: float | None) -> None:
        """Count with other sizes of the model, whose forward and backward take ``after`` FLOPs a
        token in place of ``before``; None if they are not known."""
        if self._flops_per_token is None or before is None or after is None:
            self._flops_per_token = None
        else:
            self._flops_per_token += after - before

    def resume(self, spent: Mapping[str, float]) -> None:
        """Add :attr:`spent` as it was saved by an earlier part of the run."""
        self._before = {**spent, "steps": self._progress.step, "tokens": self._progress.tokens}

    def start(self) -> None:
        """Start measuring, at the start of this part of the run."""
        self._started = time.perf_counter()

    def start_training(self) -> None:
        """Start counting training time, just before the first step."""
        self.throughput = Throughput()

    def pause(self) -> None:
        """Stop counting training time until ``throughput`` is resumed. Waits for the device first,
        so that its pending work counts."""
        synchronize(self._device)
        self.throughput.pause()

    @property
    def spent(self) -> dict[str, float]:
        """Seconds, seconds of training, tokens trained on in these, and peak memory of the whole
        run so far, all its parts together."""
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
        """Steps, tokens, seconds, speed and memory of the whole run; ``part_…`` are those since the
        last resume. ``ended`` are the figures recorded when the run ended before that resume."""
        spent = self.spent
        length = {"steps": self._progress.step, "tokens": self._progress.tokens}
        figures = {**length, **_pace(spent), "memory_mb": spent["memory_mb"]}
        if self._before:
            own = {name: spent[name] - self._before.get(name, 0.0) for name in TIMES}
            part = {name: value - self._before[name] for name, value in length.items()}
            figures |= {f"part_{name}": value for name, value in {**part, **_pace(own)}.items()}
            if not part["steps"] and ended.get("steps") == length["steps"]:
                # No step was taken since: keep the figures recorded then.
                timed = ("seconds", "tokens_per_s", "memory_mb")
                figures |= {name: ended[name] for name in timed if name in ended}
        return figures

    def speed(self) -> dict[str, float]:
        """Metrics of throughput since the last call, model FLOPs utilisation, and memory."""
        tokens_per_s = self.throughput.read()
        row = {"tokens_per_s": round(tokens_per_s, 1)}
        if self._flops_per_token is not None:
            self._peak_flops = self._peak_flops or measured_peak_flops(self._device, self._dtype)
            used = self._flops_per_token * tokens_per_s / self._world.size
            if used <= self._peak_flops:  # else something else ran while the peak was measured
                row["mfu"] = float(f"{used / self._peak_flops:.3g}")
        row["memory_mb"] = self._memory_mb()
        return row

    def _memory_mb(self) -> float:
        """The peak of memory so far, measured at most MEMORY_SECONDS ago."""
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
