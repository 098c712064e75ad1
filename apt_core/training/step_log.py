"""The rows of metrics that a run writes as it goes; here the host waits for the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apt_core.device import peak_memory_bytes
from apt_core.errors import TrainingError
from apt_core.monitor import Throughput
from apt_core.training.costs import model_cost
from apt_core.training.peak import measured_peak_flops

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = logging.getLogger("apt.training")

MAX_DUMPS = 20
"""Of how many non-finite steps the batch is written down."""


class StepLog:
    """Turns what the loop has at hand at a log interval into a row, and tells everyone."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.throughput = Throughput()
        self._dumps = 0
        cost = model_cost(trainer.kernel)
        self._flops_per_token = cost.flops_per_token
        self._peak_flops = 0.0

    def write(
        self, loss: Tensor, grad_norm: Tensor, lr: float, terms: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Write the row of the step that was just taken, and return it.

        Raises TrainingError after too many steps in a row that were not finite.
        """
        trainer = self._trainer
        skipped, in_a_row, steps = trainer.guard.read()
        row: dict[str, Any] = {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "tokens": trainer.tokens,
            "loss": loss.item(),
            "lr": lr,
            "grad_norm": grad_norm.item(),
            **self._speed(),
        }
        own = {name: term.item() for name, term in terms.items()}
        shares = trainer.world.gather(own)
        for name in dict.fromkeys(name for share in shares for name in share):
            row[name] = sum(share.get(name, 0.0) for share in shares) / len(shares)
        if skipped:
            row["skipped_steps"] = skipped
        position = {"epoch": trainer.epoch, "step": trainer.step, "tokens": trainer.tokens}
        for name in trainer.schedule.annealed:
            row[f"schedule/{name}"] = trainer.schedule.get_param(name, **position)
        for plugin, metrics in trainer.manager.call_each("apt_metrics", trainer=trainer):
            try:
                row.update({f"{plugin}/{name}": float(v) for name, v in metrics.items()})
            except (TypeError, ValueError, AttributeError) as error:
                trainer.manager.fail(plugin, "apt_metrics", error)
        bad = [name for name in own if not isfinite(row[name])]
        for step in steps:
            self._dump(step)
        if steps:
            log.warning(
                "not finite, and changed nothing: step %s (%d in all)%s; see nonfinite/",
                ", ".join(map(str, steps)),
                skipped,
                f": {', '.join(bad)} is not finite" if bad else "",
            )
        trainer.folder.write_metrics(row)
        trainer.metrics = row
        trainer.manager.hook.on_metrics(metrics=dict(row), step=trainer.step)
        if in_a_row >= trainer.config.training.max_nonfinite_steps:
            raise TrainingError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"one step {trainer.step}: "
                + (
                    f"not finite is {', '.join(bad)}, a loss term of a plugin"
                    if bad
                    else f"lower training.learning_rate (now "
                    f"{trainer.config.training.learning_rate:g}) or raise training.warmup_steps"
                )
            )
        return row

    def _speed(self) -> dict[str, float]:
        """Throughput, model FLOPs utilisation, memory, and where the time of a step goes."""
        trainer = self._trainer
        tokens_per_s = self.throughput.read()
        row = {"tokens_per_s": round(tokens_per_s, 1)}
        if self._flops_per_token is not None:
            self._peak_flops = self._peak_flops or measured_peak_flops(
                trainer.device, trainer.parts.dtype or torch.float32
            )
            used = self._flops_per_token * tokens_per_s / trainer.world_size
            row["mfu"] = round(used / self._peak_flops, 4)
        row["memory_mb"] = round(peak_memory_bytes(trainer.device) / 2**20, 1)
        for part, milliseconds in trainer.clock.read().items():
            row[f"time/{part}_ms"] = round(milliseconds, 3)
        for plugin, seconds in trainer.manager.take_call_seconds().items():
            row[f"time/hooks/{plugin}_ms"] = round(1e3 * seconds, 3)
        return row

    def _dump(self, step: int) -> None:
        """Write down which batch a non-finite step had: its windows and token ids."""
        self._dumps += 1
        if self._dumps > MAX_DUMPS:
            return
        plan = self._trainer.parts.plan
        epoch, index = divmod(step - 1, plan.steps_per_epoch)
        self._trainer.folder.write_json(
            f"nonfinite/step-{step:08d}.json",
            {
                "step": step,
                "epoch": epoch + 1,
                "windows": plan.step_windows(epoch + 1, index).tolist(),
                "input_ids": [
                    batch.input_ids.tolist() for batch in plan.step_batches(epoch + 1, index)
                ],
            },
        )
