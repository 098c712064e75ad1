"""Decides what is due at the run's present position: its end, an evaluation, a checkpoint."""

from __future__ import annotations

from apt_core.training.context import RunContext


class Due:
    """Decides whether the run ends, evaluates or saves at ``progress``."""

    def __init__(self, run: RunContext, total_steps: int) -> None:
        self._progress, self._stopping = run.progress, run.stopping
        self._steps_per_epoch, self._total_steps = run.parts.plan.steps_per_epoch, total_steps
        self._eval_freq = run.config.evaluation.eval_freq
        self._save_every_steps = run.config.training.save_every_steps

    def ends(self) -> bool:
        """Whether the run ends at this step."""
        return self._stopping.due or self._progress.step >= self._total_steps

    def evaluates(self) -> bool:
        """Whether the profile asks for an evaluation after this step."""
        return self._eval_freq > 0 and self._progress.step % self._eval_freq == 0

    def saves(self) -> bool:
        """Whether the profile asks for a checkpoint after this step."""
        every = self._save_every_steps
        return every is not None and self._progress.step % every == 0

    def ends_epoch(self) -> bool:
        """Whether an epoch ends at this step whose evaluation was not made yet."""
        epochs, index = divmod(self._progress.step, self._steps_per_epoch)
        return index == 0 and self._progress.ended_epochs < epochs

    def evaluates_again(self) -> bool:
        """Whether the run was stopped before the evaluation that the profile asks for at this
        step, so that a resume makes it. The evaluation made for the stop itself does not count."""
        if self.ends():
            return self.ends_epoch()
        within = self._progress.step % self._steps_per_epoch != 0
        judged = self._stopping.judged_step == self._progress.step
        return (within and self.evaluates() and not judged) or self.ends_epoch()
