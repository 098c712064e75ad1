"""Plugins that become enabled and disabled as the run goes, by its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apt_core.log import get_logger
from apt_core.runs.manifest import write_manifest

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = get_logger("apt.training")

_WAITING, _DISABLED = "waits for its schedule", "disabled by its schedule"


class Enabling:
    """Keeps the states of plugins with a schedule what the position says they are."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.manager = trainer.manager
        self.scheduled: list[str] = []
        self._told: set[str] = set()

    def announce(self) -> None:
        """Put plugins with a schedule to sleep, but for those that a resumed run had enabled, and
        tell of those that are enabled at the start."""
        # In the order of names and moments: plugins that change the model build on each other.
        active = sorted(r.name for r in self.manager.records.values() if r.state == "active")
        with_schedule = dict.fromkeys(b.plugin for b in self.trainer.schedule.boundaries())
        self.scheduled = [name for name in with_schedule if name in active]
        before = {name: self._last_event(name) for name in self.scheduled}
        enabled_before = [name for name, event in before.items() if event == "enabled"]
        for name, event in before.items():
            if event != "enabled":
                self.manager.set_state(name, "dormant", _DISABLED if event else _WAITING)
        self.manager.step = self.trainer.step
        for name in active:
            known = name in enabled_before
            if known or (name not in with_schedule and self.trainer.switching.switch(name)):
                self.manager.hook.on_plugin_enabled(plugin=name, trainer=self.trainer)
        if self.trainer.step == 0:  # else what is due next is so for the step that comes
            self.enable_due()

    def enable_due(self) -> bool:
        """Enable and disable what the schedule says for the step that comes next; returns whether
        anything was enabled."""
        trainer = self.trainer
        epoch, step = trainer.epoch, trainer.step + 1
        enabled = False
        for name in self.scheduled:
            state = self.manager.records[name].state
            due = trainer.schedule.should_enable_plugin(
                name, epoch=epoch, step=step, tokens=trainer.tokens
            )
            if due and state == "dormant" and trainer.switching.switch(name):
                self.manager.set_state(name, "active")
                self._note(name, "enabled", epoch, step)
                with trainer.modes.starting(trainer.model):
                    self.manager.hook.on_plugin_enabled(plugin=name, trainer=trainer)
                enabled = True
                # A run that is killed later has been so too.
                write_manifest(trainer, "running")
            elif not due and state == "active":
                self.manager.set_state(name, "dormant", _DISABLED)
                trainer.averages.pop(name, None)  # it is not enabled again
                self._note(name, "disabled", epoch, step)
        return enabled

    def tell_parameters(self, start: str) -> None:
        """Log what the annealed parameters of enabled plugins are in the step that comes next, with
        which the ``start`` of something is told."""
        trainer, schedule = self.trainer, self.trainer.schedule
        told = [
            f"{name}={trainer.param(name):.4g}"
            for name in schedule.annealed
            if self.manager.records[schedule.params[name]].state == "active"
        ]
        if told:
            log.info("%s starts with %s", start, ", ".join(told))

    def share_quarantines(self) -> None:
        """Quarantine in every process what is quarantined in one of them: the same plugins run
        everywhere, or nowhere. The first process logs the failures that others had alone."""
        world, records = self.trainer.world, self.manager.records
        if world.size == 1:
            return
        failures = [
            f"plugin {f.plugin} failed in {f.hook} at step {f.step} ({f.where}): {f.error}"
            for record in records.values()
            for f in (*record.failures, *record.leftovers)
        ]
        own = {name: r.reason for name, r in records.items() if r.state == "quarantined"}
        everyone = world.gather((own, [text for text in failures if text not in self._told]))
        self._told.update(failures)
        for rank, (others, told) in enumerate(everyone):
            for failure in told:
                if world.is_first and failure not in failures:
                    log.warning("process %d: %s", rank, failure)
            for name, reason in others.items():
                if name not in own:
                    own[name] = reason
                    self.manager.set_state(name, "quarantined", f"{reason}, in process {rank}")
                    log.warning("plugin %s is quarantined in all processes", name)

    def _note(self, plugin: str, event: str, epoch: int, step: int) -> None:
        log.info("%s %s (epoch %d, step %d)", event, plugin, epoch, step)
        self.trainer.timeline.append(
            {"plugin": plugin, "event": event, "epoch": epoch, "step": step}
        )

    def _last_event(self, plugin: str) -> str:
        events = [entry["event"] for entry in self.trainer.timeline if entry["plugin"] == plugin]
        return events[-1] if events else ""
