"""A dense model that a run turns into a mixture of experts, against the same run kept dense."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import apt_core.training.curriculum.switching as switching
from _harness import Report, Series, run
from apt_core import hookimpl
from apt_core.config import Override
from apt_core.kernel import boot
from apt_core.plugin_manager import PluginManager
from apt_core.training import Trainer

PROFILE = "gpt5_moe_mini"
AFTER = 20
"""Steps after the switch over which the bump is measured."""


@dataclass(frozen=True)
class Task:
    """One run of ``max_steps``, stopped at ``stop_at_step``. ``kind``: "moe" (experts), "dense", or
    "reset" (experts, with a fresh optimizer state after the switch)."""

    kind: str
    seed: int
    max_steps: int | None = None
    stop_at_step: int | None = None


@dataclass
class Run:
    """The measurements of one run: ``loss``, the cross-entropy by step; ``held_out``, the full
    evaluations as (step, seconds of training so far, nats per byte); ``switched``, the last step
    before the switch."""

    loss: dict[int, float] = field(default_factory=dict)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)
    switched: int = 0


class Watch:
    """Records losses and the time of training without evaluations."""

    def __init__(self) -> None:
        self.run = Run()
        self._seconds, self._since = 0.0, time.process_time()

    @hookimpl
    def on_training_start(self) -> None:
        self._since = time.process_time()

    @hookimpl
    def on_evaluation_start(self) -> None:
        self._seconds += time.process_time() - self._since

    @hookimpl
    def on_evaluation_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        self.run.held_out.append((trainer.step, self._seconds, metrics["val_loss"]))
        self._since = time.process_time()

    @hookimpl
    def on_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "loss" in metrics:
            self.run.loss[step] = metrics["loss/cross_entropy"]


def train(task: Task) -> Run:
    """Run ``task``. Needs a process of its own: "reset" patches a module for good."""
    torch.set_num_threads(1)
    if task.kind == "reset":
        switching.carry_optimizer_state = lambda *arguments: None
    settings = {
        "training.seed": task.seed,
        "training.log_every_steps": 1,
        "training.save_freq": 0,
        "evaluation.eval_freq": 0,
        "evaluation.sample_tokens": 0,
        "hardware.num_threads": 1,
    }
    if task.max_steps is not None:
        settings["training.max_steps"] = task.max_steps
        settings["training.max_epochs"] = 100
    manager, watch = PluginManager(), Watch()
    manager.register(watch, "watch")
    kernel = boot(
        PROFILE,
        plugins=["no:moe"] if task.kind == "dense" else [],
        overrides=[Override(tuple(key.split(".")), value, key) for key, value in settings.items()],
        manager=manager,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(kernel, output=Path(folder) / "run", stop_at_step=task.stop_at_step)
        trainer.fit()
        watch.run.switched = trainer.parts.plan.steps_per_epoch
    return watch.run


def measure(report: Report, quick: bool) -> None:
    seeds = range(1 if quick else 3)
    steps = 200 if quick else None
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), max_tasks_per_child=1) as pool:
        bumps(report, pool, seeds)
        curves(report, pool, seeds, steps)
    report.note(NOTE)


def bumps(report: Report, pool: ProcessPoolExecutor, seeds: Sequence[int]) -> None:
    """Add the loss right after the switch, less the dense run's on the same batches."""
    epoch = train_all(pool, [Task("dense", 0, stop_at_step=1)])[0].switched
    kinds = ("dense", "moe", "reset")
    tasks = [Task(kind, seed, stop_at_step=epoch + AFTER) for seed in seeds for kind in kinds]
    runs = dict(zip(tasks, train_all(pool, tasks), strict=True))
    window = range(epoch + 1, epoch + AFTER + 1)
    rises: dict[str, list[float]] = {"moe": [], "reset": []}
    noise, rows = [], []
    for seed in seeds:
        dense, *others = (
            [runs[Task(kind, seed, stop_at_step=epoch + AFTER)].loss[step] for step in window]
            for kind in kinds
        )
        noise.append(statistics.stdev(dense))
        ahead = [[a - b for a, b in zip(other, dense, strict=True)] for other in others]
        for kind, differences in zip(rises, ahead, strict=True):
            rises[kind].append(statistics.mean(differences))
        rows.append([seed, noise[-1], *(f(d) for d in ahead for f in (statistics.mean, max))])
    add(report, "bump_nats", rises["moe"])
    add(report, "bump_with_fresh_optimizer_nats", rises["reset"])
    add(report, "noise_of_dense_nats", noise)
    report.table(
        f"Loss in the {AFTER} steps after the switch less the dense run's, nats per byte",
        ["seed", "noise of the dense run", "carried: mean", "largest", "fresh: mean", "largest"],
        rows,
    )


