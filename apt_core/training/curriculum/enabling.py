"""Enables and disables plugins by the run's schedule."""

from __future__ import annotations

from collections.abc import Callable
from logging import WARNING

from apt_core.log import get_logger
from apt_core.runs.run_state import DISABLED, TimelineEntry
from apt_core.schedules import Schedule
from apt_core.training.context import RunContext
from apt_core.training.curriculum.switching import Switching
from apt_core.training.curriculum.trainable import TrainableSet
from apt_core.training.step.parameters import ScheduledParameters

log = get_logger("apt.training")


class Enabling:
    """Sets the states of scheduled plugins according to the run's position, and what is
    ``trainable``.

    ``record`` is called after a plugin was enabled, to update the manifest.
    """

    def __init__(
        self,
        run: RunContext,
        schedule: Schedule,
        parameters: ScheduledParameters,
        switching: Switching,
        trainable: TrainableSet,
        record: Callable[[], None],
    ) -> None:
        self._run, self._schedule, self._parameters = run, schedule, parameters
        self._switching, self._trainable, self._record = switching, trainable, record
        self.scheduled: list[str] = []
        self._told: set[str] = set()

    def start(self) -> None:
        """Make scheduled plugins dormant, except those that a resumed run had enabled, and call
        on_plugin_enabled for those enabled at the start. Raises ConfigError if the model has fewer
        ids than the tokenizer then."""
        self._trainable.start()
        # Sorted, since plugins that change the model build on each other.
        active = sorted(r.name for r in self._run.manager.records.values() if r.state == "active")
        with_schedule = dict.fromkeys(b.plugin for b in self._schedule.boundaries())
        self.scheduled = [name for name in with_schedule if name in active]
        asleep = {name: self._run.progress.why_dormant(name) for name in self.scheduled}
        enabled_before = [name for name, reason in asleep.items() if not reason]
        for name, reason in asleep.items():
            if reason:
                self._run.manager.set_state(name, "dormant", reason)
        self._run.manager.step = self._run.progress.step
        for name in active:
            known = name in enabled_before
            if known or (name not in with_schedule and self._switching.switch(name)):
                self._run.manager.hook.on_plugin_enabled(plugin=name, trainer=self._run.trainer)
        if self._run.progress.step == 0:  # a resumed run enables what is due in its first step
            self.enable_due()
        self._switching.require_vocabulary(self._run.parts.tokenizer)

    def enable_due(self) -> bool:
        """Enable and disable plugins, then freeze and thaw parameters, as scheduled for the next
        step. Returns whether a plugin was enabled."""
        progress = self._run.progress
        epoch, step = progress.epoch, progress.step + 1
        enabled = False
        for name in self.scheduled:
            state = self._run.manager.records[name].state
            due = self._schedule.should_enable_plugin(
                name, epoch=epoch, step=step, tokens=progress.tokens
            )
            if due and state == "dormant" and self._switching.switch(name):
                self._run.manager.set_state(name, "active")
                self._note(name, "enabled", epoch, step)
                with self._run.trained.modes.starting(self._run.trained.model):
                    self._run.manager.hook.on_plugin_enabled(plugin=name, trainer=self._run.trainer)
                enabled = True
                self._record()  # now, so that a run killed later shows it
            elif not due and state == "active":
                self._run.manager.set_state(name, "dormant", DISABLED)
                self._run.trained.averages.by_plugin.pop(name, None)  # it is not enabled again
                self._note(name, "disabled", epoch, step)
        self._trainable.apply_due()
        return enabled

    def log_parameters(self, start: str) -> None:
        """Log the values of enabled plugins' annealed parameters in the next step. ``start`` names
        the epoch or step that begins."""
        schedule = self._schedule
        told = [
            f"{name}={self._parameters.value(name):.4g}"
            for name in schedule.annealed
            if self._counts(schedule.params[name])
        ]
        if told:
            log.info("%s starts with %s", start, ", ".join(told))

    def _counts(self, owner: str) -> bool:
        """Whether parameters of this plugin, or source of a mixture, count now."""
        record = self._run.manager.records.get(owner)
        return self._schedule.has_source(owner) if record is None else record.state == "active"

    def share_quarantines(self) -> None:
        """Quarantine a plugin in every process if one process has quarantined it. The first process
        logs failures that happened in others only."""
        world, records = self._run.world, self._run.manager.records
        if world.size == 1:
            return
        failures = {
            f"plugin {f.plugin} failed in {f.hook} at step {f.step} ({f.where}): {f.error}": {
                name: getattr(f, name) for name in ("plugin", "hook", "step", "where", "error")
            }
            for record in records.values()
            for f in (*record.failures, *record.leftovers)
        }
        own = {name: r.reason for name, r in records.items() if r.state == "quarantined"}
        new = {text: row for text, row in failures.items() if text not in self._told}
        everyone = world.gather((own, new))
        self._told.update(failures)
        for rank, (others, told) in enumerate(everyone):
            for failure, row in told.items():
                if world.is_first and failure not in failures:
                    self._run.events.record(
                        "failed",
                        f"process {rank}: {failure}",
                        log=log,
                        level=WARNING,
                        process=rank,
                        **row,
                    )
            for name, reason in others.items():
                if name not in own:
                    own[name] = reason
                    there = f"{reason}, in process {rank}"
                    self._run.manager.set_state(name, "quarantined", there)
                    self._run.events.record(
                        "quarantined",
                        f"plugin {name} is quarantined in all processes",
                        step=self._run.progress.step,
                        log=log,
                        level=WARNING,
                        plugin=name,
                        reason=there,
                    )

    def _note(self, plugin: str, event: str, epoch: int, step: int) -> None:
        self._run.events.record(
            event,
            f"{event} {plugin} (epoch {epoch}, step {step})",
            step=step,
            log=log,
            plugin=plugin,
            epoch=epoch,
        )
        self._run.progress.timeline.append(
            TimelineEntry(plugin=plugin, event=event, epoch=epoch, step=step)
        )
