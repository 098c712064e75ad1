"""Starts a run, runs its loop, and ends it or handles its failure."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging import DEBUG
from math import isfinite
from pathlib import Path
from typing import Any

from apt_core.device import is_out_of_memory
from apt_core.error_text import one_line, text_of
from apt_core.errors import CheckpointError, PluginError, ProcessLostError, StopTraining
from apt_core.log import get_logger
from apt_core.modeling.blame import attributed
from apt_core.planning.memory import out_of_memory
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.layout import TOKENIZER
from apt_core.runs.run_state import Trainable
from apt_core.training.curriculum.switching import Switching
from apt_core.training.diverging import diverged, void_steps
from apt_core.training.loop import Loop
from apt_core.training.manifest_writer import ManifestWriter
from apt_core.training.opening import log_start
from apt_core.types import RunFacts

log = get_logger("apt.training")

INTERRUPTED_SECONDS = 2.0
"""How long a run that was interrupted twice waits for hooks in the background."""


@dataclass
class RunResult:
    """How a run ended. ``status`` is finished, stopped (by a plugin) or interrupted (by a signal);
    ``figures`` holds the final losses, ``sample`` the continuation, ``trainable`` the stages of the
    trainable set that have begun."""

    status: str
    step: int
    epoch: int
    tokens: int
    figures: dict[str, float]
    folder: Path
    sample: str = ""
    reason: str = ""
    exit_code: int = 0
    trainable: Sequence[Trainable] = ()


class Run:
    """One run, from its first hook to its last.

    ``held`` is the number of bytes that the process holds beside the run; ``found`` is the
    checkpoint that the run continues from, and ``taken_back`` the last step that an earlier part in
    its folder had reported; None where there is none.
    """

    def __init__(
        self,
        loop: Loop,
        switching: Switching,
        manifest: ManifestWriter,
        *,
        held: int,
        found: Checkpoint | None,
        taken_back: int | None,
    ) -> None:
        self.loop, self._switching, self._manifest = loop, switching, manifest
        self._kernel, self._config, self._manager = loop.kernel, loop.config, loop.manager
        self._world, self._progress, self._trained = loop.world, loop.progress, loop.trained
        self.saving, self._stopping, self.folder = loop.saving, loop.stopping, loop.folder
        self._held, self._first_step = held, loop.progress.step
        self._resumed_step = self._first_step if found is not None else None
        self._found, self._events = found, loop.manager.events
        self._taken_back = taken_back
        self.facts = RunFacts(
            folder=loop.folder.path,
            name=self._config.name,
            settings=self._config.to_dict(),
            rank=self._world.rank,
            world_size=self._world.size,
            device=str(loop.parts.device),
            parameters=self._trained.num_parameters,
            step=loop.progress.step,
        )

    def run(self) -> RunResult:
        """Start, train, end. An error that ends the run is raised after a checkpoint of the last
        complete step was written."""
        loop, trained = self.loop, self._trained
        self.folder.write_profile(self._config.to_yaml())
        self.folder.keep(TOKENIZER, loop.parts.tokenizer.save)
        self.folder.begin_manifest()
        self._manifest.write("running")
        if self._world.is_first:
            log_start(loop.context, self.folder, self._found)
        loop.usage.start()
        try:
            try:
                loop.enabling.start()
                self._tell_of_the_resume()
                self._manager.hook.on_training_start(trainer=loop.trainer, run=self.facts)
                self._manager.failures.count_log_errors()
                trained.modes.started(trained.model)
                loop.trainable.log_frozen()
                trained.require_known_parameters()
                # A run that is to stop before its first step is evaluated at its end.
                if self._progress.step == 0 and not self._stopping.wanted:
                    self._progress.start_scores = loop.evaluate(everything=False)
                loop.display.start(self._progress.step)
                loop.run()
            except StopTraining as stop:
                self._stopping.request(stop.reason)
            finally:
                loop.display.stop()
            return self._finish()
        except BaseException as error:
            known: BaseException
            if is_out_of_memory(error) and not isinstance(error, PluginError):
                trained.gradients.clear()
                known = out_of_memory(
                    error,
                    f"in step {self._progress.step + 1}",
                    self._kernel,
                    self._world,
                    loop.parts.device,
                    self._held,
                    switched_by=self._switching.plugins,
                    switching=self._switching.making,
                )
            else:
                begun = loop.updating and self._progress.step == self._resumed_step
                known = attributed(self._kernel, error, () if begun else loop.terms)
                if begun and known is error and isinstance(error, Exception):
                    known = CheckpointError(
                        f"the optimizer failed in its first step with what the checkpoint of step "
                        f"{self._progress.step} holds of it: {one_line(error)}"
                    )
            self._save_after_failure(known)
            if known is error:
                raise
            raise known from error

    def _tell_of_the_resume(self) -> None:
        step = self._progress.step
        if self._found is not None or self._taken_back is not None:
            last = max(step, self._taken_back or 0)
            self._manager.hook.on_resume(step=step, from_step=last, run=self.facts)

    def _finish(self) -> RunResult:
        """Save, evaluate and sample what is missing, call the last hooks, and make the result.

        The checkpoint comes first: a scheduler that set a time limit may kill the run meanwhile.
        """
        loop, trained = self.loop, self._trained
        loop.settle_process(whole=True)
        if loop.watch is not None:
            loop.watch.stepping = False
        trained.require_all_processes()
        loop.step_log.log_skipped_steps()
        loop.usage.pause()
        trained.require_known_parameters()
        self.saving.save_without_pruning()
        # A StopTraining raised in one of these stages ends that stage, not the others.
        if not self._interrupted():
            if loop.due.ends_epoch():
                try:
                    loop.end_epoch(self._progress.epoch)
                except StopTraining as stop:
                    self._stopping.request(stop.reason)
            elif self._progress.scores.get("step") != self._progress.step:
                with suppress(StopTraining):
                    loop.evaluate(everything=True, final=True)
        self.saving.save_last()
        self._require_finite_end()
        sample = ""
        loop.callbacks.guard(trained.model, trained.optimizer)
        if self._progress.step and not self._interrupted():  # what was never trained says nothing
            with suppress(StopTraining):
                sample = loop.evaluator.sample()
        if self._progress.step == self._first_step:
            sample = sample or self.folder.ended.get("sample", "")
        reason = next(filter(None, self._world.gather(self._stopping.reason)), "")
        exit_code = self._interrupted()
        status = "interrupted" if exit_code else "stopped" if reason else "finished"
        result = RunResult(
            status=status,
            step=self._progress.step,
            epoch=self._progress.epoch,
            tokens=self._progress.tokens,
            figures=self._figures(),
            folder=self.folder.path,
            sample=sample,
            reason=reason,
            exit_code=exit_code,
            trainable=tuple(self._progress.trainable),
        )
        self._manifest.write(status, figures=result.figures, sample=sample, reason=reason)
        self._record_end(status, reason, reason=reason)
        with suppress(StopTraining):
            self._manager.hook.on_training_end(trainer=loop.trainer, run=self.facts)
        with suppress(StopTraining):
            self._manager.finish_background(self._config.training.background_timeout)
        with suppress(StopTraining):
            self._manager.failures.count_log_errors()
        # Reports failures of on_training_end in other processes; under --strict they end this one.
        loop.enabling.share_quarantines()
        self._manifest.write(status)
        return result

    def _require_finite_end(self) -> None:
        """Raise DivergedError if the final loss or the last steps are not finite."""
        training, scores = self._config.training, self._progress.scores
        loss = scores.get("val_loss", 0.0)
        if scores.get("step") == self._progress.step > 0 and not isfinite(loss):
            what = f"the loss on the held-out text is {loss} after step {self._progress.step}"
            raise diverged(training, self.folder, what)
        in_a_row = self._trained.guard.in_a_row
        if in_a_row > 1 and self._progress.step >= self.loop.total_steps:
            raise void_steps(
                training,
                self.folder,
                f"the run ended in {in_a_row} steps in a row that had a loss or gradient that is "
                f"not finite, the last one step {self._progress.step}",
                self._progress.metrics,
            )

    def _interrupted(self) -> int:
        """The exit code that a signal to any of the processes gives the run, or 0 without one."""
        return max(self._world.gather(self._stopping.interrupts.exit_code))

    def _save_after_failure(self, error: BaseException) -> None:
        """Save what can be saved after ``error`` and call the hooks of a failed run."""
        loop, trained, progress = self.loop, self._trained, self._progress
        if isinstance(error, KeyboardInterrupt):
            log.warning("interrupted")
        if isinstance(error, ProcessLostError):
            self._world.liveness.give_up()
        averaging = not all(average.is_apart for average in trained.averages.all)
        whole = not (loop.updating or averaging or trained.unknown_parameters())
        if whole and progress.step > 0:
            try:
                # No resume repeats this step, so its row is written now; not among several
                # processes, since the others may be in another step.
                if (
                    loop.row_due
                    and self._progress.metrics.get("step") != self._progress.step
                    and self._world.size == 1
                ):
                    loop.step_log.write(*loop.row_due)
            except BaseException as failure:
                log.error("no row of step %d: %s", progress.step, one_line(failure))
            try:
                loop.undo_lost_steps()
                if progress.step:
                    self.saving.save_in_emergency(in_step=loop.in_step)
            except BaseException as failure:  # whatever it is, the manifest comes next
                self.saving.record_unsaved(f"it could not be written ({one_line(failure)})")
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self._manifest.write(status, figures=self._figures(), error=text_of(error))
        self._record_end(status, text_of(error), error=text_of(error))
        try:
            self._manager.failures.count_log_errors()
            self._manager.hook.on_exception(error=error, trainer=loop.trainer, run=self.facts)
            patience = self._config.training.background_timeout
            if isinstance(error, KeyboardInterrupt):
                patience = min(patience, INTERRUPTED_SECONDS)
            self._manager.finish_background(patience)
        except BaseException as failure:
            log.error("%s", one_line(failure))
        self._manifest.write(status)

    def _record_end(self, status: str, why: str, **data: Any) -> None:
        """Record how the run ended. The caller of ``fit`` prints it, so it is not logged again."""
        self._events.record(
            "ended",
            f"the run ended: {status}{f' ({why})' if why else ''}",
            step=self._progress.step,
            log=log,
            level=DEBUG,
            status=status,
            **data,
        )

    def _figures(self) -> dict[str, float]:
        """The final figures. ``val_step`` is the step that the losses were measured at, which may
        be earlier than the last one."""
        names, progress = {"step": "val_step"}, self._progress
        final = {names.get(key, key): value for key, value in progress.scores.items()}
        start = {f"{key}_start": value for key, value in progress.start_scores.items()}
        train: dict[str, Any] = {}
        if "loss" in progress.metrics:
            train = {"loss": progress.metrics["loss"], "loss_step": progress.metrics["step"]}
        counts = {
            "skipped_steps": self._trained.guard.known,
            "failed_checkpoints": len(self.saving.failures),
        }
        happened = {name: count for name, count in counts.items() if count}
        usage = self.loop.usage.figures(self.folder.ended.get("figures", {}))
        return {**usage, **happened, **train, **start, **final}
