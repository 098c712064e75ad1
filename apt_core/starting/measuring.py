"""Measures what a model of a size takes on this machine: an estimate from its layers, and a short
training of it."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apt_core import hookimpl
from apt_core.data.store.local import available_cores
from apt_core.device import available_memory, held_memory, peak_memory_bytes
from apt_core.kernel import Kernel, boot
from apt_core.modeling.costs import model_cost
from apt_core.modeling.placement import settle_device
from apt_core.planning.calibration import Calibration
from apt_core.planning.footprint import Footprint
from apt_core.planning.memory import estimate
from apt_core.planning.stages import Structure
from apt_core.plugin_manager import PluginManager

TRIAL_SECONDS = 4.0
"""About the length of a trial, after its first steps."""

SKIPPED = 3
"""First steps of a trial, which are slower."""

MOST_TRIAL_STEPS = 1_000


BUSY = 0.5
"""Programs that wait for each core, from which on the machine counts as busy."""


@dataclass(frozen=True)
class Estimated:
    """Parameters, seconds per token of training on an idle machine, bytes of memory, those of torch
    included, and the threads."""

    params: int
    seconds_per_token: float
    memory: int
    threads: int


@dataclass(frozen=True)
class Tried:
    """Seconds of a step on an idle machine and as they were measured, the seconds of all threads in
    it, the peak of memory in bytes, and the threads that computed."""

    step_seconds: float
    measured_seconds: float
    cpu_seconds: float
    memory: int
    threads: int


def device_of(kernel: Kernel) -> torch.device:
    """The device of the run. Raises ConfigError for one that is not there."""
    kernel.manager.strict = True  # a plan for another device would be worth nothing
    return settle_device(kernel)


def estimated(profile: Mapping[str, Any], tokens_per_step: int) -> Estimated:
    """What a model takes, measured by :mod:`apt_core.planning.calibration` on a part of it."""
    kernel = boot(dict(profile), files=False)
    device = device_of(kernel)
    structure = Structure.first(kernel)
    cost = model_cost(kernel)
    calibration = Calibration(kernel, device, cost)
    began = time.perf_counter(), _cpu_seconds()
    speed = calibration.speed(structure)
    wall, cpu = time.perf_counter() - began[0], _cpu_seconds() - began[1]
    threads = calibration.threads if device.type == "cpu" else 0
    flops = structure.flops_per_token(cost)
    assert speed is not None and flops is not None  # every part of the draft tells its costs
    step = speed.step_seconds(tokens_per_step * flops, structure.trained_params)
    step *= _share_of_own(wall, cpu, threads)
    memory = estimate(Footprint(kernel, device, structure.model)).total
    held = held_memory(device) if device.type == "cpu" else 0
    return Estimated(structure.params, step / tokens_per_step, memory + held, threads)


class _Clock:
    """Times the steps of a trial and ends it; it changes nothing."""

    def __init__(self) -> None:
        self.steps = 0
        self.began = self.ended = (0.0, 0.0)

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        now = time.perf_counter(), _cpu_seconds()
        if step == SKIPPED:
            self.began = now
        elif step > SKIPPED:
            self.steps, self.ended = step - SKIPPED, now
            if now[0] - self.began[0] > TRIAL_SECONDS:
                trainer.request_stop("it has been timed")


def tried(profile: Mapping[str, Any]) -> Tried:
    """Train with the keys of a profile for a few seconds, and time it. Raises what a run does."""
    clock, manager = _Clock(), PluginManager(strict=True)
    manager.register(clock, "clock")
    quiet = {
        **profile,
        "name": "trial",
        "training": {
            **profile["training"],
            "max_steps": MOST_TRIAL_STEPS,
            "max_epochs": MOST_TRIAL_STEPS,
            "save_freq": 0,
        },
        "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
    }
    from apt_core.training import Trainer

    with tempfile.TemporaryDirectory(prefix="apt-new-") as folder:
        trainer = Trainer(boot(quiet, manager=manager), output=Path(folder) / "run")
        trainer.fit()
        wall, cpu = (end - start for start, end in zip(clock.began, clock.ended, strict=True))
        memory = peak_memory_bytes(trainer.device)
        on_cpu = trainer.device.type == "cpu"
    steps = max(1, clock.steps)
    threads = profile["hardware"].get("num_threads") or torch.get_num_threads() if on_cpu else 0
    idle = wall * _share_of_own(wall, cpu, threads)
    return Tried(idle / steps, wall / steps, cpu / steps, memory, threads)


def _share_of_own(wall: float, cpu: float, threads: int) -> float:
    """The share of a measured time that this process has computed in, where others keep the cores
    busy; 1 on an idle machine, and on a GPU (no ``threads``)."""
    if not threads or waiting_programs() < BUSY:
        return 1.0
    return min(1.0, cpu / max(1e-9, wall * threads))


def memory_there(device: torch.device) -> int:
    """The bytes of memory that a run may take here."""
    return available_memory(device)


def waiting_programs() -> float:
    """How many programs wait for each core at the moment, beside this one."""
    try:
        return max(0.0, os.getloadavg()[0] - 1) / available_cores()
    except OSError:
        return 0.0


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
