"""How the parts of a run are put together: each is given what it needs, and is whole when made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from apt_core.kernel import Kernel, before_the_run
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.costs import model_cost
from apt_core.monitor import ProgressDisplay
from apt_core.parallel.world import World
from apt_core.runs.run_state import Progress
from apt_core.runs.session import Position, Session
from apt_core.schedules import Horizon
from apt_core.torch_state import TorchWatch
from apt_core.training.curriculum.enabling import Enabling
from apt_core.training.curriculum.switching import Switching
from apt_core.training.due import Due
from apt_core.training.evaluating import Evaluator
from apt_core.training.hooks import TrainerHooks
from apt_core.training.loop import Loop
from apt_core.training.manifest_writer import ManifestWriter
from apt_core.training.opening import Opening
from apt_core.training.prepare import Parts
from apt_core.training.restoring import Restoring
from apt_core.training.run import Run
from apt_core.training.saving import Saving
from apt_core.training.snapshots import Snapshots
from apt_core.training.step.callbacks import Callbacks
from apt_core.training.step.clock import StepClock
from apt_core.training.step.log import StepLog
from apt_core.training.step.parameters import ScheduledParameters
from apt_core.training.step.usage import Usage
from apt_core.training.stopping import Stopping
from apt_core.training.trained_model import TrainedModel

if TYPE_CHECKING:
    from rich.console import Console


class Assembly:
    """A run whose model is built and whose folder is not open yet: what hooks may use of the
    trainer is there from here on."""

    def __init__(
        self,
        kernel: Kernel,
        world: World,
        parts: Parts,
        trained: TrainedModel,
        progress: Progress,
        stopping: Stopping,
        hooks: TrainerHooks,
        callbacks: Callbacks,
        watch: TorchWatch | None,
        console: Console | None,
    ) -> None:
        self._kernel, self._world, self._progress = kernel, world, progress
        self.parts, self.trained = parts, trained
        self._stopping, self._hooks = stopping, hooks
        self._callbacks, self._watch, self._console = callbacks, watch, console
        ends = Horizon.of(kernel.config, parts.plan.steps)
        self.schedule = kernel.schedule.with_horizon(ends)
        self._total_steps = ends.last("step") or 0
        cost = model_cost(kernel).flops_per_token
        self._usage = Usage(parts.device, parts.dtype, world, progress, cost)
        self._evaluator = Evaluator(kernel, parts, world, trained, stopping, self.session)
        self._switching = Switching(
            kernel, parts, world, progress, trained, self._usage, self._evaluator.fixed_batch
        )
        self.parameters = ScheduledParameters(self.schedule, progress)

    def session(self) -> Session:
        """A session of the run at its present position."""
        progress = self._progress
        return Session(
            config=self._kernel.config,
            manager=self._kernel.manager,
            registry=self._kernel.registry,
            schedule=self.schedule,
            position=Position(progress.step, progress.epoch, progress.tokens),
            model=self.trained.model,
            tokenizer=self.parts.tokenizer,
            device=self.parts.device,
            dtype=self.parts.dtype,
        )

    def run(self, opening: Opening, allowed: Sequence[str], held: int) -> Run:
        """Open the run's folder and put together all that the run needs; after a resume, as it was
        at its checkpoint, but for the settings that it was ``allowed`` to change. ``held`` are the
        bytes that the process holds beside the run. Raises ConfigError, CheckpointError."""
        kernel, config, world = self._kernel, self._kernel.config, self._world
        parts, progress, trained = self.parts, self._progress, self.trained
        hooks, stopping, usage = self._hooks, self._stopping, self._usage
        watched = self._evaluator.watched
        found = opening.checkpoint(world, config)
        if found is not None:
            with before_the_run(), naming_authors(kernel):
                Restoring(
                    kernel, parts, world, self.schedule, progress, trained, self._switching,
                    stopping, usage, hooks, watched, allowed,
                ).restore(found)  # fmt: skip
        self.parameters.begin(progress.step)
        due = Due(config, parts.plan, progress, stopping, self._total_steps)
        resumed = opening.resumes(world) and found is not None
        folder = opening.folder(
            world, config, progress.step, kernel.manager.events, evaluation=due.evaluates_again()
        )
        saving = Saving(
            config, folder, world, parts.device, progress, trained,
            Snapshots(
                kernel, parts, world, progress, trained, stopping, usage, hooks, watched
            ),
            hooks, watched, resumed=resumed,
        )  # fmt: skip
        kernel.notices += filter(None, [saving.notice])
        manifest = ManifestWriter(kernel, parts, world, progress, trained, folder, saving)
        clock = StepClock(parts.device)
        loop = Loop(
            hooks=hooks,
            kernel=kernel,
            parts=parts,
            world=world,
            progress=progress,
            trained=trained,
            total_steps=self._total_steps,
            parameters=self.parameters,
            enabling=Enabling(
                self.schedule, self.parameters, progress, trained, self._switching, world, hooks,
                partial(manifest.write, "running"),
            ),
            evaluator=self._evaluator,
            saving=saving,
            stopping=stopping,
            due=due,
            folder=folder,
            callbacks=self._callbacks,
            watch=self._watch,
            clock=clock,
            usage=usage,
            step_log=StepLog(
                config, parts.plan, folder, world, progress, trained, self.parameters,
                self.schedule.annealed, usage, clock, hooks,
            ),
            display=ProgressDisplay(
                self._console,
                stopping.last_step(self._total_steps),
                config.training.max_epochs,
                config.training.max_seconds,
            ),
        )  # fmt: skip
        return Run(loop, self._switching, manifest, held=held, found=found)
