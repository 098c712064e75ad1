"""Evaluates a run's model, and samples text at the run's end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import nan

from apt_core.data.batches import Batch, EvaluationPlan
from apt_core.evaluation.quick_eval import BatchScore, score_batches, summarize
from apt_core.inference import generate
from apt_core.kernel import Kernel
from apt_core.log import get_logger
from apt_core.monitor import duration
from apt_core.parallel.world import World
from apt_core.runs.session import Session
from apt_core.training.prepare import Parts
from apt_core.training.stopping import Stopping
from apt_core.training.tasks import TaskScores, better_of
from apt_core.training.trained_model import TrainedModel
from apt_core.types import GenerationRequest

log = get_logger("apt.training")

LOG_SECONDS = 10.0
"""Between lines of the log on an evaluation that takes longer."""


@dataclass(frozen=True)
class Evaluation:
    """``scores`` by name, with ``val_tokens``, the number of scored targets, which shows whether
    all windows or only the watched ones were scored, and those of tasks. ``watched_loss`` is the
    loss on the watched windows alone, so that the two kinds of evaluations can be compared.
    ``judged`` is what the best checkpoint has the least of, where that is not this loss. ``times``
    are the milliseconds of tasks."""

    scores: dict[str, float]
    watched_loss: float
    judged: float | None = None
    times: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Scores the held-out text with the run's model, or with the average of its weights.

    The watched windows are a function of the held-out ids, ``evaluation.eval_batches`` and the
    windows of an optimizer step, none of which a resume may change. They do not depend on how a
    step is cut into micro-batches or divided among processes. ``watched`` is their sha256;
    ``ranked_by`` names the figure by which a checkpoint is the best, on them or of a task.
    ``session`` returns the present session of the run, for a sample.
    """

    def __init__(
        self,
        kernel: Kernel,
        parts: Parts,
        world: World,
        trained: TrainedModel,
        stopping: Stopping,
        session: Callable[[], Session],
    ) -> None:
        settings = kernel.config.evaluation
        self._kernel, self._parts, self._world = kernel, parts, world
        self._trained, self._stopping, self._session = trained, stopping, session
        self._plan = parts.data.evaluation(parts.plan.batch_size)
        stretches = self._plan.stretches(settings.eval_batches, parts.plan.windows_per_step)
        self._watched = [i for windows in stretches for i in self._plan.batches_of(windows)]
        self.watched = _identity(self._plan, stretches)
        self._accuracy = "accuracy" in settings.metrics
        self._tasks = TaskScores(kernel, parts.tasks, world)
        self._best_by = settings.best_by
        self._better = better_of(kernel, parts.tasks)[settings.best_by]
        self.ranked_by = self.watched
        if self._best_by != "val_loss":
            of = {name: task.items.sha256 for task in parts.tasks for name in task.better}
            limit = f" {settings.task_items}" if self._best_by in of else ""
            self.ranked_by = f"{self._best_by} {of.get(self._best_by, self.watched)}{limit}"

    def evaluate(self, *, everything: bool) -> Evaluation | None:
        """Score the watched windows, or ``everything``; None if the run was stopped meanwhile.

        Every process scores a share of the batches and gets the scores of all.
        """
        parts, world = self._parts, self._world
        indices = list(range(self._plan.num_batches)) if everything else self._watched
        turns = -(-len(indices) // world.size)
        # A sharded model computes in all processes or in none, so the last turn is filled up.
        own = [
            indices[min(turn * world.size + world.rank, len(indices) - 1)] for turn in range(turns)
        ]
        with self._weights():
            scored = score_batches(
                self._trained.model,
                self._batches(own),
                self._trained.forward.sums,
                device=parts.device,
                dtype=parts.dtype,
                accuracy=self._accuracy,
                interrupted=lambda: self._stopping.interrupted,
            )
            tasks = None
            if scored is not None:
                tasks = self._tasks.score(self._session(), lambda: self._stopping.interrupted)
        if scored is None or tasks is None:
            return None
        by_index: dict[int, BatchScore] = {}
        for share in world.gather(dict(zip(own, scored, strict=True))):
            by_index.update(share)
        bytes_per_token = parts.data.bytes_per_token
        watched = summarize([by_index[index] for index in self._watched], bytes_per_token)
        every = [by_index[index] for index in sorted(by_index)]
        scores = summarize(every, bytes_per_token)
        scores["val_tokens"] = sum(score.num_targets for score in every)
        scores |= tasks.scores
        return Evaluation(
            scores, watched["val_loss"], self._judged({**watched, **tasks.scores}), tasks.times
        )

    def _judged(self, watched: Mapping[str, float]) -> float | None:
        """What the best checkpoint has the least of; None for the loss. A task that has failed is
        never better."""
        if self._best_by == "val_loss":
            return None
        value = watched.get(self._best_by, nan)
        return 0.0 - value if self._better == "higher" else value

    def _batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        """The batches of these numbers; the log says how far a long evaluation is."""
        began = said = time.monotonic()
        for done, index in enumerate(indices):
            now = time.monotonic()
            if done and now - said >= LOG_SECONDS:
                said = now
                log.info(
                    "evaluating on held-out text: %.0f%% of %s sequences, %s left",
                    100 * done / len(indices),
                    f"{len(indices) * self._plan.batch_size:,}",
                    duration((now - began) / done * (len(indices) - done)),
                )
            yield self._plan.batch(index)

    def fixed_batch(self) -> Batch:
        """A batch of held-out text, the same in every process and throughout the run: the first one
        with a target."""
        for index in (*self._watched, *range(self._plan.num_batches)):
            batch = self._plan.batch(index)
            if batch.num_targets:
                break
        return batch

    def sample(self) -> str:
        """A continuation of the profile's prompt; empty if the profile asks for none."""
        config, settings = self._kernel.config, self._kernel.config.evaluation
        if not settings.sample_tokens:
            return ""
        request = GenerationRequest(
            prompt=settings.sample_prompt,
            max_new_tokens=settings.sample_tokens,
            temperature=settings.sample_temperature,
            seed=config.training.seed,
        )
        with self._weights():
            result = generate(
                self._session(), request, interrupted=lambda: self._stopping.interrupted
            )
        return result.text

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Use the average of the weights, if the run keeps one, while the context lasts."""
        ema = self._trained.averages.ema
        with nullcontext() if ema is None else ema.in_place():
            try:
                yield
            finally:
                self._world.reshard(self._trained.model)


def _identity(plan: EvaluationPlan, stretches: Sequence[range]) -> str:
    """The sha256 of these windows and of their boundaries."""
    digest = hashlib.sha256(f"{plan.seq_len}".encode())
    for windows in stretches:
        rows = plan.rows(windows)
        digest.update(f" {windows.start}-{windows.stop}:".encode())
        for array in (rows.ids, rows.targets):
            digest.update(array.astype("<i8", order="C").tobytes())
    return digest.hexdigest()
