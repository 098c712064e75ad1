"""What a run has to do at the position to which it has come."""

from __future__ import annotations

from apt_core.config import Config
from apt_core.data.batches import BatchPlan
from apt_core.runs.run_state import Progress
from apt_core.training.stopping import Stopping


class Due:
    """Says whether the run ends, evaluates or saves at ``progress``."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        progress: Progress,
        stopping: Stopping,
        total_steps: int,
    ) -> None:
        self._progress, self._stopping = progress, stopping
        self._steps_per_epoch, self._total_steps = plan.steps_per_epoch, total_steps
        self._eval_freq = config.evaluation.eval_freq
        self._save_every_steps = config.training.save_every_steps

    def ends(self) -> bool:
        """Is the run over?"""
        return self._stopping.due or self._progress.step >= self._total_steps

    def evaluates(self) -> bool:
        """Does the profile ask for an evaluation after this step?"""
        return self._eval_freq > 0 and self._progress.step % self._eval_freq == 0

    def saves(self) -> bool:
        """Does the profile ask for a checkpoint after this step?"""
        every = self._save_every_steps
        return every is not None and self._progress.step % every == 0

    def ends_epoch(self) -> bool:
        """Is this the end of an epoch whose evaluation is still to come?"""
        epochs, index = divmod(self._progress.step, self._steps_per_epoch)
        return index == 0 and self._progress.ended_epochs < epochs

    def evaluates_again(self) -> bool:
        """Is an evaluation of this step, before which the run was stopped, still to be made? One
        that only the stop had asked for does not count."""
        if self.ends():
            return self.ends_epoch()
        within = self._progress.step % self._steps_per_epoch != 0
        judged = self._stopping.judged_step == self._progress.step
        return (within and self.evaluates() and not judged) or self.ends_epoch()
