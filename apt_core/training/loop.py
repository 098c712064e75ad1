"""The training loop: epochs, steps, and the evaluations and checkpoints between them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from math import isfinite

import torch
from torch import Tensor

from apt_core.device import autocast
from apt_core.errors import TrainingError
from apt_core.evaluation.quick_eval import told_shares
from apt_core.hookspecs import MICRO_BATCH_HOOKS, hooks_where
from apt_core.log import get_logger
from apt_core.metric_names import CROSS_ENTROPY
from apt_core.modeling.blame import usable_factor
from apt_core.modeling.compilation import readers_of_outputs
from apt_core.modeling.modes import eval_mode
from apt_core.modeling.seeds import ModelSeeds
from apt_core.monitor import ProgressDisplay
from apt_core.optim.build import learning_rates
from apt_core.plain_values import MAX_FACTOR
from apt_core.runs.folder import RunFolder
from apt_core.torch_state import TorchWatch
from apt_core.training.context import RunContext
from apt_core.training.curriculum.enabling import Enabling
from apt_core.training.curriculum.trainable import TrainableSet
from apt_core.training.due import Due
from apt_core.training.evaluating import Evaluator
from apt_core.training.looking import Looking
from apt_core.training.saving import Saving
from apt_core.training.step.callbacks import Callbacks
from apt_core.training.step.clock import StepClock
from apt_core.training.step.gradients import name_bad_gradients
from apt_core.training.step.log import StepLog
from apt_core.training.step.loss import loss_terms, without_gradients
from apt_core.training.step.parameters import ScheduledParameters
from apt_core.training.step.usage import Usage

log = get_logger("apt.training")

KEEP_MODES = hooks_where(lambda policy: policy.in_step and not policy.sets_modes)
"""Hooks called in every step that must not change whether modules are in training mode."""


@dataclass
class Loop:
    """Trains from the position in ``progress`` to the end of the run."""

    _: KW_ONLY
    context: RunContext
    total_steps: int
    parameters: ScheduledParameters
    enabling: Enabling
    trainable: TrainableSet
    evaluator: Evaluator
    saving: Saving
    due: Due
    folder: RunFolder
    callbacks: Callbacks
    watch: TorchWatch | None
    clock: StepClock
    usage: Usage
    step_log: StepLog
    display: ProgressDisplay
    looking: Looking

    in_step: bool = field(default=False, init=False)
    """Whether some of the hooks of the present step were called, but not all."""
    updating: bool = field(default=False, init=False)
    """Whether the optimizer is changing the weights, which then belong to no step."""
    step_void: bool | Tensor = field(default=False, init=False)
    """Whether the newest step was not finite and so changed nothing; 0-d where it is known on the
    device only."""
    terms: dict[str, Tensor] = field(default_factory=dict, init=False)
    """The loss terms of the present step."""
    row_due: tuple[Tensor, Tensor, dict[str, float], dict[str, Tensor]] | None = field(
        default=None, init=False
    )
    """The values for the newest step's row of metrics, if a row is due."""

    def __post_init__(self) -> None:
        context = self.context
        self.kernel, self.world, self.parts = context.kernel, context.world, context.parts
        self.progress, self.trained = context.progress, context.trained
        self.stopping, self.trainer = context.stopping, context.trainer
        self.config, self.manager = context.config, context.manager

    def run(self) -> None:
        """Take the remaining steps. Raises any error that ends the run."""
        training, world, progress = self.config.training, self.world, self.progress
        plan, hook, device, clock = (
            self.parts.plan,
            self.manager.hook,
            self.parts.device,
            self.clock,
        )
        watch, trained, trainer = self.watch, self.trained, self.trainer
        dtype, due = self.parts.dtype, self.due
        seeds = ModelSeeds(device, training.seed, world.rank)
        first_epoch, first_index = divmod(progress.step, plan.steps_per_epoch)
        self.usage.start_training()
        if due.ends():
            return
        if due.evaluates_again():
            if due.ends_epoch():
                self.end_epoch(first_epoch)
            else:
                self.evaluate(everything=False)
                if self._save_due():
                    self._save()

        zero = torch.zeros((), device=device)
        scaled = -1  # the number of targets that ``scale`` is for
        torch.set_grad_enabled(True)
        if watch is not None:
            self.manager.put_back_of_background()
            watch.start_steps(trained.model)
        for epoch in range(first_epoch + 1, self.config.max_epochs + 1):
            if due.ends():
                return
            progress.epoch = epoch
            self.parameters.begin(progress.step + 1)
            self.in_step = True
            self.enabling.enable_due()
            self.enabling.log_parameters(f"epoch {epoch}")
            hook.on_epoch_start(epoch=epoch, trainer=trainer)

            for index in range(first_index, plan.steps_per_epoch):
                if due.ends():
                    return
                step = progress.step + 1
                if step > plan.order.known_steps and not self.looking.look(step):
                    return
                logged = step % training.log_every_steps == 0 or step == self.total_steps
                self.manager.step = step
                self.parameters.begin(step)
                self.in_step = True
                self.manager.plans.timing = logged or clock.every_step
                if self.enabling.enable_due():
                    self.enabling.log_parameters(f"step {step}")
                clock.start(sampling=logged)
                made, targets, tokens = plan.step(epoch, index)
                batches = [batch.to(device) for batch in made]
                clock.lap("data")
                if watch is not None:
                    watch.begin_step()
                    if not watch.modes_unchanged():
                        self.manager.failures.report_leftovers(watch.put_back(), KEEP_MODES)
                # Calling a hook without implementations takes ten times as long as this check.
                if hook.on_step_start.get_hookimpls():
                    hook.on_step_start(step=step, batch=list(batches), trainer=trainer)
                self.settle_process()
                self.trainable.observe()
                clock.lap("hooks")

                self.callbacks.guard(trained.model, trained.optimizer)
                together = trained.gradient_sum
                if together is not None:
                    together.begin()
                if targets != scaled:
                    # DDP and FSDP average the gradients over the processes; we need their sum.
                    mean = world.size / max(targets, 1)  # a step of prompts alone has no target
                    scale, scaled = torch.full((), mean, device=device), targets
                total = entropy = zero
                terms = self.terms = {}
                adding = bool(hook.apt_loss_terms.get_hookimpls())
                outputs = adding and bool(readers_of_outputs(hook))
                trained.gradients.clear()
                for micro, batch in enumerate(batches):
                    seeds.seed(step, micro)
                    last = micro + 1 == len(batches)
                    if together is not None:
                        together.expect(last=last)
                    with trained.casts.used(dtype), autocast(device, dtype):
                        summed, output = trained.forward(batch, outputs=outputs, again=seeds.again)
                    if last:
                        trained.casts.forget()  # the backward frees the cast weights from here on
                    if logged:
                        entropy = entropy + summed.detach()
                    for name, term in loss_terms(self.context, batch, output) if adding else ():
                        if not batch.num_targets:  # all padding: a term that is a mean would be NaN
                            summed = summed + without_gradients(term)
                            continue
                        term = batch.num_targets * term
                        summed = summed + term
                        terms[name] = terms.get(name, zero) + term.detach()
                    if adding and watch is not None and not watch.all_unchanged():
                        self.manager.failures.report_leftovers(watch.put_back(), MICRO_BATCH_HOOKS)
                    if not summed.requires_grad:
                        raise TrainingError(f"step {step}: every parameter of the model is frozen")
                    summed.backward(scale)
                    total = total + summed.detach() if micro else summed.detach()
                    del output, summed  # frees the logits before the next forward allocates its own
                loss = total * scale
                self.terms = {}  # later failures are not caused by loss terms
                if together is not None:
                    loss, stopping = together.finish(step, loss, self.stopping.wanted)
                    if logged:
                        together.require_all()
                    if logged or device.type == "cpu":
                        self.stopping.agreed = bool(stopping.item())
                clock.lap("forward_backward")
                if hook.on_backward_end.get_hookimpls():
                    hook.on_backward_end(step=step, trainer=trainer)
                clock.lap("hooks")

                grad_norm = trained.gradients.clip()
                factor = self.parts.lr_schedule.factor(
                    step, self.total_steps, training.warmup_steps, training.min_lr_ratio
                )
                if not (type(factor) is float and 0.0 <= factor <= MAX_FACTOR):
                    factor = usable_factor(self.kernel, factor)
                for group in trained.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                if self.config.debug.check_gradients:
                    name_bad_gradients(trained.model, grad_norm, step)
                self.updating = True
                self.row_due = None
                if logged:
                    shares = {CROSS_ENTROPY: entropy * scale}
                    shares |= {name: term * scale for name, term in terms.items()}
                    rates = learning_rates(trained.optimizer, training.learning_rate, factor)
                    self.row_due = loss, grad_norm, rates, shares
                void = self.step_void = trained.guard.step(step, loss, grad_norm)
                progress.step, progress.tokens = step, progress.tokens + tokens
                trained.update_averages(step, void)
                self.updating = False
                clock.lap("optimizer")
                self.usage.throughput.add(tokens)
                if hook.on_step_end.get_hookimpls():
                    hook.on_step_end(step=step, loss=loss, trainer=trainer)
                self.in_step = False
                clock.lap("hooks")

                self.stopping.check_limits(step)
                if self.row_due is not None:
                    row = self.step_log.write(*self.row_due)
                    self.display.update(step, epoch, row)
                    self.manager.failures.count_log_errors()
                    self.manager.settle_background()
                    self.enabling.share_quarantines()
                    self.saving.poll()
                if due.ends():
                    return  # what else is due may take long: save first
                ends_epoch = index + 1 == plan.steps_per_epoch
                if due.evaluates() and not ends_epoch:
                    self.evaluate(everything=False)
                if not ends_epoch and self._save_due():
                    self._save()

            first_index = 0
            self.end_epoch(epoch)

    def settle_process(self, *, whole: bool = False) -> None:
        """Put back process state that hooks left changed: what is checked once a step, or, before
        an evaluation or a sample, the ``whole`` of it."""
        self.manager.put_back_of_background()
        watch = self.watch
        if watch is None or not watch.stepping or (not whole and watch.all_unchanged()):
            return
        if left := watch.put_back():
            self.manager.failures.report_leftovers(left)

    def end_epoch(self, epoch: int) -> None:
        """Evaluate, call on_epoch_end, save. If the run is stopped during the evaluation, the epoch
        stays open and a resume ends it."""
        scores = self.evaluate(everything=True)
        if not scores:
            return
        training, metrics, step = self.config.training, self.progress.metrics, self.progress.step
        trained = ""
        if CROSS_ENTROPY in metrics:  # else the run has logged no step yet
            of_step = "" if metrics["step"] == step else f" (step {metrics['step']})"
            trained = f"loss={metrics[CROSS_ENTROPY]:.3f}{of_step}  "
        self.manager.events.record(
            "epoch_ended",
            f"Epoch {epoch}/{self.config.max_epochs}: {trained}held out: "
            f"loss={scores['val_loss']:.3f} ppl={scores['val_ppl']:.2f} "
            f"bits/byte={scores['val_bpb']:.3f}"
            + "".join(f", {t}" for t in told_shares(scores))
            + f" on {scores['val_tokens']:,} tokens",
            step=step,
            log=log,
            epoch=epoch,
        )
        self.progress.ended_epochs = epoch
        self.manager.hook.on_epoch_end(epoch=epoch, trainer=self.trainer)
        if (training.save_freq and epoch % training.save_freq == 0) or self._save_due():
            self._save()

    def evaluate(self, *, everything: bool, final: bool = False) -> dict[str, float]:
        """Score the held-out text, or a few batches of it, and call the hooks with the scores.
        ``final`` says that the evaluation is made only because the run ends. Empty when the run
        was stopped meanwhile."""
        self.settle_process(whole=True)
        self.trained.require_all_processes()
        self.usage.pause()
        with eval_mode(self.trained.model):
            scores = self._scores(everything=everything, final=final)
        self.usage.throughput.resume()
        return scores

    def _scores(self, *, everything: bool, final: bool) -> dict[str, float]:
        progress, hook = self.progress, self.manager.hook
        hook.on_evaluation_start(trainer=self.trainer)
        self.callbacks.guard(self.trained.model, self.trained.optimizer)
        evaluation = self.evaluator.evaluate(everything=everything)
        if evaluation is None:
            return {}
        scores, loss = evaluation.scores, evaluation.scores["val_loss"]
        if not isfinite(loss):
            log.warning("the loss on the held-out text is %s after step %d", loss, progress.step)
        if everything:
            progress.scores = {"step": progress.step, **scores}
        if progress.step > 0:
            self.stopping.judge(evaluation.watched_loss, progress.step, final=final)
            self.saving.note_evaluation(
                evaluation.watched_loss, dict(scores) if everything else {}, evaluation.judged
            )
        position = {"step": progress.step, "epoch": progress.epoch, "tokens": progress.tokens}
        row = {**position, **scores, **evaluation.times}
        progress.metrics = {**progress.metrics, **scores, "val_step": progress.step}
        self.folder.write_metrics(row)
        try:
            hook.on_evaluation_end(trainer=self.trainer, metrics=dict(scores))
        finally:
            if self.world.is_first:
                hook.on_metrics(metrics=dict(row), step=progress.step)
        return scores

    def _save_due(self) -> bool:
        return self.due.saves() or self.saving.is_best()

    def _save(self) -> None:
        self.trained.require_known_parameters()
        self.usage.pause()
        self.saving.save()
        self.usage.throughput.resume()

    def undo_lost_steps(self) -> None:
        """Set the position back to the last step in which all processes took part. The host may be
        some steps ahead of it; those steps changed neither weights nor averages.

        Raises TrainingError if a plugin was enabled, or another stage of the trainable set began,
        in one of these steps.
        """
        together, progress, plan = self.trained.gradient_sum, self.progress, self.parts.plan
        first = None if together is None else together.first_lost()
        if first is None or first > progress.step:
            return
        lost = range(first, progress.step + 1)
        self.trained.guard.forget(len(lost))
        for step in lost:
            progress.tokens -= plan.steps.step_tokens((step - 1) % plan.steps_per_epoch)
        self.manager.events.record(
            "rewound",
            f"steps {first} to {progress.step}, in which not all processes took part, are taken "
            "back",
            step=first - 1,
            log=log,
            from_step=progress.step,
        )
        progress.step = first - 1
        progress.epoch = 1 + max(0, progress.step - 1) // plan.steps_per_epoch
        self.in_step, self.row_due = True, None  # plugins have seen the steps
        begun = [*(e.step for e in progress.timeline), *(e.step for e in progress.trainable)]
        if any(step in lost for step in begun):
            raise TrainingError(
                "plugins were enabled, or parameters thawed, in a step that not all processes have "
                "taken"
            )
