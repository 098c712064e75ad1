"""Scores the model that is being trained on the tasks of its profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from apt_core.config import InactiveKey
from apt_core.data.loading import RunData
from apt_core.errors import ConfigError, Problem, ProviderError, did_you_mean
from apt_core.evaluation.finding import find_tasks
from apt_core.evaluation.found import Asking, Found
from apt_core.evaluation.held_out import HeldOut
from apt_core.evaluation.intervals import Sums
from apt_core.evaluation.metrics import figure_of
from apt_core.evaluation.scoring import Items, Scoring, check_template, find, items_of
from apt_core.kernel import Kernel
from apt_core.log import get_logger
from apt_core.metric_names import of_task, of_time
from apt_core.parallel.world import World
from apt_core.providers.task import Better
from apt_core.runs.session import Session
from apt_core.task_names import is_task_file
from apt_core.types import CORE

log = get_logger("apt.training")

KEY = "evaluation.tasks"
REASONING = "reasoning_quality"
"""The metric of a profile that is a task."""

VAL_METRICS: Mapping[str, Better] = {"val_loss": "lower", "val_bpb": "lower", "val_ppl": "lower"}


@dataclass(frozen=True, eq=False)
class RunTask:
    """The items of a task of the run, of ``plugin``; ``names`` are those of its metrics in rows."""

    items: Items
    plugin: str
    names: Mapping[str, str]

    @property
    def better(self) -> dict[str, Better]:
        """What is better of each metric, by its name in rows."""
        return {self.names[metric]: it for metric, it in self.items.task.metrics.items()}


def load_tasks(kernel: Kernel, data: RunData) -> list[RunTask]:
    """The tasks that the profile's ``evaluation.tasks`` and ``evaluation.metrics`` ask for.

    Raises ConfigError for what is wrong with them, and where nothing measures
    ``evaluation.best_by``; ProviderError for a task that cannot be used.
    """
    evaluation = kernel.config.evaluation
    held_out = HeldOut(
        [source.store for source in data.sources],
        data.tokenizer,
        early=data.growing is not None,
    )
    scoring = Scoring(limit=evaluation.task_items)
    found = [
        RunTask(
            items := items_of(name, task, scoring, held_out, KEY),
            _plugin_of(kernel, evaluation.tasks, name),
            {metric: of_task(name, metric) for metric in items.task.metrics},
        )
        for name, task in find_tasks(kernel, evaluation.tasks, KEY).items()
    ]
    if REASONING in evaluation.metrics:
        found += _reasoning(kernel, scoring, held_out)
    for each in found:
        check_template(each.items, data.tokenizer, KEY)
    _check_best_by(kernel, found)
    return found


def _plugin_of(kernel: Kernel, names: Sequence[str], name: str) -> str:
    of_file = name not in names or is_task_file(name)
    return CORE if of_file else kernel.registry.spec("task", name).plugin


def _reasoning(kernel: Kernel, scoring: Scoring, held_out: HeldOut) -> Iterator[RunTask]:
    key, name = "evaluation.metrics", REASONING
    task = find_tasks(kernel, [name], key)[name]
    if not held_out.pairs():
        reason = f"{name}: the held-out text has no prompts with responses"
        kernel.add_inactive([InactiveKey(key, reason)])
        return
    items = items_of(name, task, scoring, held_out, key)
    yield RunTask(items, CORE, {"exact_match": f"val_{name}"})


def _check_best_by(kernel: Kernel, tasks: Sequence[RunTask]) -> None:
    measured = better_of(kernel, tasks)
    asked = kernel.config.evaluation.best_by
    if asked not in measured:
        hint = did_you_mean(asked, measured) or f"there are {', '.join(measured)}"
        message = f"is {asked!r}, which no evaluation of this run measures"
        raise ConfigError(Problem(message, "evaluation.best_by", hint=hint))


def better_of(kernel: Kernel, tasks: Sequence[RunTask]) -> dict[str, Better]:
    """What is better of each figure by which a checkpoint may be the best."""
    accuracy: dict[str, Better] = {"val_accuracy": "higher"}
    found = {
        **VAL_METRICS,
        **(accuracy if "accuracy" in kernel.config.evaluation.metrics else {}),
    }
    for task in tasks:
        found |= task.better
    return found


@dataclass(frozen=True)
class TaskFigures:
    """The ``scores`` of the tasks by their names in rows, and the milliseconds that each took."""

    scores: dict[str, float]
    times: dict[str, float]


class TaskScores:
    """Scores the model of the run on its ``tasks``.

    Every process has the same scores. A sharded model computes all items in every process, since
    its processes compute together; otherwise each process has a share of the items. A task of a
    plugin that fails is told as a failure of the plugin, and is not scored any more.
    """

    def __init__(self, kernel: Kernel, tasks: Sequence[RunTask], world: World) -> None:
        self._kernel, self._world = kernel, world
        self._tasks = [*tasks]
        self._batch_size = kernel.config.training.batch_size

    def score(self, session: Session, interrupted: Callable[[], bool]) -> TaskFigures | None:
        """The scores of the present model; None once ``interrupted()`` is true."""
        scores: dict[str, float] = {}
        times: dict[str, float] = {}
        for task in [*self._tasks]:
            began = time.monotonic()
            found, failed = self._own(session, task, interrupted)
            if not failed and found is None:
                return None
            shares = self._world.gather({} if found is None else found.sums)
            if not all(shares):
                self._drop(task)
                continue
            for metric, name in task.names.items():
                sums = self._whole([share[metric] for share in shares])
                scores[name] = figure_of(metric, sums).value
            times[of_time("tasks", task.items.name)] = round(1e3 * (time.monotonic() - began), 3)
        return TaskFigures(scores, times)

    def _own(
        self, session: Session, task: RunTask, interrupted: Callable[[], bool]
    ) -> tuple[Found | None, bool]:
        """What is found of this process's items, and whether the task has failed."""
        chosen = task.items.chosen
        if self._world.sharding != "fsdp":
            chosen = chosen[self._world.rank :: self._world.size]
        if not chosen:
            empty = np.zeros((0, 2))
            return Found({metric: empty for metric in task.names}, ""), False
        asking = Asking(
            self._batch_size,
            interrupted=interrupted,
            judging=partial(self._judging, task),
        )
        items = replace(task.items, chosen=chosen)
        try:
            return find(session, items, asking), False
        except ProviderError as error:
            if task.plugin == CORE:
                raise
            code = getattr(task.items.task, "score", type(task.items.task))
            cause = error.__cause__ or error
            self._kernel.manager.failures.callback_failed(task.plugin, code, cause)
            return None, True

    def _judging(self, task: RunTask) -> AbstractContextManager[Any]:
        if task.plugin == CORE:
            return nullcontext()
        what = f"task {task.items.name}"
        return self._kernel.manager.watching(task.plugin, what, type(task.items.task))

    def _whole(self, shares: Sequence[Sums]) -> Sums:
        """The sums of all items of the shares of the processes."""
        return shares[0] if self._world.sharding == "fsdp" else np.concatenate(shares)

    def _drop(self, task: RunTask) -> None:
        self._tasks.remove(task)
        log.warning("the task %s is not scored any more, since it has failed", task.items.name)
