"""How the parts of a run are put together: each is given what it needs, and is whole when made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from apt_core.kernel import before_the_run
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.costs import model_cost
from apt_core.monitor import ProgressDisplay
from apt_core.runs.session import Position, Session
from apt_core.schedules import Horizon
from apt_core.torch_state import TorchWatch
from apt_core.training.context import RunContext
from apt_core.training.curriculum.enabling import Enabling
from apt_core.training.curriculum.switching import Switching
from apt_core.training.curriculum.trainable import TrainableSet
from apt_core.training.due import Due
from apt_core.training.evaluating import Evaluator
from apt_core.training.looking import Looking
from apt_core.training.loop import Loop
from apt_core.training.manifest_writer import ManifestWriter
from apt_core.training.opening import Opening
from apt_core.training.restoring import Restoring
from apt_core.training.run import Run
from apt_core.training.saving import Saving
from apt_core.training.snapshots import Snapshots
from apt_core.training.step.callbacks import Callbacks
from apt_core.training.step.clock import StepClock
from apt_core.training.step.log import StepLog
from apt_core.training.step.parameters import ScheduledParameters
from apt_core.training.step.usage import Usage

if TYPE_CHECKING:
    from rich.console import Console


class Assembly:
    """A run whose model is built and whose folder is not open yet: what hooks may use of the
    trainer is there from here on."""

    def __init__(
        self,
        context: RunContext,
        callbacks: Callbacks,
        watch: TorchWatch | None,
        console: Console | None,
    ) -> None:
        kernel, world, parts = context.kernel, context.world, context.parts
        self._context, self.parts, self.trained = context, parts, context.trained
        self._callbacks, self._watch, self._console = callbacks, watch, console
        ends = Horizon.of(kernel.config, parts.plan.steps)
        self.schedule = kernel.schedule.with_horizon(ends)
        self._total_steps = ends.last("step") or 0
        cost = model_cost(kernel).flops_per_token
        self._usage = Usage(parts.device, parts.dtype, world, context.progress, cost)
        self._evaluator = Evaluator(
            kernel, parts, world, self.trained, context.stopping, self.session
        )
        self._switching = Switching(context, self._usage, self._evaluator.fixed_batch)
        self.parameters = ScheduledParameters(self.schedule, context.progress)

    def session(self) -> Session:
        """A session of the run at its present position."""
        kernel, progress = self._context.kernel, self._context.progress
        return Session(
            config=kernel.config,
            manager=kernel.manager,
            registry=kernel.registry,
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
        context, usage, watched = self._context, self._usage, self._evaluator.watched
        config, world, progress = context.config, context.world, context.progress
        found = opening.checkpoint(world, config)
        early = config.data.begin_early
        recorded = world.from_first(opening.recorded) if early else []
        looking = Looking(context, recorded)
        if found is not None:
            with before_the_run(), naming_authors(context.kernel):
                Restoring(context, self.schedule, self._switching, usage, watched, allowed).restore(
                    found
                )
            looking.restore()
        self.parameters.begin(progress.step)
        due = Due(context, self._total_steps)
        resumed = opening.resumes(world) and found is not None
        folder = opening.folder(
            world, config, progress.step, context.events, evaluation=due.evaluates_again()
        )
        snapshots = Snapshots(context, usage, watched)
        saving = Saving(context, folder, snapshots, self._evaluator.ranked_by, resumed=resumed)
        context.kernel.notices += filter(None, [saving.notice])
        manifest = ManifestWriter(context, folder, saving)
        clock = StepClock(self.parts.device)
        record = partial(manifest.write, "running")
        trainable = TrainableSet(context, self.schedule, record)
        loop = Loop(
            context=context,
            total_steps=self._total_steps,
            parameters=self.parameters,
            enabling=Enabling(
                context, self.schedule, self.parameters, self._switching, trainable, record
            ),
            trainable=trainable,
            evaluator=self._evaluator,
            saving=saving,
            due=due,
            folder=folder,
            callbacks=self._callbacks,
            watch=self._watch,
            clock=clock,
            usage=usage,
            step_log=StepLog(
                context, folder, self.parameters, self.schedule.annealed, usage, clock
            ),
            display=ProgressDisplay(
                self._console,
                context.stopping.last_step(self._total_steps),
                config.max_epochs,
                config.training.max_seconds,
            ),
            looking=looking,
        )
        return Run(
            loop,
            self._switching,
            manifest,
            held=held,
            found=found,
            taken_back=opening.taken_back,
        )
