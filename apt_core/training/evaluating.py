"""Evaluates a run's model, and samples text at the run's end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from apt_core.data.batches import Batch, EvaluationPlan
from apt_core.evaluation.quick_eval import BatchScore, score_batches, summarize
from apt_core.inference import generate
from apt_core.kernel import Kernel
from apt_core.parallel.world import World
from apt_core.runs.session import Session
from apt_core.training.prepare import Parts
from apt_core.training.stopping import Stopping
from apt_core.training.trained_model import TrainedModel
from apt_core.types import GenerationRequest


@dataclass(frozen=True)
class Evaluation:
    """``scores`` by name, with ``val_tokens``, the number of scored targets, which shows whether
    all windows or only the watched ones were scored. ``watched_loss`` is the loss on the watched
    windows alone, so that the two kinds of evaluations can be compared."""

    scores: dict[str, float]
    watched_loss: float


class Evaluator:
    """Scores the held-out text with the run's model, or with the average of its weights.

    The watched windows are a function of the held-out ids, ``evaluation.eval_batches`` and the
    windows of an optimizer step, none of which a resume may change. They do not depend on how a
    step is cut into micro-batches or divided among processes. ``watched`` is their sha256.
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
                (self._plan.batch(index) for index in own),
                self._trained.forward.sums,
                device=parts.device,
                dtype=parts.dtype,
                accuracy=self._accuracy,
                interrupted=lambda: self._stopping.interrupted,
            )
        if scored is None:
            return None
        by_index: dict[int, BatchScore] = {}
        for share in world.gather(dict(zip(own, scored, strict=True))):
            by_index.update(share)
        bytes_per_token = parts.data.bytes_per_token
        watched = summarize([by_index[index] for index in self._watched], bytes_per_token)
        every = [by_index[index] for index in sorted(by_index)]
        scores = summarize(every, bytes_per_token)
        scores["val_tokens"] = sum(score.num_targets for score in every)
        return Evaluation(scores, watched["val_loss"])

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
