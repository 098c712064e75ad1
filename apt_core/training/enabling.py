"""Plugins that become enabled and disabled as the run goes, by its schedule."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = logging.getLogger("apt.training")


class Enabling:
    """Keeps the states of plugins with a schedule what the position says they are."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.manager = trainer.manager
        self.scheduled: list[str] = []

    def announce(self) -> None:
        """Put plugins with a schedule to sleep and tell of those that are enabled at the start."""
        active = [r.name for r in self.manager.records.values() if r.state == "active"]
        with_schedule = {boundary.plugin for boundary in self.trainer.schedule.boundaries()}
        self.scheduled = [name for name in active if name in with_schedule]
        for name in self.scheduled:
            self.manager.set_state(name, "dormant", "waits for its schedule")
        self.manager.step = self.trainer.step
        for name in active:
            if name not in with_schedule:
                self.manager.hook.on_plugin_enabled(plugin=name, trainer=self.trainer)
        self.enable_due()

    def enable_due(self) -> None:
        """Enable and disable what the schedule says for the step that comes next."""
        trainer = self.trainer
        epoch, step = trainer.epoch, trainer.step + 1
        for name in self.scheduled:
            state = self.manager.records[name].state
            due = trainer.schedule.should_enable_plugin(
                name, epoch=epoch, step=step, tokens=trainer.tokens
            )
            if due and state == "dormant":
                self.manager.set_state(name, "active")
                log.info("enabled %s (epoch %d, step %d)", name, epoch, step)
                self.manager.hook.on_plugin_enabled(plugin=name, trainer=trainer)
            elif not due and state == "active":
                self.manager.set_state(name, "dormant", "disabled by its schedule")
                log.info("disabled %s (epoch %d, step %d)", name, epoch, step)
