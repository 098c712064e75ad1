"""The training loop and the life of a run around it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apt_core.config import Config
from apt_core.data.batches import evaluation_batches
from apt_core.device import autocast, cpu_threads, peak_memory_bytes
from apt_core.errors import PluginError, StopTraining, TrainingError
from apt_core.evaluation.quick_eval import evaluate
from apt_core.inference.generator import generate
from apt_core.kernel import Kernel, boot
from apt_core.log import keeping_backlog
from apt_core.modeling.init import seed_of
from apt_core.monitor import ProgressDisplay, Throughput
from apt_core.plugin_manager import PluginManager
from apt_core.schedules import Horizon
from apt_core.training.blame import attributed
from apt_core.training.enabling import Enabling
from apt_core.training.loss import cross_entropy_sum, loss_terms
from apt_core.training.finite_guard import FiniteGuard
from apt_core.training.prepare import num_threads, prepare
from apt_core.training.saving import Saving
from apt_core.training.seeds import seed_model_generator
from apt_core.training.signals import Interrupts
from apt_core.types import GenerationRequest

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("apt.training")


@dataclass
class RunResult:
    """How a run ended. ``status`` is finished, stopped (by a plugin) or interrupted (by a signal);
    ``figures`` holds the final losses, ``sample`` the continuation."""

    status: str
    step: int
    epoch: int
    tokens: int
    figures: dict[str, float]
    folder: Path
    sample: str = ""
    reason: str = ""
    exit_code: int = 0


class Trainer:
    """One training run.

    ``config`` is a booted :class:`~apt_core.kernel.Kernel`, a validated profile, or a plain dict
    with a profile's keys; ``manager`` may hold plugins that are registered already.
    ``output`` is the run's folder (``runs/<profile>/<UTC time>`` without it); ``resume`` goes on
    with the newest checkpoint in it, ``resume_from`` with a named one.

    What hooks may use: ``config model optimizer schedule epoch step tokens device rank world_size
    metrics rng(plugin) request_stop(reason)``. ``epoch`` counts from 1, ``step`` is the number of
    optimizer steps taken, ``tokens`` the target tokens seen, ``metrics`` the newest row.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        config: Kernel | Config | Mapping[str, Any],
        manager: PluginManager | None = None,
        *,
        output: str | Path | None = None,
        resume: bool = False,
        resume_from: str | Path | None = None,
        console: Console | None = None,
        strict: bool = False,
    ) -> None:
        if isinstance(config, Kernel):
            if manager is not None or strict:
                raise ValueError("a Kernel has its manager: give manager and strict to boot()")
            self.kernel = config
        else:
            self.kernel = boot(config, manager=manager, strict=strict)
        self.config: Config = self.kernel.config
        self.manager = self.kernel.manager
        self.console = console
        self.epoch, self.step, self.tokens = 1, 0, 0
        self.metrics: dict[str, Any] = {}
        self.start_scores: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.ended_epochs = 0
        self._terms: dict[str, Tensor] = {}
        self._stop_reason = ""
        self._updating = False
        self._interrupts = Interrupts()
        self._throughput = Throughput()
        self._enabling = Enabling(self)
        self._saving = Saving(self, output, resume, resume_from)

    # What hooks may use ----------------------------------------------------------------------

    def rng(self, plugin: str) -> torch.Generator:
        """A CPU generator that is the plugin's own: a function of (seed, plugin, step)."""
        return torch.Generator().manual_seed(
            seed_of(self.config.training.seed, f"plugin/{plugin}/{self.step}/{self.rank}")
        )

    def request_stop(self, reason: str) -> None:
        """End the run after this step, with a final evaluation and a checkpoint."""
        self._stop_reason = self._stop_reason or reason

    # The run ---------------------------------------------------------------------------------

    def fit(self) -> RunResult:
        """Train to the end of the profile.

        Raises ConfigError for input that does not fit together, CheckpointError for a resume that
        is not possible, and another AptError when the run fails; a checkpoint of the last whole
        step is written first.
        """
        threads = cpu_threads(num_threads(self.config))
        with self._interrupts.listening(), threads, keeping_backlog() as backlog:
            self.parts = prepare(self.kernel)
            self.device = self.parts.device
            self.model: nn.Module = self.parts.model
            self.optimizer = self.parts.optimizer
            self.guard = FiniteGuard(self.optimizer, self.device)
            plan = self.parts.plan
            self.schedule = self.kernel.schedule.with_horizon(
                Horizon(
                    self.config.training.max_epochs,
                    plan.steps_per_epoch,
                    plan.targets_per_epoch,
                    self.config.training.max_steps,
                )
            )
            self.total_steps = self.config.training.max_epochs * plan.steps_per_epoch
            if self.config.training.max_steps is not None:
                self.total_steps = min(self.total_steps, self.config.training.max_steps)
            with self._saving.opened(backlog) as self.folder:
                return self._run()

    def _run(self) -> RunResult:
        self._started = time.perf_counter()
        self._display = ProgressDisplay(
            self.console, self.total_steps, self.config.training.max_epochs
        )
        try:
            try:
                self._enabling.announce()
                self.manager.hook.on_training_start(trainer=self)
                if self.step == 0:
                    self.start_scores = self._evaluate(self.config.evaluation.eval_batches)
                self._display.start(self.step)
                self._train()
            except StopTraining as stop:
                self.request_stop(stop.reason)
            finally:
                self._display.stop()
            return self._finish()
        except BaseException as error:
            known = attributed(self.kernel, error, self._terms)
            self._die(known)
            if known is error:
                raise
            raise known from error

    def _train(self) -> None:
        """The loop, from the current position to the end."""
        training, evaluation = self.config.training, self.config.evaluation
        plan, hook, device = self.parts.plan, self.manager.hook, self.device
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        max_norm = training.gradient_clip or float("inf")
        first_epoch, first_index = divmod(self.step, plan.steps_per_epoch)
        self.model.train()
        if self.ended_epochs < first_epoch and first_index == 0:
            self._end_epoch(first_epoch)

        for epoch in range(first_epoch + 1, training.max_epochs + 1):
            if self._over():
                return
            self.epoch = epoch
            self._enabling.enable_due()
            hook.on_epoch_start(epoch=epoch, trainer=self)

            for index in range(first_index, plan.steps_per_epoch):
                if self._over():
                    return
                step = self.step + 1
                self.manager.step = step
                self._enabling.enable_due()
                batches = [batch.to(device) for batch in plan.step_batches(epoch, index)]
                hook.on_step_start(step=step, batch=list(batches), trainer=self)

                torch.set_grad_enabled(True)  # whatever a plugin has left it at
                targets = sum(batch.num_targets for batch in batches)
                loss = torch.zeros((), device=device)
                terms = self._terms = {}
                self.optimizer.zero_grad(set_to_none=True)
                for micro, batch in enumerate(batches):
                    seed_model_generator(device, training.seed, step, micro, self.rank)
                    with autocast(device, self.parts.dtype):
                        output = self.parts.forward(batch.input_ids)
                        partial = cross_entropy_sum(output, batch) / targets
                    share = batch.num_targets / targets
                    for name, term in loss_terms(self, batch, output):
                        partial = partial + share * term
                        terms[name] = terms.get(name, 0.0) + share * term.detach()
                    partial.backward()
                    loss += partial.detach()
                self._terms = {}  # what fails from here on is not theirs
                hook.on_backward_end(step=step, trainer=self)

                grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
                factor = self.parts.lr_schedule.factor(
                    step, self.total_steps, training.warmup_steps, training.min_lr_ratio
                )
                for group in self.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                if self.config.debug.check_gradients:
                    self._name_bad_gradients(grad_norm)
                self._updating = True
                self.guard.step(loss, grad_norm)
                self.step, self.tokens = step, self.tokens + targets
                self._updating = False
                self._throughput.add(targets)
                hook.on_step_end(step=step, loss=loss, trainer=self)

                if step % training.log_every_steps == 0 or step == self.total_steps:
                    self._log_step(loss, grad_norm, training.learning_rate * factor, terms)
                ends_epoch = index + 1 == plan.steps_per_epoch
                if evaluation.eval_freq and step % evaluation.eval_freq == 0 and not ends_epoch:
                    self._evaluate(evaluation.eval_batches)
                if self._save_due(step) and not ends_epoch:
                    self._save()

            first_index = 0
            self._end_epoch(epoch)

    def _over(self) -> bool:
        return bool(self._stop_reason or self._interrupts or self.step >= self.total_steps)

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, tell, save. A stop before the evaluation is done leaves the epoch open, and a
        resume ends it."""
        scores = self._evaluate()
        if not scores:
            return
        log.info(
            "Epoch %d/%d: loss=%.3f  held out: loss=%.3f ppl=%.2f bits/byte=%.3f",
            epoch,
            self.config.training.max_epochs,
            self.metrics.get("loss", float("nan")),
            scores["val_loss"],
            scores["val_ppl"],
            scores["val_bpb"],
        )
        self.ended_epochs = epoch
        self.manager.hook.on_epoch_end(epoch=epoch, trainer=self)
        save_freq = self.config.training.save_freq
        if (save_freq and epoch % save_freq == 0) or self._save_due(self.step):
            self._save()

    def _save_due(self, step: int) -> bool:
        every = self.config.training.save_every_steps
        return every is not None and step % every == 0

    def _finish(self) -> RunResult:
        """Evaluate and save what was not yet, tell the plugins, show a sample, sum up."""
        status = "finished"
        if self._interrupts:
            status = "interrupted"
        elif self._stop_reason:
            status = "stopped"
        # A plugin that asks to stop here ends its own stage, not the others.
        with suppress(StopTraining):
            if status != "interrupted" and self.scores.get("step") != self.step:
                self._evaluate()
        with suppress(StopTraining):
            self._save(final=True)
        with suppress(StopTraining):
            self.manager.hook.on_training_end(trainer=self)
        sample = ""
        with suppress(StopTraining):
            sample = "" if status == "interrupted" else self._sample()
        result = RunResult(
            status=status,
            step=self.step,
            epoch=self.epoch,
            tokens=self.tokens,
            figures=self._figures(),
            folder=self.folder.path,
            sample=sample,
            reason=self._stop_reason,
            exit_code=self._interrupts.exit_code if status == "interrupted" else 0,
        )
        self._saving.write_manifest(status, figures=result.figures, sample=sample)
        return result

    def _die(self, error: BaseException) -> None:
        """The run ends by ``error``: keep what can be kept and tell the plugins."""
        if isinstance(error, KeyboardInterrupt):
            log.warning("interrupted")
        if not self._updating and self.step > 0:
            try:
                self._saving.save(emergency=True)
            except Exception as failure:
                log.error("no checkpoint of step %d could be written: %s", self.step, failure)
        try:
            self.manager.hook.on_exception(error=error, trainer=self)
        except (PluginError, StopTraining) as failure:
            log.error("%s", failure)
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self._saving.write_manifest(status, figures=self._figures(), error=str(error))

    # Metrics, evaluation ---------------------------------------------------------------

    def _log_step(
        self, loss: Tensor, grad_norm: Tensor, lr: float, terms: Mapping[str, Tensor]
    ) -> None:
        """Write a row of metrics; this is where the host waits for the device."""
        skipped, in_a_row = self.guard.read()
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "tokens": self.tokens,
            "loss": loss.item(),
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_s": round(self._throughput.read(), 1),
        }
        row.update((name, term.item()) for name, term in terms.items())
        if skipped:
            row["skipped_steps"] = skipped
        if self.config.debug.profile_memory:
            row["peak_memory_mb"] = round(peak_memory_bytes(self.device) / 2**20, 1)
        for plugin, metrics in self.manager.call_each("apt_metrics", trainer=self):
            try:
                row.update({f"{plugin}/{name}": float(v) for name, v in metrics.items()})
            except (TypeError, ValueError, AttributeError) as error:
                self.manager.fail(plugin, "apt_metrics", error)
        bad = [name for name in terms if not isfinite(row[name])]
        if skipped > self.metrics.get("skipped_steps", 0):
            log.warning(
                "%d steps were not finite and changed nothing (to step %d)%s",
                skipped,
                self.step,
                f": {', '.join(bad)} is not finite" if bad else "",
            )
        self.metrics = row
        self.folder.write_metrics(row)
        self.manager.hook.on_metrics(metrics=dict(row), step=self.step)
        self._display.update(self.step, self.epoch, row)
        if in_a_row >= self.config.training.max_nonfinite_steps:
            raise TrainingError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"one step {self.step}: "
                + (
                    f"not finite is {', '.join(bad)}, a loss term of a plugin"
                    if bad
                    else f"lower training.learning_rate (now "
                    f"{self.config.training.learning_rate:g}) or raise training.warmup_steps"
                )
            )

    def _name_bad_gradients(self, grad_norm: Tensor) -> None:
        if not torch.isfinite(grad_norm):
            bad = [
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
            ]
            log.warning(
                "step %d: gradients that are not finite in %s", self.step + 1, ", ".join(bad[:8])
            )

    def _evaluate(self, limit: int | None = None) -> dict[str, float]:
        """Score the held-out text: at most ``limit`` batches, or all of it."""
        self._throughput.pause()
        self.model.eval()
        self.manager.hook.on_evaluation_start(trainer=self)
        scores = evaluate(
            self.model,
            evaluation_batches(
                self.parts.val_tokens,
                seq_len=self.parts.plan.seq_len,
                batch_size=self.parts.plan.batch_size,
                limit=limit,
            ),
            device=self.device,
            bytes_per_token=self.parts.bytes_per_token,
            metrics=self.config.evaluation.metrics,
            dtype=self.parts.dtype,
            interrupted=lambda: bool(self._interrupts),
        )
        if scores:
            if limit is None:
                self.scores = {"step": self.step, **scores}
            row = {"step": self.step, "epoch": self.epoch, "tokens": self.tokens, **scores}
            self.metrics = {**self.metrics, **scores}
            self.folder.write_metrics(row)
            try:
                self.manager.hook.on_evaluation_end(trainer=self, metrics=dict(scores))
            finally:
                self.manager.hook.on_metrics(metrics=dict(row), step=self.step)
        self.model.train()
        self._throughput.resume()
        return scores

    def _sample(self) -> str:
        evaluation = self.config.evaluation
        if not evaluation.sample_tokens:
            return ""
        request = GenerationRequest(
            prompt=evaluation.sample_prompt,
            max_new_tokens=evaluation.sample_tokens,
            temperature=evaluation.sample_temperature,
            seed=self.config.training.seed,
        )
        result = generate(
            self.model,
            self.parts.tokenizer,
            request,
            self.manager,
            max_seq_len=self.config.model.max_seq_len,
            device=self.device,
            interrupted=lambda: bool(self._interrupts),
        )
        return result.text

    def _figures(self) -> dict[str, float]:
        final = {key: value for key, value in self.scores.items() if key != "step"}
        start = {f"{key}_start": value for key, value in self.start_scores.items()}
        train = {"loss": self.metrics["loss"]} if "loss" in self.metrics else {}
        seconds = round(time.perf_counter() - self._started, 2)
        return {"steps": self.step, "tokens": self.tokens, "seconds": seconds,
                **train, **start, **final}  # fmt: skip

    def _save(self, *, final: bool = False) -> None:
        self._throughput.pause()
        self._saving.save(final=final)
        self._throughput.resume()
