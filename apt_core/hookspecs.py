"""Every hook of APT, grouped by the life of a run.

``apt_*`` hooks ask for something, ``on_*`` hooks tell. An implementation takes only the
parameters that it wants. Unless a docstring says otherwise: a hook fires on every rank (in every
process of the run) at the same position, on the main thread; what an ``on_*`` implementation
returns is ignored; what it raises is caught, counted and reported, and the run goes on (a plugin
is quarantined at its third failure; the profile's
``on_failure: required`` and ``--strict`` make it fatal); so is a result that is not what the hook
accepts. One that takes longer than ``training.hook_timeout`` is told of with its stack while it
does, and is quarantined once it returns, unless its hook may last; it cannot be interrupted. All
policy of a hook (who judges input, what is part of the training, what is fatal among processes,
what is accepted as a result) stands on its ``@hookspec``. Where that
says so, an implementation may be marked ``background=True``: a run then calls it on a thread beside
the loop, where it costs no step. Trainer hooks never fire per layer or per
token. StopTraining ends the run, in a run of several processes once the step is done in all of
them. ``step`` counts optimizer steps of the whole run from 1, epochs count from 1.

Every example below is a complete plugin module; the tests run each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt_core import hook_returns as returns
from apt_core.markers import CALLBACK, PROJECT, HookPolicy, Stage, hookspec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from apt_core.config import Config
    from apt_core.types import (
        FallbackEvent,
        GenerationRequest,
        GenerationResult,
        Message,
        ModelOutput,
        PluginCosts,
        PluginFailure,
        ProviderSource,
        ProviderSpec,
        RewrittenPrompt,
        RunFacts,
        SectionSpec,
        TrainableStage,
    )

# Loading -------------------------------------------------------------------------------------


@hookspec(
    stage=Stage.LOADING,
    returns=returns.provider_specs,
    dormant=True,
    alone=True,
    failure_limit=1,
    changes_weights=True,
    may_last=True,
)
def apt_register_providers() -> Sequence[ProviderSpec]:
    """Offer implementations of attention, feed-forward, tokenizer, …

    When: the plugin is loaded, before the profile is checked; also for listings.
    Returns: a list of :class:`~apt_core.ProviderSpec`, or yields them. Give the factory as
    ``"module:attribute"`` so that listings need not import torch.
    Raising: the plugin is broken; a run that asked for it ends with exit code 2.

    Example::

        from apt_core import ProviderSpec, hookimpl

        @hookimpl
        def apt_register_providers():
            return [
                ProviderSpec(
                    kind="norm",
                    name="my_rmsnorm",
                    factory="apt_core.modeling.layers.norm:RMSNormProvider",
                    version="1.0.0",
                    summary="RMSNorm under another name",
                )
            ]
    """


@hookspec(
    stage=Stage.LOADING,
    returns=returns.section_specs,
    dormant=True,
    alone=True,
    failure_limit=1,
    may_last=True,
)
def apt_register_config() -> Sequence[SectionSpec]:
    """Declare the profile sections that the plugin owns and the schedule parameters it reads.

    When: the plugin is loaded, before the profile is checked.
    Returns: a list of :class:`~apt_core.SectionSpec`. The section is validated by the plugin's
    pydantic model, and is read as ``config.section("my_plugin")``.
    Raising: the plugin is broken; a run that asked for it ends with exit code 2.

    Example::

        from pydantic import BaseModel

        from apt_core import SectionSpec, hookimpl

        class Settings(BaseModel):
            strength: float = 0.1

        @hookimpl
        def apt_register_config():
            return [SectionSpec("my_plugin", Settings, schedule_params=("my_strength",))]
    """


@hookspec(
    stage=Stage.BUILDING,
    dormant=True,
    alone=True,
    failure_limit=1,
    judges_input=True,
    may_last=True,
)
def apt_configure(config: Config) -> None:
    """Look at the whole profile before anything is built.

    When: once, after the profile is merged and validated. The profile is frozen.
    Raising: :class:`~apt_core.ConfigError` is bad input (exit code 2), reported with the plugin's
    name; anything else is a failure of the plugin.

    Example::

        from apt_core import ConfigError, hookimpl

        @hookimpl
        def apt_configure(config):
            if config.model.num_layers > 1000:
                raise ConfigError("model.num_layers: this plugin draws at most 1000 layers")
    """


# Building ------------------------------------------------------------------------------------


@hookspec(
    stage=Stage.BUILDING,
    returns=returns.provider,
    firstresult=True,
    dormant=True,
    failure_limit=1,
    changes_weights=True,
    may_last=True,
)
def apt_build_provider(spec: ProviderSpec, config: Any) -> Any:
    """Build a provider in place of its own factory.

    When: the registry builds a provider, once per (kind, name, config).
    Returns: the provider, or None to leave it to the next plugin and in the end to
    ``spec.factory(config)``. The first result wins.
    Raising: the plugin is quarantined, the next one is asked.
    Ranks: every one asks, and must get the same.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_build_provider(spec, config):
            if spec.key == "norm:rmsnorm":
                from apt_core.modeling.layers.norm import RMSNormProvider

                return RMSNormProvider(config)
    """


@hookspec(
    stage=Stage.BUILDING,
    returns=returns.parameter_groups,
    dormant=True,
    failure_limit=1,
    changes_weights=True,
    may_last=True,
)
def apt_param_groups(model: nn.Module) -> Sequence[Mapping[str, Any]]:
    """Choose optimizer settings for some of the parameters.

    When: the optimizer is built or rebuilt.
    Returns: a list of parameter groups, each ``{"params": [...], ...}`` with any of ``lr_scale``
    (a factor on the scheduled learning rate) and ``weight_decay``, both finite, from 0 to 10,000;
    the rate times the decay is at most 1. A parameter goes to the first group that names it; the
    rest get the profile's settings.
    Raising: the plugin is quarantined, its groups are not used.
    Ranks: every one asks, and must get the same. Under FSDP2 the parameters are sharded.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_param_groups(model):
            norms = [p for name, p in model.named_parameters() if "norm" in name]
            return [{"params": norms, "weight_decay": 0.0}]
    """


@hookspec(
    stage=Stage.BUILDING,
    returns=returns.anything,
    dormant=True,
    alone=True,
    failure_limit=1,
    judges_input=True,
    changes_weights=True,
    may_last=True,
    permanent=True,
)
def apt_transform_model(
    model: nn.Module, config: Config, registry: ProviderSource, trains: bool
) -> Any:
    """Change the model's structure in mid-run.

    When: the plugin becomes enabled, for that plugin alone; at the start of the run as a rehearsal,
    so that what is wrong is told then; and once more when a checkpoint of after the switch is
    loaded. It must give the same structure every time.
    ``model`` is the present structure on the meta device, built for this call: change it in place,
    or build another. ``config`` is the profile with the sizes that ``model`` has. ``registry`` has
    the providers (``registry.get("router", name)``). ``trains`` is False where the model is opened
    to be used, by evaluation, generation or an export.
    Returns: a :class:`~apt_core.modeling.ModelTransform`, or None to leave the model as it is.
    The kernel builds the new structure, carries weights, optimizer state and averages over,
    compares the loss of a fixed batch before and after, and only then lets the run go on with it.
    Raising: :class:`~apt_core.ConfigError` is bad input (exit code 2); after anything else, or
    where the loss changes by more than the transform's tolerance, the plugin is quarantined, and
    the run goes on with the model that it has, in all processes.
    Ranks: every one asks, and must get the same.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_transform_model(model):
            import torch
            from torch import nn

            from apt_core.modeling import Carried, ModelTransform

            class Shifted(nn.Module):
                def __init__(self, layer, width):
                    super().__init__()
                    self.layer, self.shift = layer, nn.Parameter(torch.empty(width))

                def init_parameter(self, name, tensor, generator, *, num_layers):
                    if name == "shift":
                        tensor.zero_()  # so that no output changes
                    return name == "shift"

                def forward(self, x):
                    return self.layer(x) + self.shift

            origins = {}
            for index, block in enumerate(model.blocks):
                for name, _ in block.ffn.named_parameters():
                    path = f"blocks.{index}.ffn"
                    origins[f"{path}.layer.{name}"] = Carried(f"{path}.{name}")
                block.ffn = Shifted(block.ffn, model.d_model)
            return ModelTransform(model, origins)
    """


@hookspec(
    stage=Stage.BUILDING,
    returns=returns.trainable_stages,
    dormant=True,
    alone=True,
    failure_limit=1,
    judges_input=True,
    changes_weights=True,
    may_last=True,
)
def apt_trainable(config: Config) -> Sequence[TrainableStage]:
    """Say which parameters are frozen, and from when on.

    When: the profile is checked, a run is planned or begins. It must give the same every time.
    Returns: a list of :class:`~apt_core.TrainableStage`, in the order of the run. A stage acts once
    it is reached and the plugin is enabled, before ``on_step_start``. What is frozen is not moved,
    and has no gradient and no state in the optimizer; what is thawed learns from then on with a new
    state. The run is refused if a pattern chooses no parameter, or a stage changes nothing.
    Raising: :class:`~apt_core.ConfigError` is bad input (exit code 2); after anything else the
    plugin is quarantined, and freezes nothing.
    Ranks: every one asks, and must get the same.

    Example::

        from apt_core import TrainableStage, hookimpl

        @hookimpl
        def apt_trainable():
            return [
                TrainableStage(freeze=["blocks.0"]),
                TrainableStage(thaw=["blocks.0"], at=2),
            ]
    """


@hookspec(
    stage=Stage.BUILDING,
    returns=returns.costs,
    dormant=True,
    alone=True,
    failure_limit=1,
    may_last=True,
)
def apt_costs(config: Config) -> PluginCosts:
    """Say what the plugin takes of memory and arithmetic while it is enabled.

    When: a run is planned (``apt-train --dry-run``), and when it has run out of memory.
    Returns: a :class:`~apt_core.PluginCosts`, or None for nothing that is worth telling.
    Raising: the plugin is quarantined.

    Example::

        from apt_core import PluginCosts, hookimpl

        @hookimpl
        def apt_costs(config):
            # A teacher, whose predictions it wants for every micro-batch.
            return PluginCosts(averages=1, forwards=1)
    """


# Training ------------------------------------------------------------------------------------


@hookspec(stage=Stage.RUN, sets_modes=True, may_last=True, background=("plugin",))
def on_plugin_enabled(plugin: str, trainer: Any) -> None:
    """A plugin has become enabled, at load or at its schedule's moment, before ``on_epoch_start``.

    ``plugin`` is its name. Every enabled plugin is told, the one concerned included. After a
    resume it fires again for each plugin that is enabled at that position.

    Example::

        from apt_core import hookimpl

        class Plugin:
            def __init__(self):
                self.enabled = []

            @hookimpl
            def on_plugin_enabled(self, plugin):
                self.enabled.append(plugin)
    """


@hookspec(stage=Stage.RUN, may_last=True, background=("step", "from_step", "run"), copies=("run",))
def on_resume(step: int, from_step: int, run: RunFacts) -> None:
    """The run goes on from an earlier part of it, or from a checkpoint of another run.

    When: once, before ``on_training_start``; the state of the plugin is loaded.
    ``step`` is that of the checkpoint; 0 where the run begins anew in its folder, because it was
    killed before the first one. ``from_step`` is the last step of which the earlier part had left a
    row or a checkpoint: what was reported of the steps after ``step`` up to it is taken back, and
    these steps are taken again. It equals ``step`` where nothing is. In a folder other than the
    checkpoint's, ``run.folder`` is new and has no earlier rows.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_resume(step, from_step):
            if from_step > step:
                print(f"steps {step + 1} to {from_step} are taken again")
    """


@hookspec(stage=Stage.RUN, sets_modes=True, may_last=True, background=("run",), copies=("run",))
def on_training_start(trainer: Any, run: RunFacts) -> None:
    """Model, optimizer and data are ready; a resumed state is loaded; no step was taken yet.

    ``run`` is what those need that only report: the folder, the settings, this process.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_training_start(trainer):
            size = sum(p.numel() for p in trainer.model.parameters())
            print(f"{size} parameters on {trainer.device}")
    """


@hookspec(stage=Stage.RUN, sets_modes=True, replayed=True)
def on_epoch_start(epoch: int, trainer: Any) -> None:
    """An epoch begins. After a resume in mid-epoch it fires for the rest of that epoch.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_epoch_start(epoch, trainer):
            print(f"epoch {epoch} of {trainer.config.training.max_epochs}")
    """


@hookspec(stage=Stage.STEP, copies=("batch",), sets_modes=True, replayed=True)
def on_step_start(step: int, batch: Sequence[Any], trainer: Any) -> None:
    """An optimizer step begins, before its first forward.

    ``batch`` is a list of the step's micro-batches on this rank, each with ``input_ids`` [B, T] and
    ``targets`` [B, T] (-100 where nothing is predicted). Each implementation has a list of its own.
    ``positions`` and ``document_ids`` [B, T] are None for plain windows. Call a model by
    ``trainer.forward(batch[i])``, or any other by ``apt_core.modeling.forward_batch``: layers do
    not know of padding and documents where they are given the ids alone.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_step_start(step, batch):
            assert batch[0].input_ids.ndim == 2
    """


@hookspec(
    stage=Stage.MICRO_BATCH,
    returns=returns.loss_terms,
    failure_limit=1,
    changes_weights=True,
    fatal_among_processes=True,
    replayed=True,
)
def apt_loss_terms(trainer: Any, batch: Any, output: ModelOutput) -> Mapping[str, Tensor]:
    """Add terms to the loss.

    When: after the forward of each micro-batch, inside autograd.
    Returns: ``{name: 0-d tensor}``, each a mean over the micro-batch in nats, already multiplied
    by its coefficient. A term is weighted like the cross-entropy, by the micro-batch's share of
    the step's target tokens, and logged as ``loss/<plugin>.<name>``.
    Raising, or returning anything else: the plugin is quarantined and the step goes on without it;
    in a run of several processes it is fatal, since they would no longer train on the same loss.
    Ranks: every one adds its terms for its own micro-batches; they all count, but for those of a
    micro-batch that is all padding (``batch.num_targets`` is 0), which some ranks get in the last
    step of an epoch. A parameter of which a rank has no gradient counts as zero there.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_loss_terms(output):
            return {"z": 1e-4 * output.logits.logsumexp(-1).square().mean()}
    """


@hookspec(stage=Stage.STEP, edits_gradients=True, replayed=True)
def on_backward_end(step: int, trainer: Any) -> None:
    """The gradients of the step are complete, before the finite check and clipping.

    Ranks: they are those of the whole step; under FSDP2 each rank holds its shards of them.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_backward_end(step, trainer):
            assert any(p.grad is not None for p in trainer.model.parameters())
    """


@hookspec(stage=Stage.STEP, replayed=True)
def on_step_end(step: int, loss: Tensor, trainer: Any) -> None:
    """The optimizer has stepped.

    ``loss`` is the step's total loss over all ranks in nats per target token, a 0-d device tensor:
    reading it (``.item()``) waits for the device, so read it seldom.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_step_end(step, loss):
            if step % 100 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
    """


@hookspec(stage=Stage.RUN, returns=returns.metrics)
def apt_metrics(trainer: Any) -> Mapping[str, float]:
    """Report numbers of your own.

    When: each log interval. Returns: ``{name: number}``; they are written to ``metrics.jsonl``
    and passed to ``on_metrics`` as ``<plugin>/<name>``; of a plugin that is called ``loss``,
    ``memory``, ``plugin``, ``schedule``, ``task`` or ``time`` as metrics of the core are, or has a
    slash in its name, as ``plugin/<plugin>/<name>``.
    Ranks: every one asks; what the first says is written.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_metrics(trainer):
            return {"tokens_seen_millions": trainer.tokens / 1e6}
    """


@hookspec(stage=Stage.RUN, copies=("metrics",), background=("metrics", "step"))
def on_metrics(metrics: Mapping[str, float], step: int) -> None:
    """A row of metrics was written: what loggers implement. On the first rank only.

    Training rows have ``epoch tokens loss lr grad_norm tokens_per_s mfu memory_mb``, the parts of
    the loss (``loss/cross_entropy``, and ``loss/<plugin>.<name>`` of each term) and, in
    milliseconds, where the time of a step went (``time/…``); evaluation rows ``val_loss val_ppl
    val_bpb val_tokens``, and ``task/<task>/<metric>`` of the profile's tasks. ``val_loss`` compares
    with ``loss/cross_entropy``.

    Example::

        from apt_core import hookimpl

        class Plugin:
            def __init__(self):
                self.rows = []

            @hookimpl
            def on_metrics(self, metrics, step):
                self.rows.append((step, dict(metrics)))
    """


@hookspec(stage=Stage.RUN)
def on_evaluation_start(trainer: Any) -> None:
    """The held-out text is about to be scored; the model is in eval mode.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_evaluation_start(trainer):
            assert not trainer.model.training
    """


@hookspec(stage=Stage.RUN, copies=("metrics",), may_last=True, background=("metrics",))
def on_evaluation_end(trainer: Any, metrics: Mapping[str, float]) -> None:
    """The held-out text was scored: ``val_loss`` (nats per token), ``val_ppl``, ``val_bpb``, and on
    how many targets (``val_tokens``); and the profile's tasks: ``task/<task>/<metric>``.

    Ranks: every one, with the same figures; ``on_metrics`` has them on the first rank only.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_evaluation_end(metrics):
            print(f"{metrics['val_bpb']:.3f} bits per byte")
    """


@hookspec(stage=Stage.RUN, may_last=True, background=("epoch",))
def on_epoch_end(epoch: int, trainer: Any) -> None:
    """An epoch is over and evaluated; the checkpoint, where the profile asks for one, comes next.

    What a plugin changes in here is in that checkpoint. An epoch whose evaluation was cut short is
    ended by the resume.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_epoch_end(epoch, trainer):
            if epoch == 100:
                trainer.request_stop("a hundred epochs are enough")
    """


@hookspec(stage=Stage.ENDING, may_last=True, background=("run",), copies=("run",))
def on_training_end(trainer: Any, run: RunFacts) -> None:
    """The last step is done and the last checkpoint is on disk.

    ``run`` is what ``on_training_start`` was given; in its folder, the manifest says how the run
    ended. It is the last call of an implementation in the background.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_training_end(trainer):
            print(f"{trainer.tokens} tokens in {trainer.step} steps")
    """


# Checkpoints ---------------------------------------------------------------------------------


@hookspec(stage=Stage.RUN, returns=returns.state, dormant=True, may_last=True)
def apt_state_dict(trainer: Any) -> Mapping[str, Any]:
    """Hand over the plugin's state for the checkpoint.

    When: a checkpoint is written. Returns: a mapping of JSON values and dense tensors, nested (64
    deep, a million values, 10,000 tensors at most; integers of up to 2048 bits). It is copied at
    once. Raising: the checkpoint is written without the plugin's state, and says so.
    Ranks: every one asks; what the first returns is saved, and every rank gets it back.

    Example::

        from apt_core import hookimpl

        class Plugin:
            def __init__(self):
                self.steps = 0

            @hookimpl
            def on_step_end(self):
                self.steps += 1

            @hookimpl
            def apt_state_dict(self):
                return {"steps": self.steps}

            @hookimpl
            def apt_load_state_dict(self, state):
                self.steps = state["steps"]
    """


@hookspec(stage=Stage.RUN, dormant=True, alone=True, sets_modes=True, may_last=True)
def apt_load_state_dict(trainer: Any, state: Mapping[str, Any]) -> None:
    """Take back what ``apt_state_dict`` returned.

    When: a checkpoint is loaded, before ``on_training_start``; only for a plugin whose state is
    in the checkpoint, and with its own state alone. A run that is opened without a trainer
    (``open_run``) calls it too, unless it takes ``trainer``. Raising: a failure of the plugin; the
    run goes on with the plugin's fresh state unless it is ``required`` or ``--strict`` is on.

    Example::

        from apt_core import hookimpl

        class Plugin:
            @hookimpl
            def apt_load_state_dict(self, state):
                self.best = state["best"]

            @hookimpl
            def apt_state_dict(self):
                return {"best": self.best}
    """


@hookspec(stage=Stage.RUN, may_last=True, background=("path",))
def on_checkpoint_saved(path: Path, trainer: Any) -> None:
    """A checkpoint is complete on disk in the folder ``path``. On the first rank only. In the
    background, it may have been deleted for newer ones meanwhile.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_checkpoint_saved(path):
            assert (path / "manifest.json").is_file()
    """


# Trouble -------------------------------------------------------------------------------------


@hookspec(stage=Stage.RUN, background=("event",))
def on_provider_fallback(event: FallbackEvent) -> None:
    """A provider was asked for and another is used; ``event.reason`` says why.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_provider_fallback(event):
            print(f"{event.kind}: {event.asked} -> {event.used}: {event.reason}")
    """


@hookspec(stage=Stage.RUN, background=("failure",))
def on_plugin_failure(failure: PluginFailure) -> None:
    """A plugin has failed. A failure in here is logged and counted, never told again.

    Ranks: the one on which it failed. A quarantine takes effect on the others at the next log
    interval.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_plugin_failure(failure):
            print(f"{failure.plugin} failed in {failure.hook} at {failure.where}")
    """


@hookspec(stage=Stage.RUN, may_last=True, background=("run",), copies=("run",))
def on_exception(error: BaseException, trainer: Any, run: RunFacts) -> None:
    """The run is about to die of ``error``; the last checkpoint was attempted already.

    ``run`` is what ``on_training_start`` was given; in its folder, the manifest has the text of the
    error.

    Ranks: each that dies; those that lose another one get a ProcessLostError. Do not communicate.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_exception(error, trainer):
            print(f"died at step {trainer.step}: {error}")
    """


# Generation ----------------------------------------------------------------------------------
#
# ``session`` is the :class:`~apt_core.runs.Session` that generates: the run's profile, its model,
# tokenizer and schedules, in a run that is going on and of one that was opened.


@hookspec(stage=Stage.ENDING, returns=returns.prompt, chained=True)
def apt_rewrite_prompt(
    request: GenerationRequest, session: Any
) -> str | Sequence[Message] | RewrittenPrompt | None:
    """Rewrite the prompt, for instance with retrieved passages.

    When: a generation starts, by the model of ``session``. ``request.prompt`` is a text, or the
    messages of a conversation. Returns: the new prompt, a text or messages, or a
    :class:`~apt_core.RewrittenPrompt`, which has the sources that the result is to cite, too; None
    to leave it. Each implementation sees what the one before made of it.
    Ranks: the sample at the end of a run is generated on every rank, which must get the same.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_rewrite_prompt(request):
            return request.prompt.rstrip() if isinstance(request.prompt, str) else None
    """


@hookspec(stage=Stage.ENDING)
def on_generation_start(request: GenerationRequest, session: Any) -> None:
    """A generation starts, by the model of ``session``; ``request.prompt`` is final.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_generation_start(request, session):
            print(f"continuing {request.prompt!r} after step {session.position.step}")
    """


@hookspec(stage=Stage.ENDING, returns=returns.functions)
def apt_logits_processors(
    request: GenerationRequest, session: Any
) -> Sequence[Callable[[Tensor, Tensor], Tensor]]:
    """Change the next-token logits.

    When: once per generation request. Returns: a list of callables
    ``f(input_ids [1, T], logits [V]) -> logits [V]``, called for every token in turn with the text
    that the model sees, at most its context; the repetition penalty is applied after them. One that
    raises, or returns NaN, +inf or nothing to choose from, counts as a failure of the plugin and is
    dropped for the rest of the request.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def apt_logits_processors(session):
            newlines = session.tokenizer.encode("\\n")

            def in_one_line(input_ids, logits):
                logits[newlines] = float("-inf")
                return logits

            return [in_one_line]
    """


@hookspec(stage=Stage.ENDING, returns=returns.decoder, firstresult=True)
def apt_decoder(request: GenerationRequest, session: Any) -> Any:
    """Choose the next token in place of sampling.

    When: once per generation request. Returns: an object with
    ``choose(input_ids [1, T], logits [V]) -> int | None``; the first result wins. Where ``choose``
    returns None, this token is left to plain sampling; if it raises, it counts as a failure of the
    plugin and plain sampling takes over for the rest of the request. A ``choose`` with a parameter
    ``branches`` can look ahead: ``branches(logits, length, seeds)`` continues the text in as many
    ways, from copies of its caches (:class:`apt_core.inference.Branches`).

    Example::

        from apt_core import hookimpl

        class Greedy:
            def choose(self, input_ids, logits):
                return int(logits.argmax())

        @hookimpl
        def apt_decoder(request):
            return Greedy() if request.top_k == 1 else None
    """


@hookspec(stage=Stage.ENDING, background=("request", "result"))
def on_generation_end(request: GenerationRequest, result: GenerationResult, session: Any) -> None:
    """A generation is done; ``result.text`` is the continuation.

    Example::

        from apt_core import hookimpl

        @hookimpl
        def on_generation_end(request, result):
            print(f"{len(result.token_ids)} tokens")
    """


# Policy --------------------------------------------------------------------------------------

POLICIES: dict[str, HookPolicy] = {
    name: getattr(specification, f"{PROJECT}_policy")
    for name, specification in list(globals().items())
    if hasattr(specification, f"{PROJECT}_policy")
}
"""The policy of every hook, by its name, in the order in which they stand above."""


def policy_of(hook_name: str) -> HookPolicy:
    """The policy of a hook, or of a callback, whose name is that of no hook."""
    return POLICIES.get(hook_name, CALLBACK)


def hooks_where(applies: Callable[[HookPolicy], bool]) -> tuple[str, ...]:
    """The hooks to whose policy something applies."""
    return tuple(name for name, policy in POLICIES.items() if applies(policy))


STEP_HOOKS = hooks_where(lambda policy: policy.in_step)
"""Hooks that are called within a step, and not by one another: their times add up."""

MICRO_BATCH_HOOKS = hooks_where(lambda policy: policy.stage is Stage.MICRO_BATCH)
"""Those of them that are called between the forward and the backward of each micro-batch."""

REACHES_WEIGHTS = frozenset({"trainer", "model", "batch", "output", "request", "session"})
"""Parameters of hooks that lead to the weights, or to what is trained on."""
