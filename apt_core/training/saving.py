"""Writing a run's checkpoints, while the run goes on."""

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
from apt_core.config import Config
from apt_core.errors import StopTraining, TrainingError
from apt_core.log import get_logger
from apt_core.parallel.world import World
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Evaluated, Snapshot
from apt_core.runs.folder import RunFolder
from apt_core.runs.run_state import Progress
from apt_core.runs.state_tensors import listed
from apt_core.training.diverging import diverged
from apt_core.training.hooks import TrainerHooks
from apt_core.training.snapshots import Snapshots
from apt_core.training.trained_model import TrainedModel

log = get_logger("apt.checkpoint")

Position = tuple[int, int]
"""Steps taken and epochs ended."""


@dataclass(frozen=True)
class _Write:
    """A checkpoint that is being written, with an evaluation of it if there was one before;
    ``future`` gives its folder."""

    position: Position
    evaluated: Evaluated | None
    future: Future[Path]


def writer_thread(device: torch.device) -> ThreadPoolExecutor:
    """One thread, for which CUDA's current device is that of the run, and not the first GPU."""
    start = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix="apt-checkpoint", initializer=start)


@dataclass(frozen=True)
class _Best:
    """The checkpoint on the disk that is kept as the best; a lower loss than ``loss`` is better."""

    step: int | None = None
    loss: float = inf


