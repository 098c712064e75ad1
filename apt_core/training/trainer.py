"""The training loop and the life of a run around it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.config import Config
from apt_core.data.batches import Batch
from apt_core.device import (
    as_current_device,
    autocast,
    available_memory,
    cpu_threads,
    held_memory,
    is_out_of_memory,
)
from apt_core.error_text import one_line, text_of
from apt_core.errors import (
    CheckpointError,
    PluginError,
    ProcessLostError,
    StopTraining,
    TrainingError,
)
from apt_core.hookspecs import MICRO_BATCH_HOOKS, hooks_where
from apt_core.kernel import Kernel, before_the_run, boot
from apt_core.log import get_logger, keeping_backlog, of_one_run
from apt_core.metric_names import CROSS_ENTROPY
from apt_core.modeling.blame import attributed, usable_factor
from apt_core.modeling.casts import KeptCasts
from apt_core.modeling.compilation import readers_of_outputs
from apt_core.modeling.init import seed_of
from apt_core.modeling.modes import eval_mode
from apt_core.modeling.placement import num_threads, settle_device
from apt_core.modeling.seeds import ModelSeeds, deterministic_kernels, fp32_products
from apt_core.monitor import ProgressDisplay
from apt_core.optim.averages import WeightAverage
from apt_core.parallel.gradient_sum import GradientSum
from apt_core.parallel.world import World
from apt_core.plain_values import MAX_FACTOR
from apt_core.planning.memory import out_of_memory_advice, own_memory
from apt_core.planning.run_length import horizon
from apt_core.plugin_manager import PluginManager
from apt_core.runs.folder import RunFolder
from apt_core.runs.manifest import write_manifest
from apt_core.torch_state import TorchWatch
from apt_core.training.curriculum.enabling import Enabling
from apt_core.training.curriculum.model_modes import ModelModes
from apt_core.training.curriculum.switching import Switching
from apt_core.training.diverging import diverged, listed, void_steps
from apt_core.training.evaluating import Evaluator
from apt_core.training.opening import Opening
from apt_core.training.prepare import loop_forward, prepare
from apt_core.training.saving import Saving
from apt_core.training.step.callbacks import Callbacks
from apt_core.training.step.clock import StepClock
from apt_core.training.step.finite_guard import FiniteGuard
from apt_core.training.step.forward import compiler_settings
from apt_core.training.step.gradients import Gradients, name_bad_gradients
from apt_core.training.step.log import StepLog
from apt_core.training.step.loss import loss_terms, without_gradients
from apt_core.training.stopping import Stopping
from apt_core.types import ModelOutput

if TYPE_CHECKING:
    from rich.console import Console

log = get_logger("apt.training")

KEEP_MODES = hooks_where(lambda policy: policy.in_step and not policy.sets_modes)
"""Hooks of every step that are to leave the modes of modules alone."""


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
    with the newest checkpoint in it, ``resume_from`` with a named one. ``stop_at_step`` ends this
    part of the run there and leaves the schedules as they are. ``allow_change`` names rates (such
    as ``training.learning_rate``) in which a resume may differ from its checkpoint.

    What hooks may use: ``config registry model optimizer schedule epoch step tokens device rank
    world_size metrics output_dir step_void param(name) rng(plugin) autocast() forward(batch)
    average(plugin, decay) request_stop(reason)``. ``epoch`` counts from 1, ``step`` is the number
    of optimizer steps taken, ``tokens`` the target tokens seen, ``metrics`` the newest row of a
    step, with the scores of an evaluation since, which is of step ``val_step``, ``output_dir`` the
    run's folder.
    ``step_void`` says whether the newest step was not finite, and so changed nothing: a bool, or
    where the device alone knows 0-d, 1.0 or 0.0. A plugin may replace ``model`` and ``optimizer``
    in mid-run: do not keep them.
    """

    folder: RunFolder
    saving: Saving

    def __init__(
        self,
        config: Kernel | Config | Mapping[str, Any],
        manager: PluginManager | None = None,
        *,
        output: str | Path | None = None,
        resume: bool = False,
        resume_from: str | Path | None = None,
        stop_at_step: int | None = None,
        allow_change: Sequence[str] = (),
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
        self.manager, self.registry = self.kernel.manager, self.kernel.registry
        self.console = console
        self.world = World.from_environment(self.config, self.kernel.place)
        self.rank, self.world_size = self.world.rank, self.world.size
        self.epoch, self.step, self.tokens = 1, 0, 0
        self.metrics: dict[str, Any] = {}
        self.start_scores: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.ended_epochs = 0
        self._row_due: tuple[Tensor, Tensor, float, dict[str, Tensor]] | None = None
        self.timeline: list[dict[str, Any]] = []
        self.allow_change = tuple(dict.fromkeys(allow_change))
        self.changes: list[dict[str, Any]] = []
        self.averages: dict[str, WeightAverage] = {}
        self.asked_decays: dict[str, float] = {}
        self._restored_decays: dict[str, float] = {}
        self.stopping = Stopping(self.config, stop_at_step, alone=self.world_size == 1)
        self.switching = Switching(self)
        self._callbacks = Callbacks(self.manager)
        self._watch: TorchWatch | None = None
        self.modes = ModelModes()
        self._at = 0, 0  # the step at hand, and the tokens before it
        self.in_step = False  # have some of the hooks of a step been called, and not all?
        self._terms: dict[str, Tensor] = {}
        self.step_void: bool | Tensor = False
        self._updating = False
        self.resumed_step: int | None = None  # the one that a checkpoint was taken up at
        if self.world_size > 1:
            self.manager.stop_together = self.request_stop
        self._opening = Opening(output, resume, resume_from)

    # What hooks may use ----------------------------------------------------------------------

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def param(self, name: str, default: Any = None) -> Any:
        """The scheduled value of a parameter in the step at hand; ``default`` if the profile gives
        it none."""
        step, tokens = self._at
        return self.schedule.get_param(
            name, epoch=self.epoch, step=step, tokens=tokens, default=default
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the loop computes its forward, for another one."""
        return autocast(self.device, self.parts.dtype)

    def forward(self, batch: Batch) -> ModelOutput:
        """What the model gives for ``batch`` in training, as the loop computes it."""
        return self.parts.forward.output(batch)

    def average(self, plugin: str, decay: float) -> WeightAverage:
        """A moving average of the weights that belongs to the plugin: made of the present weights
        by the first call, and the same one after.

        As long as the plugin is enabled it takes the weights in after every step, with its
        ``decay``, which may be set before any of them; it is carried along when the structure of
        the model changes, and is part of checkpoints. After a resume the first call may ask for
        another decay than the first one ever did, which then is taken.
        """
        if plugin not in self.manager.records:
            raise ValueError(f"there is no plugin {plugin!r} that an average could belong to")
        asked = self._restored_decays.pop(plugin, decay)
        if plugin not in self.averages:
            self.averages[plugin] = WeightAverage(self.model, decay, warmup=False)
            self.asked_decays[plugin] = decay
        elif asked != decay:
            log.info(
                "the average of plugin %s goes on with decay %g, asked was %g before",
                plugin,
                decay,
                asked,
            )
            self.averages[plugin].decay = self.asked_decays[plugin] = decay
        average = self.averages[plugin]
        average.compute = self.parts.forward.with_weights
        return average

    def restore_average(self, plugin: str, decay: float, asked: float | None) -> WeightAverage:
        """The average that a checkpoint holds, for its values to be read into: it had come to
        ``decay``, and the plugin had asked for ``asked`` when it was made (None where the
        checkpoint does not say). Asking for another one first is a change of mind."""
        average = self.average(plugin, decay if asked is None else asked)
        average.decay = decay
        if asked is not None:
            self._restored_decays[plugin] = asked
        return average

    def rng(self, plugin: str) -> torch.Generator:
        """A CPU generator that is the plugin's own: a function of (seed, plugin, step)."""
        return torch.Generator().manual_seed(
            seed_of(self.config.training.seed, f"plugin/{plugin}/{self.step}/{self.rank}")
        )

    def request_stop(self, reason: str) -> None:
        """End the run after this step, with a final evaluation and a checkpoint."""
        self.stopping.request(reason)

    # The run ---------------------------------------------------------------------------------

    def fit(self) -> RunResult:
        """Train to the end of the profile.

        Raises ConfigError for input that does not fit together, CheckpointError for a resume that
        is not possible, and another AptError when the run fails; a checkpoint of the last whole
        step is written first.
        """
        # Not before: plugins may be registered until now.
        self.manager.watch = self._watch = TorchWatch() if self.manager.list_name_plugin() else None
        if self._watch is None:
            return self._fit()
        before = self._watch.before()
        try:
            return self._fit()
        finally:
            self._watch.stepping, self._watch.model = False, None
            self._watch.put_back(before)

    def _fit(self) -> RunResult:
        training = self.config.training
        threads = cpu_threads(num_threads(self.config))
        deterministic = deterministic_kernels(training.deterministic)
        timeout, plugins = training.hook_timeout, self.manager.list_name_plugin()
        process = f" in process {self.rank}, for which the others wait" if self.rank else ""
        with (
            of_one_run(self.manager.failures.note_log_error),
            self.manager.hook_deadline(timeout if plugins else 0.0, process),
            self.stopping.interrupts.listening(),
            threads,
            deterministic,
            keeping_backlog() as backlog,
        ):
            with before_the_run():
                self.device = settle_device(self.kernel, self.world)
            with (
                as_current_device(self.device),
                fp32_products(self.device, tf32=self.config.hardware.tf32),
                self.world.joined(self.device, self.config.hardware.backend),
            ):
                self._held = held_memory(self.device)
                try:
                    with self._watching_providers():
                        self.parts = prepare(self.kernel, self.device, self.world)
                except Exception as error:
                    if not is_out_of_memory(error) or isinstance(error, PluginError):
                        raise
                    raise self._out_of_memory(error, "before the first step") from error
                self._callbacks.apart = self.parts.forward.compilation.mode is not None
                # The text too, but not what the run is to have.
                self._held = held_memory(self.device) - own_memory(self.parts.model)
                self._use(self.parts.model, self.parts.optimizer)
                self.ema = None
                if training.ema_decay is not None:
                    self.ema = WeightAverage(self.model, training.ema_decay)
                ends = horizon(self.config, self.parts.plan)
                self.schedule = self.kernel.schedule.with_horizon(ends)
                self.total_steps = ends.last("step") or 0
                self.clock = StepClock(self.device)
                self.step_log = StepLog(self)
                self._enabling = Enabling(self)
                self.evaluator = Evaluator(self)
                compilation = self.parts.forward.compilation
                with (
                    compiler_settings(self.config, compilation),
                    self._opening.opened(self, backlog),
                ):
                    self._at = self.step, self.tokens
                    return self._run()

    @contextmanager
    def _watching_providers(self) -> Iterator[None]:
        """Put back what providers change in the process inside."""
        watch = self._watch
        before = None if watch is None else watch.before()
        yield
        if watch is not None and (changes := watch.put_back(before)):
            self.manager.failures.left_behind(changes, ())

    def _run(self) -> RunResult:
        self.step_log.start()
        self._first_step = self.step
        self._display = ProgressDisplay(
            self.console,
            self.stopping.last_step(self.total_steps),
            self.config.training.max_epochs,
            self.config.training.max_seconds,
        )
        try:
            try:
                self._enabling.announce()
                self.manager.hook.on_training_start(trainer=self)
                self.manager.failures.settle()
                self.modes.started(self.model)
                self._require_known_parameters()
                if self.step == 0:
                    self.start_scores = self._evaluate(everything=False)
                self._display.start(self.step)
                self._train()
            except StopTraining as stop:
                self.request_stop(stop.reason)
            finally:
                self._display.stop()
            return self._finish()
        except BaseException as error:
            known: BaseException
            if is_out_of_memory(error) and not isinstance(error, PluginError):
                self._gradients.clear()
                known = self._out_of_memory(error, f"in step {self.step + 1}")
            else:
                begun = self._updating and self.step == self.resumed_step
                known = attributed(self.kernel, error, () if begun else self._terms)
                if begun and known is error and isinstance(error, Exception):
                    known = CheckpointError(
                        f"the optimizer failed in its first step with what the checkpoint of step "
                        f"{self.step} holds of it: {one_line(error)}"
                    )
            self._die(known)
            if known is error:
                raise
            raise known from error

    def _train(self) -> None:
        """The loop, from the current position to the end."""
        training, world = self.config.training, self.world
        plan, hook, device, clock = self.parts.plan, self.manager.hook, self.device, self.clock
        watch = self._watch
        seeds = ModelSeeds(device, training.seed, self.rank)
        first_epoch, first_index = divmod(self.step, plan.steps_per_epoch)
        self.step_log.begin()
        if self._over():
            return
        if self.evaluates_again():
            if self._in_open_epoch:
                self._end_epoch(first_epoch)
            else:
                self._evaluate(everything=False)
                if self._save_due():
                    self._save()

        zero = torch.zeros((), device=device)
        scaled = 0  # the number of targets that ``scale`` is for
        torch.set_grad_enabled(True)
        if watch is not None:
            watch.expect(self.model)
        for epoch in range(first_epoch + 1, training.max_epochs + 1):
            if self._over():
                return
            self.epoch = epoch
            self._at = self.step + 1, self.tokens
            self.in_step = True
            self._enabling.enable_due()
            self._enabling.tell_parameters(f"epoch {epoch}")
            hook.on_epoch_start(epoch=epoch, trainer=self)

            for index in range(first_index, plan.steps_per_epoch):
                if self._over():
                    return
                step = self.step + 1
                logged = step % training.log_every_steps == 0 or step == self.total_steps
                self.manager.step = step
                self._at = step, self.tokens
                self.in_step = True
                self.manager.plans.timing = logged or clock.every_step
                if self._enabling.enable_due():
                    self._enabling.tell_parameters(f"step {step}")
                clock.start(sampling=logged)
                batches = [batch.to(device) for batch in plan.step_batches(epoch, index)]
                targets = plan.step_targets(epoch, index)
                clock.lap("data")
                if watch is not None:
                    watch.begin_step()
                    if not watch.modes_unchanged():
                        self.manager.failures.left_behind(watch.put_back(), KEEP_MODES)
                # To call what nobody implements takes ten times as long as to ask.
                if hook.on_step_start.get_hookimpls():
                    hook.on_step_start(step=step, batch=list(batches), trainer=self)
                self._settle_process()
                clock.lap("hooks")

                self._callbacks.guard(self.model, self.optimizer)
                together = self._together
                if together is not None:
                    together.begin()
                if targets != scaled:
                    # Gradients are averaged over the processes, and are to be their sum.
                    scale, scaled = torch.full((), world.size / targets, device=device), targets
                total = entropy = zero
                terms = self._terms = {}
                adding = bool(hook.apt_loss_terms.get_hookimpls())
                outputs = adding and bool(readers_of_outputs(hook))
                self._gradients.clear()
                for micro, batch in enumerate(batches):
                    seeds.seed(step, micro)
                    last = micro + 1 == len(batches)
                    if together is not None:
                        together.expect(last=last)
                    with self._casts.used(self.parts.dtype), autocast(device, self.parts.dtype):
                        summed, output = self.parts.forward(
                            batch, outputs=outputs, again=seeds.again
                        )
                    if last:
                        self._casts.forget()  # from here on the backward lets go of them
                    if logged:
                        entropy = entropy + summed.detach()
                    for name, term in loss_terms(self, batch, output) if adding else ():
                        if not batch.num_targets:  # padding, of which a mean may be no number
                            summed = summed + without_gradients(term)
                            continue
                        term = batch.num_targets * term
                        summed = summed + term
                        terms[name] = terms.get(name, zero) + term.detach()
                    if adding and watch is not None and not watch.settled():
                        self.manager.failures.left_behind(watch.put_back(), MICRO_BATCH_HOOKS)
                    if not summed.requires_grad:
                        raise TrainingError(f"step {step}: every parameter of the model is frozen")
                    summed.backward(scale)
                    total = total + summed.detach() if micro else summed.detach()
                    del output, summed  # before the next forward takes as much memory
                loss = total * scale
                self._terms = {}  # what fails from here on is not theirs
                if together is not None:
                    loss, stopping = together.finish(step, loss, self.stopping.wanted)
                    if logged:
                        together.require_all()
                    if logged or device.type == "cpu":
                        self.stopping.agreed = bool(stopping.item())
                clock.lap("forward_backward")
                if hook.on_backward_end.get_hookimpls():
                    hook.on_backward_end(step=step, trainer=self)
                clock.lap("hooks")

                grad_norm = self._gradients.clip()
                factor = self.parts.lr_schedule.factor(
                    step, self.total_steps, training.warmup_steps, training.min_lr_ratio
                )
                if not (type(factor) is float and 0.0 <= factor <= MAX_FACTOR):
                    factor = usable_factor(self.kernel, factor)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                if self.config.debug.check_gradients:
                    name_bad_gradients(self.model, grad_norm, step)
                self._updating = True
                self._row_due = None
                if logged:
                    shares = {CROSS_ENTROPY: entropy * scale}
                    shares |= {name: term * scale for name, term in terms.items()}
                    self._row_due = loss, grad_norm, training.learning_rate * factor, shares
                void = self.step_void = self.guard.step(step, loss, grad_norm)
                self.step, self.tokens = step, self.tokens + targets
                if self.ema is not None:
                    self.ema.update(step, void)
                for plugin, average in self.averages.items():
                    if self.manager.records[plugin].state == "active":
                        average.update(step, void)
                self._updating = False
                clock.lap("optimizer")
                self.step_log.throughput.add(targets)
                if hook.on_step_end.get_hookimpls():
                    hook.on_step_end(step=step, loss=loss, trainer=self)
                self.in_step = False
                clock.lap("hooks")

                self.stopping.check_limits(step)
                if self._row_due is not None:
                    row = self.step_log.write(*self._row_due)
                    self._display.update(step, epoch, row)
                    self.manager.failures.settle()
                    self._enabling.share_quarantines()
                    self.saving.poll()
                if self._over():
                    return  # what is due at this step may take long, and comes after the checkpoint
                ends_epoch = index + 1 == plan.steps_per_epoch
                if self._evaluation_due() and not ends_epoch:
                    self._evaluate(everything=False)
                if self._save_due() and not ends_epoch:
                    self._save()

            first_index = 0
            self._end_epoch(epoch)

    def _settle_process(self, *, whole: bool = False) -> None:
        """Put back what the hooks of a step have left changed and is looked for once a step, or
        before something else is computed: then the ``whole`` of it."""
        watch = self._watch
        if watch is None or not watch.stepping or (not whole and watch.settled()):
            return
        if left := watch.put_back():
            self.manager.failures.left_behind(left)

    def switch_to(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Go on with another model, which has the place of the one before in everything."""
        skipped = self.guard.state()
        # What holds the old one goes first.
        del self.parts.forward
        self._use(model, optimizer)
        self.guard.load(*skipped)
        self.parts.model, self.parts.optimizer = model, optimizer
        self.parts.forward = loop_forward(self.kernel, model, self.device, self.world)
        if self._watch is not None and self._watch.stepping:
            self._watch.expect(model)

    def _use(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Train ``model`` with ``optimizer``."""
        training = self.config.training
        self.model, self.optimizer = model, optimizer
        if self._watch is not None:
            self._watch.model = model
        self._known = dict(model.named_parameters())
        self._casts = KeptCasts(model)
        self._together = GradientSum(model, self.world) if self.world_size > 1 else None
        self.guard = FiniteGuard(optimizer, self.device, window=training.log_every_steps)
        self._gradients = Gradients(optimizer, training.gradient_clip)

    def _strangers(self) -> list[str]:
        """Parameters that came into the model after its optimizer was made."""
        # The parameters of a sharded model are other objects while it computes.
        by_name = self.world.sharding == "fsdp"
        return [
            name
            for name, parameter in self.model.named_parameters()
            if name not in self._known or not (by_name or self._known[name] is parameter)
        ]

    def _require_known_parameters(self) -> None:
        """Raises TrainingError for parameters that would never learn, and that no resume could put
        back."""
        if strangers := self._strangers():
            raise TrainingError(
                f"the optimizer does not have {listed(strangers)}: a plugin has put other "
                "parameters into the model in mid-run, which would never learn. Let a provider "
                "build them (apt_register_providers), or a transform (apt_transform_model)"
            )

    def _over(self) -> bool:
        return self.stopping.due or self.step >= self.total_steps

    def evaluates_again(self) -> bool:
        """Is an evaluation of the current step, before which the run was stopped, still to be made?
        One that only the stop had asked for does not count."""
        if self._over():
            return self._in_open_epoch
        within = self.step % self.parts.plan.steps_per_epoch != 0
        due = within and self._evaluation_due() and self.stopping.judged_step != self.step
        return due or self._in_open_epoch

    @property
    def _in_open_epoch(self) -> bool:
        """Is this the end of an epoch whose evaluation is still to come?"""
        epochs, index = divmod(self.step, self.parts.plan.steps_per_epoch)
        return index == 0 and self.ended_epochs < epochs

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, tell, save. A stop before the evaluation is done leaves the epoch open, and a
        resume ends it."""
        scores = self._evaluate(everything=True)
        if not scores:
            return
        log.info(
            "Epoch %d/%d: loss=%.3f%s  held out: loss=%.3f ppl=%.2f bits/byte=%.3f",
            epoch,
            self.config.training.max_epochs,
            self.metrics.get(CROSS_ENTROPY, float("nan")),
            "" if self.metrics.get("step") == self.step else f" (step {self.metrics.get('step')})",
            scores["val_loss"],
            scores["val_ppl"],
            scores["val_bpb"],
        )
        self.ended_epochs = epoch
        self.manager.hook.on_epoch_end(epoch=epoch, trainer=self)
        save_freq = self.config.training.save_freq
        if (save_freq and epoch % save_freq == 0) or self._save_due():
            self._save()

    def _evaluation_due(self) -> bool:
        every = self.config.evaluation.eval_freq
        return every > 0 and self.step % every == 0

    def _save_due(self) -> bool:
        every = self.config.training.save_every_steps
        if every is not None and self.step % every == 0:
            return True
        return self.saving.finds_best()

    def _finish(self) -> RunResult:
        """Save and evaluate what was not yet, tell the plugins, show a sample, sum up.

        Whoever has set the run a limit may kill it now: the checkpoint comes first.
        """
        self._settle_process(whole=True)
        if self._watch is not None:
            self._watch.stepping = False
        self.require_all()
        self.step_log.tell_skipped()
        self.step_log.pause()
        self._require_known_parameters()
        self.saving.save_unjudged()
        # A plugin that asks to stop in what follows ends its own stage, not the others.
        if not self._interrupted():
            if self._in_open_epoch:
                try:
                    self._end_epoch(self.epoch)
                except StopTraining as stop:
                    self.request_stop(stop.reason)
            elif self.scores.get("step") != self.step:
                with suppress(StopTraining):
                    self._evaluate(everything=True, final=True)
        self.saving.save_last()
        self._require_finite_end()
        sample = ""
        self._callbacks.guard(self.model, self.optimizer)
        if not self._interrupted():
            with suppress(StopTraining):
                sample = self.evaluator.sample()
        if self.step == self._first_step:
            sample = sample or self.folder.ended.get("sample", "")
        reason = next(filter(None, self.world.gather(self.stopping.reason)), "")
        exit_code = self._interrupted()
        status = "interrupted" if exit_code else "stopped" if reason else "finished"
        result = RunResult(
            status=status,
            step=self.step,
            epoch=self.epoch,
            tokens=self.tokens,
            figures=self._figures(),
            folder=self.folder.path,
            sample=sample,
            reason=reason,
            exit_code=exit_code,
        )
        write_manifest(self, status, figures=result.figures, sample=sample, reason=reason)
        with suppress(StopTraining):
            self.manager.hook.on_training_end(trainer=self)
        with suppress(StopTraining):
            self.manager.failures.settle()
        # What failed at the end in another process is told too, or ends this one.
        self._enabling.share_quarantines()
        write_manifest(self, status)
        return result

    def _require_finite_end(self) -> None:
        """Raises DivergedError for a run of which nobody should go on with the result."""
        loss = self.scores.get("val_loss", 0.0)
        if self.scores.get("step") == self.step > 0 and not isfinite(loss):
            raise diverged(self, f"the loss on the held-out text is {loss} after step {self.step}")
        in_a_row = self.guard.in_a_row
        if in_a_row > 1 and self.step >= self.total_steps:
            raise void_steps(
                self,
                f"the run ended in {in_a_row} steps in a row that had a loss or gradient that is "
                f"not finite, the last one step {self.step}",
                self.metrics,
            )

    def _interrupted(self) -> int:
        """The exit code that a signal to any of the processes gives the run, or 0 without one."""
        return max(self.world.gather(self.stopping.interrupts.exit_code))

    def _out_of_memory(self, error: BaseException, when: str) -> TrainingError:
        """Let go of what the checkpoint does not need, and say what would fit."""
        traceback.clear_frames(error.__traceback__)  # the activations are there
        world, device = self.world, self.device
        here = 1 if device.type == "cuda" else world.on_this_machine
        available = max(0, available_memory(device) - self._held) // here
        try:
            advice = out_of_memory_advice(
                self.kernel,
                world.size,
                world.sharding,
                available,
                device=device,
                switched_by=self.switching.plugins,
                switching=self.switching.making,
            )
        except Exception as failure:
            advice = f"what would fit cannot be told ({one_line(failure)})"
        return TrainingError(f"out of memory {when}: {advice}")

    def require_all(self) -> None:
        """Raise ProcessLostError where a step was taken in which not all processes took part; waits
        for the device."""
        if self._together is not None:
            self._together.require_all()

    def _take_back_lost_steps(self) -> None:
        """The host may be some steps ahead of the last one in which all processes took part, and
        what came after has changed neither weights nor averages: go back to there.

        Raises TrainingError where a plugin was enabled meanwhile, whose parts are there already.
        """
        first = None if self._together is None else self._together.first_lost()
        if first is None or first > self.step:
            return
        lost, plan = range(first, self.step + 1), self.parts.plan
        self.guard.forget(len(lost))
        for step in lost:
            epoch, index = divmod(step - 1, plan.steps_per_epoch)
            self.tokens -= plan.step_targets(epoch + 1, index)
        self.step = first - 1
        self.epoch = 1 + max(0, self.step - 1) // plan.steps_per_epoch
        self.in_step, self._row_due = True, None  # plugins have seen the steps
        if any(entry["step"] in lost for entry in self.timeline):
            raise TrainingError("plugins were enabled in a step that not all processes have taken")

    def _die(self, error: BaseException) -> None:
        """The run ends by ``error``: keep what can be kept and tell the plugins."""
        if isinstance(error, KeyboardInterrupt):
            log.warning("interrupted")
        if isinstance(error, ProcessLostError):
            self.world.liveness.give_up()
        averages = [a for a in (self.ema, *self.averages.values()) if a is not None]
        averaging = not all(average.is_apart for average in averages)
        whole = not (self._updating or averaging or self._strangers())
        if whole and self.step > 0:
            try:
                # No resume takes this step again. Of several processes the others are elsewhere.
                if self._row_due and self.metrics.get("step") != self.step and self.world.size == 1:
                    self.step_log.write(*self._row_due)
            except BaseException as failure:
                log.error("no row of step %d: %s", self.step, one_line(failure))
            try:
                self._take_back_lost_steps()
                if self.step:
                    self.saving.save_in_emergency()
            except BaseException as failure:  # whatever it is, the manifest comes next
                text = one_line(failure)
                log.error("no checkpoint of step %d could be written: %s", self.step, text)
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        write_manifest(self, status, figures=self._figures(), error=text_of(error))
        try:
            self.manager.failures.settle()
            self.manager.hook.on_exception(error=error, trainer=self)
        except BaseException as failure:
            log.error("%s", one_line(failure))
        write_manifest(self, status)

    # Evaluation, figures, checkpoints --------------------------------------------------------

    def _evaluate(self, *, everything: bool, final: bool = False) -> dict[str, float]:
        """Score the held-out text, or a few batches of it, and tell of the result; ``final`` says
        that only the end of the run asks for it."""
        self._settle_process(whole=True)
        self.require_all()
        self.step_log.pause()
        with eval_mode(self.model):
            scores = self._scores(everything=everything, final=final)
        self.step_log.throughput.resume()
        return scores

    def _scores(self, *, everything: bool, final: bool) -> dict[str, float]:
        self.manager.hook.on_evaluation_start(trainer=self)
        self._callbacks.guard(self.model, self.optimizer)
        evaluation = self.evaluator.evaluate(everything=everything)
        scores = {} if evaluation is None else evaluation.scores
        if evaluation is not None:
            if not isfinite(scores["val_loss"]):
                loss = scores["val_loss"]
                log.warning("the loss on the held-out text is %s after step %d", loss, self.step)
            if everything:
                self.scores = {"step": self.step, **scores}
            if self.step > 0:
                self.stopping.judge(evaluation.watched_loss, self.step, final=final)
                self.saving.note_evaluation(
                    evaluation.watched_loss, dict(scores) if everything else {}
                )
            row = {"step": self.step, "epoch": self.epoch, "tokens": self.tokens, **scores}
            self.metrics = {**self.metrics, **scores, "val_step": self.step}
            self.folder.write_metrics(row)
            try:
                self.manager.hook.on_evaluation_end(trainer=self, metrics=dict(scores))
            finally:
                if self.world.is_first:
                    self.manager.hook.on_metrics(metrics=dict(row), step=self.step)
        return scores

    def _figures(self) -> dict[str, float]:
        """Losses come with the step that they are of, which may be before the last one."""
        names = {"step": "val_step"}
        final = {names.get(key, key): value for key, value in self.scores.items()}
        start = {f"{key}_start": value for key, value in self.start_scores.items()}
        train = {}
        if "loss" in self.metrics:
            train = {"loss": self.metrics["loss"], "loss_step": self.metrics["step"]}
        return {**self.step_log.figures(), **train, **start, **final}

    def _save(self) -> None:
        self._require_known_parameters()
        self.step_log.pause()
        self.saving.save()
        self.step_log.throughput.resume()