def curves(
    report: Report, pool: ProcessPoolExecutor, seeds: Sequence[int], steps: int | None
) -> None:
    """Add held-out losses of whole runs at equal steps, and at equal time."""
    tasks = [Task(kind, seed, max_steps=steps) for kind in ("moe", "dense") for seed in seeds]
    runs = train_all(pool, tasks)
    experts, dense = runs[: len(seeds)], runs[len(seeds) :]
    ratio = statistics.mean(seconds(run) for run in experts) / statistics.mean(
        seconds(run) for run in dense
    )
    longer_steps = math.floor(ratio * dense[0].held_out[-1][0])
    longer = train_all(pool, [Task("dense", seed, max_steps=longer_steps) for seed in seeds])
    ends = {
        name: [run.held_out[-1][2] for run in group]
        for name, group in (("moe", experts), ("dense", dense), ("longer", longer))
    }
    for name, peer in (("equal_steps", "dense"), ("equal_time", "longer")):
        differences = [a - b for a, b in zip(ends["moe"], ends[peer], strict=True)]
        add(report, f"val_loss_moe_minus_dense_{name}", differences)
    report.add("time_moe_over_dense", ratio)
    report.table(
        "At the end of the run",
        ["run", "steps", "minutes of training", "held-out loss of each seed, nats per byte"],
        [
            [
                label,
                group[0].held_out[-1][0],
                statistics.mean(map(seconds, group)) / 60,
                ", ".join(f"{loss:.4f}" for loss in ends[name]),
            ]
            for name, label, group in (
                ("moe", "experts from epoch 2", experts),
                ("dense", "dense, equal steps", dense),
                ("longer", "dense, equal time", longer),
            )
        ],
    )
    lines = (("experts from epoch 2", experts), ("dense", dense), ("dense, longer", longer))
    for name, index, label in (("steps", 0, "steps"), ("time", 1, "minutes of training")):
        report.plot(
            name,
            f"Held-out loss over {'steps' if index == 0 else 'time'}",
            x_label=label,
            y_label="validation loss, nats per byte",
            series=[curve(line, group, index) for line, group in lines],
        )


def train_all(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> list[Run]:
    return list(pool.map(train, tasks))


def seconds(run: Run) -> float:
    return run.held_out[-1][1]


def add(report: Report, name: str, values: Sequence[float]) -> None:
    """Record the mean over the seeds, and their range."""
    report.add(name, statistics.mean(values), spread=(min(values), max(values)))


def curve(label: str, runs: Sequence[Run], index: int) -> Series:
    """The mean over the seeds, from the end of the first epoch on."""
    points = [
        list(evaluation) for evaluation in zip(*(run.held_out[1:] for run in runs), strict=True)
    ]
    scale = 60 if index else 1
    return Series(
        label,
        [statistics.mean(p[index] for p in point) / scale for point in points],
        [statistics.mean(p[2] for p in point) for point in points],
        [min(p[2] for p in point) for point in points],
        [max(p[2] for p in point) for point in points],
    )


NOTE = f"""\
Runs of `{PROFILE}`, and the same kept dense by `--plugin no:moe` (alignment and all else stay), \
one thread each, two at a time; time is that of the processor, without evaluations. The dense run \
of equal time has as many more steps as fit, and its learning rate falls over all of them. \
Intervals are the range over the seeds. The bump is that of the cross-entropy, without the terms \
that even the load; with a fresh optimizer the same switch forgets the moments of all parameters. \
The text is a third of a megabyte and is seen six times and more, so that a model with more \
parameters overfits sooner: this shows that the curriculum works, not what it is worth on a \
corpus."""


if __name__ == "__main__":
    run(
        "What does a switch to experts in mid-run change?",
        measure,
        packages=["torch"],
    )
