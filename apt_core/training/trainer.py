"""The Trainer: assembles a run from its parts, and is what training hooks receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from logging import DEBUG
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.config import Config
from apt_core.data.batches import Batch
from apt_core.data.loading import RunData
from apt_core.device import (
    as_current_device,
    autocast,
    cpu_threads,
    held_memory,
    is_out_of_memory,
)
from apt_core.errors import (
    PluginError,
)
from apt_core.kernel import Kernel, before_the_run, boot
from apt_core.log import get_logger, keeping_backlog, logging_to, of_one_run
from apt_core.modeling.init import seed_of
from apt_core.modeling.placement import num_threads, settle_device
from apt_core.modeling.seeds import deterministic_kernels, fp32_products
from apt_core.optim.averages import WeightAverage
from apt_core.parallel.world import World
from apt_core.planning.memory import out_of_memory, own_memory
from apt_core.plugin_manager import PluginManager
from apt_core.runs.folder import RunFolder
from apt_core.runs.run_state import Progress
from apt_core.schedules import Schedule
from apt_core.torch_state import TorchWatch
from apt_core.training.assembly import Assembly
from apt_core.training.context import RunContext
from apt_core.training.opening import Opening
from apt_core.training.prepare import Parts, prepare
from apt_core.training.run import Run, RunResult
from apt_core.training.step.callbacks import Callbacks
from apt_core.training.step.forward import compiler_settings
from apt_core.training.stopping import Stopping
from apt_core.training.trained_model import TrainedModel
from apt_core.types import ModelOutput

if TYPE_CHECKING:
    from rich.console import Console

log = get_logger("apt.training")

SURFACE = {
    "config": "the profile",
    "registry": "the providers",
    "schedule": "when plugins are enabled, and the course of parameters",
    "device": "where the run computes",
    "data": "the data: `data.tokenizer`, and `data.sources` with the ids of each",
    "rank": "the rank of this process, from 0",
    "world_size": "the number of the run's processes",
    "output_dir": "the run's folder",
    "step": "optimizer steps taken",
    "epoch": "the present epoch, from 1",
    "tokens": "tokens of the windows that were trained on: all positions, padding too",
    "metrics": "the newest row of a step, with the scores of an evaluation since (of `val_step`)",
    "step_void": "whether the newest step was not finite and so changed nothing: a bool, or a 0-d "
    "tensor of 1.0 or 0.0 where it is known on the device only",
    "model": "the model; a switch replaces it, so do not keep it",
    "optimizer": "the optimizer; a switch replaces it too",
    "averages": "the averages that plugins keep, by plugin",
    "param": "`param(name, default=None)`: the scheduled value of a parameter in the present step",
    "rng": "`rng(plugin)`: a generator of the plugin's own, a function of seed, plugin and step",
    "autocast": "`autocast()`: a context in which a forward is computed in the run's precision",
    "forward": "`forward(batch)`: the model's output in training, as the loop computes it",
    "average": "`average(plugin, decay)`: a moving average of the weights",
    "request_stop": "`request_stop(reason)`: end the run after this step",
}
"""The attributes of the trainer that hooks may use."""


class Trainer:
    """One training run.

    ``config`` is a booted :class:`~apt_core.kernel.Kernel`, a validated profile, or a plain dict
    with a profile's keys; ``manager`` may already hold registered plugins.
    ``output`` is the run's folder (by default ``runs/<profile>/<UTC time>``); ``resume`` continues
    from the newest checkpoint in it, ``resume_from`` from a named one. ``stop_at_step`` ends this
    part of the run at that step without changing the schedules. ``allow_change`` names rates (such
    as ``training.learning_rate``) in which a resume may differ from its checkpoint. ``weights``
    fills the parameters of the new model, on the CPU, in place of their initialisation; every
    process calls it.

    Hooks may use what :data:`SURFACE` lists; everything else may change.
    """

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
        weights: Callable[[nn.Module], None] | None = None,
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
        self.world = World.from_environment(self.config, self.kernel.place)
        self.rank, self.world_size = self.world.rank, self.world.size
        self.progress = Progress()
        self.stopping = Stopping(
            self.config, stop_at_step, alone=self.world_size == 1, report=self._record_stop
        )
        self._console = console
        self._allow_change = tuple(dict.fromkeys(allow_change))
        self._weights = weights
        # Set by fit().
        self._watch: TorchWatch | None = None
        self._assembly: Assembly | None = None
        self._run: Run | None = None
        if self.world_size > 1:
            self.manager.stop_together = self.request_stop
        self._opening = Opening(output, resume, resume_from)

    # What hooks may use ----------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.progress.step

    @property
    def epoch(self) -> int:
        """The present epoch, from 1."""
        return self.progress.epoch

    @property
    def tokens(self) -> int:
        """Target tokens seen."""
        return self.progress.tokens

    @property
    def metrics(self) -> dict[str, Any]:
        """The newest row of a step, with the scores of an evaluation since (of ``val_step``)."""
        return self.progress.metrics

    @property
    def step_void(self) -> bool | Tensor:
        """Whether the newest step was not finite and so changed nothing: a bool, or a 0-d tensor of
        1.0 or 0.0 where it is known on the device only."""
        return self._run is not None and self._run.loop.step_void

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self._made.parts.device

    @property
    def data(self) -> RunData:
        """The data: ``data.tokenizer``, and ``data.sources`` with the ids of each."""
        return self._made.parts.data

    @property
    def schedule(self) -> Schedule:
        """When plugins are enabled, and the course of parameters."""
        return self._made.schedule

    @property
    def model(self) -> nn.Module:
        """The model that is trained. A switch replaces it: do not keep it."""
        return self.trained.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer. A switch replaces it: do not keep it."""
        return self.trained.optimizer

    @property
    def averages(self) -> Mapping[str, WeightAverage]:
        """The moving averages of the weights that plugins keep, by plugin."""
        return self.trained.averages.by_plugin

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        if self._run is None:
            raise RuntimeError("a run has no folder before fit()")
        return self._run.folder.path

    def param(self, name: str, default: Any = None) -> Any:
        """The scheduled value of a parameter in the present step; ``default`` if the profile does
        not schedule it."""
        return self._made.parameters.value(name, default)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which a forward is computed in the precision of the loop's."""
        return autocast(self.device, self.parts.dtype)

    def forward(self, batch: Batch) -> ModelOutput:
        """The model's output for ``batch`` in training, as the loop computes it."""
        return self.trained.forward.output(batch)

    def average(self, plugin: str, decay: float) -> WeightAverage:
        """A moving average of the weights that belongs to the plugin. The first call makes it from
        the present weights; later calls return the same one.

        While the plugin is enabled, the average is updated after every step with its ``decay``,
        which may be set before any step. A switch carries it to the new model, and checkpoints
        hold it. After a resume the first call's ``decay`` replaces the saved one.
        """
        if plugin not in self.manager.records:
            raise ValueError(f"there is no plugin {plugin!r} that an average could belong to")
        return self.trained.average(plugin, decay)

    def rng(self, plugin: str) -> torch.Generator:
        """A CPU generator for this plugin, seeded by (seed, plugin, step, rank)."""
        return torch.Generator().manual_seed(
            seed_of(self.config.training.seed, f"plugin/{plugin}/{self.step}/{self.rank}")
        )

    def request_stop(self, reason: str) -> None:
        """End the run after this step, with a final evaluation and a checkpoint."""
        self.stopping.request(reason)

    def _record_stop(self, reason: str) -> None:
        self.manager.events.record(
            "stopping",
            f"the run is to end: {reason}",
            step=self.progress.step,
            log=log,
            level=DEBUG,
            reason=reason,
        )

    # What fit() has made ---------------------------------------------------------------------

    @property
    def _made(self) -> Assembly:
        if self._assembly is None:
            raise RuntimeError("a run has no model before fit()")
        return self._assembly

    @property
    def parts(self) -> Parts:
        """The text and how it is cut, the tokenizer, and what else stays all through the run."""
        return self._made.parts

    @property
    def trained(self) -> TrainedModel:
        """The model, and all that holds its parameters."""
        return self._made.trained

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder; None before it is open."""
        return None if self._run is None else self._run.folder

    # The run ---------------------------------------------------------------------------------

    def fit(self) -> RunResult:
        """Train to the end of the profile.

        Raises ConfigError for inconsistent input, CheckpointError for an impossible resume, and
        another AptError when the run fails; a checkpoint of the last complete step is written
        first.
        """
        # Plugins may be registered up to here, so the watch is chosen now.
        self.manager.watch = self._watch = TorchWatch() if self.manager.list_name_plugin() else None
        # Around the watch: what runs in other threads rely on too is not put back by it.
        with deterministic_kernels(self.config.training.deterministic):
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
        timeout, plugins = training.hook_timeout, self.manager.list_name_plugin()
        process = f" in process {self.rank}, for which the others wait" if self.rank else ""
        with (
            of_one_run(self.manager.failures.keep_log_error),
            self.manager.hook_deadline(timeout if plugins else 0.0, process),
            self.manager.background_hooks(training.background_queue, timeout),
            self.stopping.interrupts.listening(),
            threads,
            keeping_backlog() as backlog,
        ):
            with before_the_run():
                device = settle_device(self.kernel, self.world)
            with (
                as_current_device(device),
                fp32_products(device, tf32=self.config.hardware.tf32),
                self.world.joined(device, self.config.hardware.backend),
            ):
                parts, trained, held = self._prepare(device)
                compilation = trained.forward.compilation
                callbacks = Callbacks(self.manager, apart=compilation.mode is not None)
                context = RunContext(
                    self.kernel,
                    self.world,
                    parts,
                    self.progress,
                    trained,
                    self.stopping,
                    self,
                )
                self._assembly = Assembly(context, callbacks, self._watch, self._console)
                with (
                    compiler_settings(self.config, compilation),
                    closing(parts.data),
                    closing(parts.plan),
                    closing(callbacks),
                    closing(self._opening),
                ):
                    run = self._run = self._assembly.run(self._opening, self._allow_change, held)
                    if not self.world.is_first:
                        backlog.drop()
                    file = run.folder.log_file if self.world.is_first else None
                    level = self.config.debug.log_level
                    with (
                        closing(run.saving),
                        logging_to(file=file, level=level, backlog=backlog),
                        self.manager.events.kept_with(run.folder.write_event),
                    ):
                        return run.run()

    def _prepare(self, device: torch.device) -> tuple[Parts, TrainedModel, int]:
        """Build the parts of the run and its model; returns also the bytes that the process holds
        beside the run. The TrainedModel alone holds the model, which a switch replaces."""
        held = held_memory(device)
        try:
            with self._watching_providers():
                parts, built = prepare(
                    self.kernel,
                    device,
                    self.world,
                    self.stopping.interrupts.require_none,
                    self._weights,
                    self._opening.kept_tokenizer(self.config),
                )
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, PluginError):
                raise
            raise out_of_memory(
                error, "before the first step", self.kernel, self.world, device, held
            ) from error
        # The memory that the process holds beside the run includes the text, not the model.
        held = held_memory(device) - own_memory(built.model)
        trained = TrainedModel(self.kernel, built, device, self.world, self._watch)
        return parts, trained, held

    @contextmanager
    def _watching_providers(self) -> Iterator[None]:
        """Put back what providers change in the process while the context lasts."""
        watch = self._watch
        before = None if watch is None else watch.before()
        yield
        if watch is not None and (changes := watch.put_back(before)):
            self.manager.failures.report_leftovers(changes, ())
