"""Writes a run's checkpoints on a thread while the run goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from logging import DEBUG, ERROR
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist

from apt_core.code_source import short_path
from apt_core.errors import StopTraining, TrainingError
from apt_core.log import get_logger
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Snapshot
from apt_core.runs.checkpoint_parts import listed
from apt_core.runs.folder import RunFolder
from apt_core.runs.scores import Evaluated, best_by_evaluation, write_evaluation
from apt_core.training.context import RunContext
from apt_core.training.diverging import diverged
from apt_core.training.snapshots import Snapshots

log = get_logger("apt.checkpoint")

Position = tuple[int, int]
"""Steps taken and epochs ended."""


@dataclass(frozen=True)
class _Write:
    """A checkpoint that is being written, with its evaluation if it was made before; ``future``
    returns the checkpoint's folder."""

    position: Position
    evaluated: Evaluated | None
    future: Future[Path]


def writer_thread(device: torch.device) -> ThreadPoolExecutor:
    """A pool of one thread whose current CUDA device is ``device``."""
    start = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix="apt-checkpoint", initializer=start)


@dataclass(frozen=True)
class _Best:
    """The checkpoint on the disk that is kept as the best, with its badness."""

    step: int | None = None
    badness: float = inf


class Saving:
    """Writes snapshots of the run, one at a time, on a thread. ``watched`` identifies by what
    checkpoints are compared: on which held-out windows, or by which other figure.

    The first process writes; with a sharded model every process writes its shards. If the profile
    asks for it, the best evaluated checkpoint is kept; one whose write failed does not count.
    """

    def __init__(
        self,
        run: RunContext,
        folder: RunFolder,
        snapshots: Snapshots,
        watched: str,
        *,
        resumed: bool,
    ) -> None:
        self._run, self._folder = run, folder
        self._snapshots, self._watched = snapshots, watched
        self._training, self._keeps_best = run.config.training, run.config.evaluation.save_best
        self.saved = self._position() if resumed else None
        self._evaluated: tuple[int, Evaluated] | None = None
        self._refused: Position | None = None
        self._prunes = True
        self.failures: list[str] = [*folder.manifest.get("failed_checkpoints", [])]
        self._write: _Write | None = None
        self._thread = writer_thread(run.parts.device)
        # Has its own group, since a checkpoint is written while the run communicates.
        sharded = self._run.world.sharding == "fsdp"
        self._group = dist.new_group(backend="gloo") if sharded else None
        self._best = _Best()
        self.notice = ""
        if self._keeps_best:
            self._best, self.notice = self._run.world.from_first(self._best_before)

    def save(self) -> None:
        """Start writing a checkpoint of the present position, unless there is one. Waits only for
        the previous checkpoint. Raises DivergedError for weights that are not finite.

        If the disk is full, this checkpoint is lost and the run goes on, but ends with an error if
        its last checkpoint is lost.
        """
        self.finish()
        position = self._position()
        if self.saved == position:
            return
        self._run.trained.require_all_processes()
        if bad := self._run.trained.not_finite(everywhere=True):
            self._refused = position
            raise diverged(
                self._training,
                self._folder,
                f"the weights after step {position[0]} are not finite ({listed(bad)}) and are not "
                "saved",
            )
        snapshot = self._snapshots.take(self._evaluation_of(position[0]))
        if self._run.world.is_first or self._group is not None:
            future = self._thread.submit(self._written, snapshot)
        else:
            future = Future()
            future.set_result(self._folder.checkpoints / checkpoint.folder_name(snapshot.step))
        self._write = _Write(position, snapshot.evaluated, future)

    def note_evaluation(
        self, loss: float, scores: dict[str, float], judged: float | None = None
    ) -> None:
        """Record the watched loss of the present position, what is ``judged`` in its place, and, if
        there are any, its scores on the whole held-out text. They are added to the checkpoint of
        the position, whether it is written already or later."""
        step, before = self._run.progress.step, self._evaluation_of(self._run.progress.step)
        if before is not None:
            scores = scores or before.scores
        self._evaluated = step, Evaluated(self._watched, loss, scores, judged)
        if self._write is None and self.saved is not None and self.saved[0] == step:
            self._record(step)

    def is_best(self) -> bool:
        """Whether the evaluation of the present position is better than that of the best
        checkpoint on the disk. Waits for a pending write if that may decide it."""
        found = self._evaluation_of(self._run.progress.step)
        wanted = self._keeps_best
        if not wanted or found is None or not found.badness < self._best.badness:
            return False
        self.finish()
        return found.badness < self._best.badness

    def _evaluation_of(self, step: int) -> Evaluated | None:
        if self._evaluated is None or self._evaluated[0] != step:
            return None
        return self._evaluated[1]

    def _record(self, step: int, known: Evaluated | None = None) -> None:
        """Note that the checkpoint of ``step`` was written with the evaluation ``known``; add an
        evaluation made since, and update the best checkpoint."""
        found = self._evaluation_of(step) or known
        if found is None:
            return
        if self._run.world.is_first and found != known:
            path = self._folder.checkpoints / checkpoint.folder_name(step)
            try:
                write_evaluation(path, found)
            except OSError as error:
                log.error("the evaluation of step %d is not kept with it: %s", step, error)
        if self._keeps_best and found.badness < self._best.badness:
            self._best = _Best(step, found.badness)

    def _best_before(self) -> tuple[_Best, str]:
        """The best checkpoint in the folder, and a notice. If all of them were evaluated on other
        windows or by another figure, the best of these is kept until the first one on the new ones
        replaces it; the notice says so."""
        root, watched = self._folder.checkpoints, self._watched
        best = best_by_evaluation(root, watched)
        if best is not None:
            return _Best(checkpoint.step_of(best[0]), best[1]), ""
        best = best_by_evaluation(root)
        if best is None:
            return _Best(), ""
        return _Best(checkpoint.step_of(best[0])), (
            f"{best[0].name} is the best checkpoint on the held-out windows that were watched "
            "before, or by another evaluation.best_by: it is kept until one is the best on those "
            "of now"
        )

    def poll(self) -> None:
        """Finish the pending write if all processes have completed it; does not wait."""
        write = self._write
        if write is not None and not self._run.world.any(not write.future.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending write; log it and call on_checkpoint_saved."""
        write = self._write
        if write is None:
            return
        path, error = Path(), None
        try:
            path = write.future.result()  # an interrupt here leaves it to save_in_emergency
        except OSError as problem:
            error = str(problem)
        self._write = None
        # All processes must know of a failure, since it decides when they save next.
        error = next(filter(None, self._run.world.gather(error)), None)
        if error is not None:
            self._failed(write, error)
            return
        self.saved = write.position
        self._record(write.position[0], write.evaluated)
        if self._run.world.is_first:
            self._record_saved(path)
            if self._prunes:
                self._prune()
            self._run.manager.hook.on_checkpoint_saved(path=path, trainer=self._run.trainer)

    def save_without_pruning(self) -> None:
        """Save and wait. No checkpoint is deleted, since this one may not be evaluated yet. A
        StopTraining raised by a hook is ignored."""
        self._prunes = False
        for part in (self.finish, self.save, self.finish):
            with suppress(StopTraining):
                part()
        self._prunes = True

    def save_last(self) -> None:
        """Save, wait and prune. Raises TrainingError if the checkpoint cannot be written."""
        self.save_without_pruning()
        if self.saved != self._position():
            raise TrainingError(self.failures[-1])
        if self._run.world.is_first:
            self._prune()

    def save_in_emergency(self, *, in_step: bool) -> None:
        """Save when the run has failed; ``in_step`` says that plugins have seen a part of a step.
        Raises OSError."""
        if self._write is not None:
            write, self._write = self._write, None
            error = write.future.exception()
            if error is None:
                self.saved = write.position
                self._record(write.position[0], write.evaluated)
            else:
                self._failed(write, str(error))
        if self._position() in (self.saved, self._refused):
            return
        if bad := self._run.trained.not_finite():
            self.record_unsaved(f"its weights are not finite ({listed(bad)})")
            return
        if self._group is not None and not self._run.world.all_at(
            f"{self._folder} {self._position()}"
        ):
            self.record_unsaved("the other processes have the rest of the model")
            return
        if self._run.world.is_first or self._group is not None:
            snapshot = self._snapshots.take(
                self._evaluation_of(self._run.progress.step), emergency=True, in_step=in_step
            )
            path = self._thread.submit(self._written, snapshot).result()
            self._record_saved(path)
            self._prune()

    def _failed(self, write: _Write, error: str) -> None:
        message = f"the checkpoint of step {write.position[0]} was not written: {error}"
        self.failures.append(message)
        self._run.events.record(
            "not_saved",
            f"{message}; earlier checkpoints are intact and the run goes on",
            step=write.position[0],
            log=log,
            level=ERROR,
            error=error,
        )

    def record_unsaved(self, why: str) -> None:
        """Record that a failed run has no checkpoint of its last position, and why."""
        self._run.events.record(
            "not_saved",
            f"no checkpoint of step {self._run.progress.step}: {why}",
            step=self._run.progress.step,
            log=log,
            level=ERROR,
            error=why,
        )

    def _record_saved(self, path: Path) -> None:
        self._run.events.record(
            "saved",
            f"checkpoint: {short_path(str(path))}",
            step=checkpoint.step_of(path),
            log=log,
            checkpoint=path.name,
        )

    def close(self) -> None:
        """Wait for the pending write and end the thread."""
        self._thread.shutdown(wait=True)

    def _position(self) -> Position:
        return self._run.progress.step, self._run.progress.ended_epochs

    def _written(self, snapshot: Snapshot) -> Path:
        return checkpoint.save(self._folder.checkpoints, snapshot, self._run.world, self._group)

    def _prune(self) -> None:
        best = None
        if self._best.step is not None:
            best = self._folder.checkpoints / checkpoint.folder_name(self._best.step)
        keep_last = self._training.keep_last
        for path in checkpoint.prune(self._folder.checkpoints, keep_last, keep=best):
            self._run.events.record(
                "deleted",
                f"deleted checkpoint {path.name}",
                step=self._run.progress.step,
                log=log,
                level=DEBUG,
                checkpoint=path.name,
            )
