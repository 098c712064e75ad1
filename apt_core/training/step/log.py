"""The rows of metrics that a run writes as it goes; here the host waits for the device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apt_core.data.batches import cut_windows
from apt_core.device import peak_memory_bytes, synchronize
from apt_core.hookspecs import MICRO_BATCH_HOOKS
from apt_core.log import get_logger
from apt_core.metric_names import CROSS_ENTROPY, of_memory, of_parameter, of_plugin, of_time
from apt_core.modeling.costs import BACKWARD_AND_FORWARD, model_cost
from apt_core.monitor import Throughput
from apt_core.parallel.peak import measured_peak_flops
from apt_core.parallel.world import local_part
from apt_core.training.diverging import void_steps

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = get_logger("apt.training")

MEMORY_SECONDS = 1.0
"""Asking the system takes it up to half a millisecond."""

TIMES = ("seconds", "training_seconds", "training_tokens")

MAX_DUMPS = 20
"""Of how many non-finite steps the batch is written down."""


def memory_by_part(trainer: Trainer) -> dict[str, float]:
    """What this process holds of each part of a run, in MiB: the rest of ``memory_mb`` are
    activations, the text, and the libraries."""
    model = trainer.model
    averages = [average for average in (trainer.ema, *trainer.averages.values()) if average]
    parts: dict[str, Iterable[Any]] = {
        "weights": [*model.parameters(), *model.buffers()],
        "gradients": (parameter.grad for parameter in model.parameters()),
        "optimizer": (v for state in trainer.optimizer.state.values() for v in state.values()),
        "averages": (value for average in averages for value in average.values.values()),
    }
    return {
        of_memory(part): round(
            sum(local_part(t.detach()).nbytes for t in values if isinstance(t, Tensor)) / 2**20, 3
        )
        for part, values in parts.items()
    }


class StepLog:
    """Turns what the loop has at hand at a log interval into a row, and tells everyone."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.throughput = Throughput()
        self._started = time.perf_counter()
        self._before: dict[str, float] = {}
        cost = model_cost(trainer.kernel)
        self._flops_per_token = cost.flops_per_token
        self._memory, self._memory_due = 0.0, 0.0
        self._peak_flops = 0.0

    def structure_changed(self, added_flops: int) -> None:
        """From now on the forward of a token computes so much more."""
        if self._flops_per_token is not None:
            self._flops_per_token += BACKWARD_AND_FORWARD * added_flops

    def resume(self, spent: Mapping[str, float]) -> None:
        """Go on after a part of the run that had :attr:`spent` so much when it was saved."""
        self._before = {**spent, "steps": self._trainer.step, "tokens": self._trainer.tokens}

    def start(self) -> None:
        """The run begins, or goes on."""
        self._started = time.perf_counter()

    def begin(self) -> None:
        """The first step is about to be taken: what came before it is no training time."""
        self.throughput = Throughput()

    def pause(self) -> None:
        """What follows is no training time, until ``throughput`` is resumed; what the device has
        still to do of the steps before is."""
        synchronize(self._trainer.device)
        self.throughput.pause()

    def write(
        self, loss: Tensor, grad_norm: Tensor, lr: float, shares: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Write the row of the step that was just taken, and return it.

        ``loss`` is that of all processes, ``shares`` the parts that it has in this one: the
        cross-entropy, and the terms of plugins. Raises TrainingError after too many steps in a row
        that were not finite.
        """
        trainer = self._trainer
        own = {name: share.item() for name, share in shares.items()}
        parts = _summed(trainer.world.gather(own), loss.item())
        # Terms of an output that is not finite are not either.
        bad = [name for name, value in parts.items() if not isfinite(value)]
        bad = [] if CROSS_ENTROPY in bad else bad
        skipped, in_a_row = self.tell_skipped(bad)
        row: dict[str, Any] = {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "tokens": trainer.tokens,
            "loss": loss.item(),
            CROSS_ENTROPY: parts.pop(CROSS_ENTROPY),
            "lr": lr,
            "grad_norm": grad_norm.item(),
            **self._speed(),
        }
        row |= parts
        if skipped:
            row["skipped_steps"] = skipped
        for name in trainer.schedule.annealed:
            row[of_parameter(name)] = trainer.param(name)
        for plugin, metrics in trainer.manager.call_each("apt_metrics", trainer=trainer):
            row.update({of_plugin(plugin, name): value for name, value in metrics.items()})
        trainer.folder.write_metrics(row)
        trainer.metrics = row
        if trainer.world.is_first:
            trainer.manager.hook.on_metrics(metrics=dict(row), step=trainer.step)
        if in_a_row >= trainer.config.training.max_nonfinite_steps:
            what = (
                f"{in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"one step {trainer.step}"
            )
            raise void_steps(trainer, what, row)
        return row

    def tell_skipped(self, bad: Sequence[str] = ()) -> tuple[int, int]:
        """Log and dump the steps that were not finite, those since the last call; waits for the
        device. ``bad`` are loss terms that are known not to be.

        Returns how many there were in all, and how many in a row up to now.
        """
        skipped, in_a_row, steps = self._trainer.guard.read()
        if steps:
            shown = ", ".join(map(str, steps[:MAX_DUMPS]))
            log.warning(
                "not finite, and changed nothing: step %s%s (%d in all)%s; see nonfinite/",
                shown,
                f" and {len(steps) - MAX_DUMPS} more" if len(steps) > MAX_DUMPS else "",
                skipped,
                f": {', '.join(bad)} is not finite" if bad else "",
            )
        if self._trainer.folder.writes:
            for step in steps[:MAX_DUMPS]:
                self._dump(step)
        return skipped, in_a_row

    def _memory_mb(self) -> float:
        """The peak so far, at most MEMORY_SECONDS old."""
        now = time.monotonic()
        if now >= self._memory_due:
            self._memory_due = now + MEMORY_SECONDS
            self._memory = round(peak_memory_bytes(self._trainer.device) / 2**20, 1)
        return self._memory

    @property
    def spent(self) -> dict[str, float]:
        """Seconds and memory that the run has taken so far, all its parts together; of the seconds
        those of training, and the tokens trained on in them."""
        tokens, training = self.throughput.overall()
        own = {
            "seconds": time.perf_counter() - self._started,
            "training_seconds": training,
            "training_tokens": tokens,
        }
        whole = {name: self._before.get(name, 0.0) + value for name, value in own.items()}
        whole["memory_mb"] = max(self._memory_mb(), self._before.get("memory_mb", 0.0))
        return whole

    def figures(self) -> dict[str, float]:
        """Of the run as a whole: its length in steps, tokens and seconds, speed, memory, and what
        went wrong. After a resume ``part_…`` are of what came since."""
        trainer, spent = self._trainer, self.spent
        length = {"steps": trainer.step, "tokens": trainer.tokens}
        figures = {**length, **_pace(spent), "memory_mb": spent["memory_mb"]}
        if self._before:
            own = {name: spent[name] - self._before.get(name, 0.0) for name in TIMES}
            part = {name: value - self._before[name] for name, value in length.items()}
            figures |= {f"part_{name}": value for name, value in {**part, **_pace(own)}.items()}
            ended = trainer.folder.ended.get("figures", {})
            if not part["steps"] and ended.get("steps") == trainer.step:
                # Nothing was trained: what the end of the run has recorded stands.
                timed = ("seconds", "tokens_per_s", "memory_mb")
                figures |= {name: ended[name] for name in timed if name in ended}
        counts = {
            "skipped_steps": trainer.guard.known,
            "failed_checkpoints": len(trainer.saving.failures),
        }
        return {**figures, **{name: count for name, count in counts.items() if count}}

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
            row["mfu"] = float(f"{used / self._peak_flops:.3g}")
        row["memory_mb"] = self._memory_mb()
        if trainer.config.debug.profile_memory:
            row.update(memory_by_part(trainer))
        return row | self._time()

    def _time(self) -> dict[str, float]:
        """Milliseconds of a step by part, and within two of the parts by plugin."""
        trainer = self._trainer
        steps = max(1, trainer.clock.steps)
        whole = trainer.clock.read()
        row = {of_time(part): round(milliseconds, 3) for part, milliseconds in whole.items()}
        shares: dict[str, dict[str, float]] = {"hooks": {}, "loss_terms": {}}
        for (hook, plugin), seconds in trainer.manager.plans.take_call_seconds().items():
            share = shares["loss_terms" if hook in MICRO_BATCH_HOOKS else "hooks"]
            share[plugin] = share.get(plugin, 0.0) + 1e3 * seconds / steps
        for kind, part in (("hooks", "hooks"), ("loss_terms", "forward_backward")):
            # A plugin that waits for a GPU waits for more than is the part's own.
            total = sum(shares[kind].values())
            factor = min(1.0, whole[part] / total) if total else 0.0
            row |= {
                of_time(kind, plugin): round(factor * milliseconds, 3)
                for plugin, milliseconds in shares[kind].items()
            }
        return row

    def _dump(self, step: int) -> None:
        """Write down which batch a non-finite step had, in all processes together: its windows of
        the text, and the token ids of each."""
        folder, plan = self._trainer.folder, self._trainer.parts.plan
        # Those of the run before it was resumed count too.
        if sum(1 for _ in folder.path.glob("nonfinite/step-*.json")) >= MAX_DUMPS:
            return
        epoch, index = divmod(step - 1, plan.steps_per_epoch)
        windows = plan.step_windows(epoch + 1, index)
        batch = cut_windows(plan.tokens, windows, plan.seq_len)
        folder.write_json(
            f"nonfinite/step-{step:08d}.json",
            {
                "step": step,
                "epoch": epoch + 1,
                "windows": windows.tolist(),
                "input_ids": batch.input_ids.tolist(),
            },
        )


def _pace(spent: Mapping[str, float]) -> dict[str, float]:
    seconds, tokens = spent["training_seconds"], spent["training_tokens"]
    return {
        "seconds": round(spent["seconds"], 2),
        "tokens_per_s": round(tokens / seconds if seconds else 0.0, 1),
    }


def _summed(shares: Sequence[Mapping[str, float]], loss: float) -> dict[str, float]:
    """The parts of the loss by name, from those of each process; the cross-entropy first, which
    without any term is the loss to the bit."""
    names = dict.fromkeys(name for share in shares for name in share)
    parts = {n: sum(share.get(n, 0.0) for share in shares) / len(shares) for n in names}
    return parts if len(parts) > 1 else {CROSS_ENTROPY: loss}
