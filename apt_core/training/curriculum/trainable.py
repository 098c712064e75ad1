"""Freezes and thaws parameters by the stages that plugins declare, and records what is frozen."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from apt_core.log import get_logger
from apt_core.modeling.parameter_names import shortened
from apt_core.modeling.trainable import Change, PlacedStage, listed
from apt_core.runs.run_state import Trainable
from apt_core.schedules import Schedule
from apt_core.training.context import RunContext

log = get_logger("apt.training")


class TrainableSet:
    """Which parameters of the run's model learn.

    A stage acts once, when it is reached and its plugin is active. What it freezes loses its state
    in the optimizer, so that it takes no memory, and learns with a new one if it is thawed again: a
    mean of gradients from before would push it in a direction that is long past. Parameters that
    plugins freeze and thaw by themselves keep their state, as in any loop of torch's, and are
    recorded only. ``record`` is called after a stage, to update the manifest.
    """

    def __init__(self, run: RunContext, schedule: Schedule, record: Callable[[], None]) -> None:
        self._run, self._schedule, self._record = run, schedule, record
        begun = [(each.plugin, each.number) for each in run.progress.trainable]
        self._waiting = [
            each for each in run.parts.trainable if (each.plugin, each.number) not in begun
        ]
        self._model: nn.Module | None = None
        self._parameters: list[nn.Parameter] = []
        self._learning: list[bool] = []
        self._told: set[tuple[bool, ...]] = set()

    def start(self) -> None:
        """Restore what stages have frozen and thawed before a resume."""
        self._run.trained.modes.restore_staged(self._run.trained.model)

    def apply_due(self) -> None:
        """Begin the stages that are due in the next step."""
        if not self._waiting:
            return
        progress, records = self._run.progress, self._run.manager.records
        due = [
            placed
            for placed in self._waiting
            if records[placed.plugin].state == "active"
            and self._schedule.is_reached(
                placed, epoch=progress.epoch, step=progress.step + 1, tokens=progress.tokens
            )
        ]
        for placed in due:
            self._waiting.remove(placed)
            self._begin(placed)
            self._record()

    def log_frozen(self) -> None:
        """Log what is frozen as the run begins to train, but for what a stage has just frozen."""
        model, step = self._run.trained.model, self._run.progress.step
        self._note(model)
        parameters = dict(model.named_parameters())
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        if frozen and (step or not self._run.trained.modes.staged):
            count = sum(sizes[name] for name in frozen)
            log.info(
                "%s of %s parameters are frozen: %s",
                f"{count:,}",
                f"{sum(sizes.values()):,}",
                listed(shortened(frozen, sizes)),
            )

    def observe(self) -> None:
        """Record what plugins have frozen and thawed by themselves before the next step. Of a set
        that has been there before nothing is said: some plugins alternate."""
        learning, before = [p.requires_grad for p in self._parameters], self._learning
        model = self._run.trained.model
        if model is not self._model:
            self._note(model)
        elif learning != before:
            self._learning = learning
            if tuple(learning) in self._told:
                return
            self._told |= {tuple(before), tuple(learning)}
            names = [name for name, _ in self._run.trained.model.named_parameters()]
            known = [*zip(names, before, learning, strict=True)]
            frozen = [name for name, was, learns in known if was and not learns]
            thawed = [name for name, was, learns in known if learns and not was]
            self._tell(Change(frozen, thawed), "")

    def _begin(self, placed: PlacedStage) -> None:
        run, trained = self._run, self._run.trained
        model, progress = trained.model, run.progress
        run.world.reshard(model)
        change = Change.of(placed.stage, model)
        trained.modes.stage(change, model)
        trained.forget_states(change.frozen)
        self._note(model)
        parts = change.parts(model)
        frozen, thawed = (parts.get(what, ((), 0)) for what in ("frozen", "thawed"))
        progress.trainable.append(
            Trainable(
                plugin=placed.plugin,
                number=placed.number,
                epoch=progress.epoch,
                step=progress.step + 1,
                frozen=[*frozen[0]],
                thawed=[*thawed[0]],
                frozen_parameters=frozen[1],
                thawed_parameters=thawed[1],
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            )
        )
        if parts:
            self._tell(change, placed.plugin)
        else:
            key = placed.stage.key or f"stage {placed.number} of {placed.plugin}"
            log.warning("%s changes nothing: the model has become another one", key)

    def _note(self, model: nn.Module) -> None:
        # Kept, since to find the parameters of a model takes longer than to look at them.
        self._model, self._parameters = model, [*model.parameters()]
        self._learning = [parameter.requires_grad for parameter in self._parameters]

    def _tell(self, change: Change, plugin: str) -> None:
        model, step = self._run.trained.model, self._run.progress.step + 1
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for what, (patterns, count) in change.parts(model).items():
            self._run.events.record(
                what,
                f"step {step}: {count:,} parameters are {what}: {listed(patterns)} ({trained:,} of "
                f"{self._run.trained.num_parameters:,} are trained)",
                step=step,
                log=log,
                parts=[*patterns],
                parameters=count,
                trained=trained,
                plugin=plugin,
            )