class Saving:
    """Writes snapshots of the run, one at a time, on a thread. ``watched`` names the held-out
    windows by whose loss checkpoints compare.

    In a run of several processes the first one writes; of a sharded model each writes its shards.
    Of the checkpoints that were evaluated, the best that is on the disk is kept where the profile
    wants that: one whose write failed is none, and bars no other.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        world: World,
        device: torch.device,
        progress: Progress,
        trained: TrainedModel,
        snapshots: Snapshots,
        hooks: TrainerHooks,
        watched: str,
        *,
        resumed: bool,
    ) -> None:
        self._training, self._keeps_best = config.training, config.evaluation.save_best
        self._folder, self._world, self._progress = folder, world, progress
        self._trained, self._snapshots, self._hooks = trained, snapshots, hooks
        self._watched, self._events = watched, hooks.manager.events
        self.saved = self._position() if resumed else None
        self._evaluated: tuple[int, Evaluated] | None = None
        self._refused: Position | None = None
        self._prunes = True
        self.failures: list[str] = [*folder.manifest.get("failed_checkpoints", [])]
        self._write: _Write | None = None
        self._thread = writer_thread(device)
        # A group of its own: a checkpoint is written while the run communicates.
        sharded = self._world.sharding == "fsdp"
        self._group = dist.new_group(backend="gloo") if sharded else None
        self._best = _Best()
        self.notice = ""
        if self._keeps_best:
            self._best, self.notice = self._world.from_first(self._best_before)

    def save(self) -> None:
        """Take a snapshot of the current position, unless there is a checkpoint of it, and have it
        written. Waits only while the checkpoint before is not written yet. Raises DivergedError
        for weights that are not finite.

        A full disk costs this checkpoint and nothing else: the run goes on, but it does not end
        well.
        """
        self.finish()
        position = self._position()
        if self.saved == position:
            return
        self._trained.require_all_processes()
        if bad := self._trained.not_finite(everywhere=True):
            self._refused = position
            raise diverged(
                self._training,
                self._folder,
                f"the weights after step {position[0]} are not finite ({listed(bad)}) and are not "
                "saved",
            )
        snapshot = self._snapshots.take(self._evaluation_of(position[0]))
        if self._world.is_first or self._group is not None:
            future = self._thread.submit(self._written, snapshot)
        else:
            future = Future()
            future.set_result(self._folder.checkpoints / checkpoint.folder_name(snapshot.step))
        self._write = _Write(position, snapshot.evaluated, future)

    def note_evaluation(self, loss: float, scores: dict[str, float]) -> None:
        """The watched loss of the current position, and the scores on the whole held-out text where
        there are such. The checkpoint of the position has them with it, be it written before or
        after."""
        step, before = self._progress.step, self._evaluation_of(self._progress.step)
        if before is not None:
            scores = scores or before.scores
        self._evaluated = step, Evaluated(self._watched, loss, scores)
        if self._write is None and self.saved is not None and self.saved[0] == step:
            self._record(step)

    def finds_best(self) -> bool:
        """Is the current position, by its evaluation, better than the best checkpoint on the disk?
        Waits for the one that is being written where that decides."""
        found = self._evaluation_of(self._progress.step)
        wanted = self._keeps_best
        if not wanted or found is None or not found.loss < self._best.loss:
            return False
        self.finish()
        return found.loss < self._best.loss

    def _evaluation_of(self, step: int) -> Evaluated | None:
        if self._evaluated is None or self._evaluated[0] != step:
            return None
        return self._evaluated[1]

    def _record(self, step: int, known: Evaluated | None = None) -> None:
        """The checkpoint of ``step`` is on the disk with the evaluation ``known``: add a later one,
        and see whether it is the best."""
        found = self._evaluation_of(step) or known
        if found is None:
            return
        if self._world.is_first and found != known:
            path = self._folder.checkpoints / checkpoint.folder_name(step)
            try:
                checkpoint.write_evaluation(path, found)
            except OSError as error:
                log.error("the evaluation of step %d is not kept with it: %s", step, error)
        if self._keeps_best and found.loss < self._best.loss:
            self._best = _Best(step, found.loss)

    def _best_before(self) -> tuple[_Best, str]:
        """The best of the checkpoints that the run goes on after. Where all were judged on other
        windows, the best of those stays until there is another, however high its loss, and a text
        says so."""
        root, watched = self._folder.checkpoints, self._watched
        best = checkpoint.best_by_evaluation(root, watched)
        if best is not None:
            return _Best(checkpoint.step_of(best[0]), best[1]), ""
        best = checkpoint.best_by_evaluation(root)
        if best is None:
            return _Best(), ""
        return _Best(checkpoint.step_of(best[0])), (
            f"{best[0].name} is the best checkpoint on the held-out windows that were watched "
            "before: it is kept until one is the best on the new ones"
        )

    def poll(self) -> None:
        """Tell of the checkpoint that was being written, if it is complete now."""
        write = self._write
        if write is not None and not self._world.any(not write.future.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and tell of it."""
        write = self._write
        if write is None:
            return
        path, error = Path(), None
        try:
            path = write.future.result()  # an interrupt here leaves it to save_in_emergency
        except OSError as problem:
            error = str(problem)
        self._write = None
        # All of them have to know: what is saved, and what is the best, decides when they save.
        error = next(filter(None, self._world.gather(error)), None)
        if error is not None:
            self._failed(write, error)
            return
        self.saved = write.position
        self._record(write.position[0], write.evaluated)
        if self._world.is_first:
            self._tell_saved(path)
            if self._prunes:
                self._prune()
            self._hooks.call("on_checkpoint_saved", path=path)

    def save_unjudged(self) -> None:
        """Save, and wait for it, before an evaluation says what that is worth: nothing is deleted
        for it. A plugin that is told and asks to stop does not keep it from being done."""
        self._prunes = False
        for part in (self.finish, self.save, self.finish):
            with suppress(StopTraining):
                part()
        self._prunes = True

    def save_last(self) -> None:
        """Save, and wait for it. Raises TrainingError when it cannot be written."""
        self.save_unjudged()
        if self.saved != self._position():
            raise TrainingError(self.failures[-1])
        if self._world.is_first:
            self._prune()

    def save_in_emergency(self, *, in_step: bool) -> None:
        """Save before the run dies; ``in_step`` says that plugins have seen a part of a step.
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
        if bad := self._trained.not_finite():
            self.tell_not_saved(f"its weights are not finite ({listed(bad)})")
            return
        if self._group is not None and not self._world.all_at(self._here()):
            self.tell_not_saved("the other processes have the rest of the model")
            return
        if self._world.is_first or self._group is not None:
            snapshot = self._snapshots.take(
                self._evaluation_of(self._progress.step), emergency=True, in_step=in_step
            )
            path = self._thread.submit(self._written, snapshot).result()
            self._tell_saved(path)
            self._prune()

    def _failed(self, write: _Write, error: str) -> None:
        message = f"the checkpoint of step {write.position[0]} was not written: {error}"
        self.failures.append(message)
        self._events.record(
            "not_saved",
            "%s; earlier checkpoints are intact and the run goes on",
            message,
            step=write.position[0],
            log=log,
            level=ERROR,
            error=error,
        )

    def tell_not_saved(self, why: str) -> None:
        """Tell that there is no checkpoint of the current position as the run dies."""
        self._events.record(
            "not_saved",
            "no checkpoint of step %d: %s",
            self._progress.step,
            why,
            step=self._progress.step,
            log=log,
            level=ERROR,
            error=why,
        )

    def _tell_saved(self, path: Path) -> None:
        self._events.record(
            "saved",
            "checkpoint: %s",
            short_path(str(path)),
            step=checkpoint.step_of(path),
            log=log,
            checkpoint=path.name,
        )

    def _here(self) -> str:
        """A name for where this process has come to, in this run."""
        return f"{self._folder} {self._position()}"

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown(wait=True)

    def _position(self) -> Position:
        return self._progress.step, self._progress.ended_epochs

    def _written(self, snapshot: Snapshot) -> Path:
        return checkpoint.save(self._folder.checkpoints, snapshot, self._world, self._group)

    def _prune(self) -> None:
        best = None
        if self._best.step is not None:
            best = self._folder.checkpoints / checkpoint.folder_name(self._best.step)
        keep_last = self._training.keep_last
        for path in checkpoint.prune(self._folder.checkpoints, keep_last, keep=best):
            self._events.record(
                "deleted",
                "deleted checkpoint %s",
                path.name,
                step=self._progress.step,
                log=log,
                level=DEBUG,
                checkpoint=path.name,
            )
