"""Writes rows of metrics; the only place where the host waits for the device at a log interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING
from math import isfinite
from typing import Any

from torch import Tensor

from apt_core.hookspecs import MICRO_BATCH_HOOKS
from apt_core.log import get_logger
from apt_core.metric_names import CROSS_ENTROPY, of_memory, of_parameter, of_plugin, of_time
from apt_core.runs.folder import RunFolder
from apt_core.training.context import RunContext
from apt_core.training.diverging import void_steps
from apt_core.training.step.clock import StepClock
from apt_core.training.step.parameters import ScheduledParameters
from apt_core.training.step.usage import Usage

log = get_logger("apt.training")

MAX_DUMPS = 20
"""The number of non-finite steps whose batch is written to nonfinite/."""


class StepLog:
    """Makes a row of metrics from the loop's values and passes it to hooks, file and log."""

    def __init__(
        self,
        run: RunContext,
        folder: RunFolder,
        parameters: ScheduledParameters,
        annealed: Sequence[str],
        usage: Usage,
        clock: StepClock,
    ) -> None:
        self._run, self._folder, self._training = run, folder, run.config.training
        self._parameters, self._annealed = parameters, annealed
        self._usage, self._clock = usage, clock

    def write(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        rates: Mapping[str, float],
        shares: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """Write the row of the step that was just taken, and return it.

        ``loss`` is the loss over all processes; ``shares`` are its parts in this process: the
        cross-entropy and the terms of plugins. Raises TrainingError after too many non-finite
        steps in a row.
        """
        progress = self._run.progress
        own = {name: share.item() for name, share in shares.items()}
        parts = _summed(self._run.world.gather(own), loss.item())
        # If the output is not finite, every term is not finite: name the cross-entropy alone.
        bad = [name for name, value in parts.items() if not isfinite(value)]
        bad = [] if CROSS_ENTROPY in bad else bad
        skipped, in_a_row = self.log_skipped_steps(bad)
        row: dict[str, Any] = {
            "step": progress.step,
            "epoch": progress.epoch,
            "tokens": progress.tokens,
            "loss": loss.item(),
            CROSS_ENTROPY: parts.pop(CROSS_ENTROPY),
            **rates,
            "grad_norm": grad_norm.item(),
            **self._usage.speed(),
            **self._memory(),
            **self._time(),
        }
        row |= parts
        if skipped:
            row["skipped_steps"] = skipped
        for name in self._annealed:
            row[of_parameter(name)] = self._parameters.value(name)
        for plugin, metrics in self._run.manager.call_each(
            "apt_metrics", trainer=self._run.trainer
        ):
            row.update({of_plugin(plugin, name): value for name, value in metrics.items()})
        self._folder.write_metrics(row)
        progress.metrics = row
        if self._run.world.is_first:
            self._run.manager.hook.on_metrics(metrics=dict(row), step=progress.step)
        if in_a_row >= self._training.max_nonfinite_steps:
            what = (
                f"{in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"one step {progress.step}"
            )
            raise void_steps(self._training, self._folder, what, row)
        return row

    def log_skipped_steps(self, bad: Sequence[str] = ()) -> tuple[int, int]:
        """Log and dump the non-finite steps since the last call; waits for the device. ``bad`` are
        loss terms that are known not to be finite.

        Returns the number of such steps in the whole run, and of those in a row up to now.
        """
        skipped, in_a_row, steps = self._run.trained.guard.read()
        if steps:
            shown = ", ".join(map(str, steps[:MAX_DUMPS]))
            shown += f" and {len(steps) - MAX_DUMPS} more" if len(steps) > MAX_DUMPS else ""
            known = f": {', '.join(bad)} is not finite" if bad else ""
            self._run.events.record(
                "skipped",
                f"not finite, and changed nothing: step {shown} ({skipped} in all){known}; see "
                "nonfinite/",
                step=steps[-1],
                log=log,
                level=WARNING,
                steps=steps[:MAX_DUMPS],
                count=len(steps),
                total=skipped,
            )
        if self._folder.writes:
            for step in steps[:MAX_DUMPS]:
                self._dump(step)
        return skipped, in_a_row

    def _memory(self) -> dict[str, float]:
        """MiB that this process holds for each part of the run, if the profile asks for it. The
        rest of ``memory_mb`` is activations, the text and libraries."""
        if not self._run.config.debug.profile_memory:
            return {}
        parts = self._run.trained.nbytes_by_part().items()
        return {of_memory(part): round(nbytes / 2**20, 3) for part, nbytes in parts}

    def _time(self) -> dict[str, float]:
        """Milliseconds of a step by part, and within two of the parts by plugin."""
        steps = max(1, self._clock.steps)
        whole = self._clock.read()
        row = {of_time(part): round(milliseconds, 3) for part, milliseconds in whole.items()}
        shares: dict[str, dict[str, float]] = {"hooks": {}, "loss_terms": {}}
        for (hook, plugin), seconds in self._run.manager.plans.take_call_seconds().items():
            share = shares["loss_terms" if hook in MICRO_BATCH_HOOKS else "hooks"]
            share[plugin] = share.get(plugin, 0.0) + 1e3 * seconds / steps
        for kind, part in (("hooks", "hooks"), ("loss_terms", "forward_backward")):
            # A plugin that waits for the GPU also waits for work that is not the hooks' own.
            total = sum(shares[kind].values())
            factor = min(1.0, whole[part] / total) if total else 0.0
            row |= {
                of_time(kind, plugin): round(factor * milliseconds, 3)
                for plugin, milliseconds in shares[kind].items()
            }
        return row

    def _dump(self, step: int) -> None:
        """Write the batch of a non-finite step, over all processes, to nonfinite/: its windows of
        the text and the token ids of each."""
        folder, plan = self._folder, self._run.parts.plan
        # Dumps from before a resume count too.
        if sum(1 for _ in folder.path.glob("nonfinite/step-*.json")) >= MAX_DUMPS:
            return
        epoch, index = divmod(step - 1, plan.steps_per_epoch)
        drawn = plan.drawn(epoch + 1, index)
        batch = plan.batch(drawn)
        folder.write_json(
            f"nonfinite/step-{step:08d}.json",
            {
                "step": step,
                "epoch": epoch + 1,
                "sources": [plan.order.names[source] for source in drawn.sources],
                "windows": drawn.windows.tolist(),
                "input_ids": batch.input_ids.tolist(),
            },
        )


def _summed(shares: Sequence[Mapping[str, float]], loss: float) -> dict[str, float]:
    """The parts of the loss by name, summed over the processes, the cross-entropy first. Without
    terms it is exactly ``loss``."""
    names = dict.fromkeys(name for share in shares for name in share)
    parts = {n: sum(share.get(n, 0.0) for share in shares) / len(shares) for n in names}
    return parts if len(parts) > 1 else {CROSS_ENTROPY: loss}
