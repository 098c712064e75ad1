"""What the helpers of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from apt_core.config import Config
from apt_core.event_log import EventLog
from apt_core.kernel import Kernel
from apt_core.parallel.world import World
from apt_core.plugin_manager import PluginManager
from apt_core.runs.run_state import Progress
from apt_core.training.prepare import Parts
from apt_core.training.stopping import Stopping
from apt_core.training.trained_model import TrainedModel


@dataclass(frozen=True, eq=False)
class RunContext:
    """The parts of a run that are there once its model is built, and stay the same objects to its
    end: the profile with its plugins, the processes, the text and the tokenizer, how far the run
    has come, the model that it trains, and the reasons to stop. ``trainer`` is handed to hooks, and
    used for nothing else."""

    kernel: Kernel
    world: World
    parts: Parts
    progress: Progress
    trained: TrainedModel
    stopping: Stopping
    trainer: object

    @property
    def config(self) -> Config:
        """The profile."""
        return self.kernel.config

    @property
    def manager(self) -> PluginManager:
        """The manager of the plugins."""
        return self.kernel.manager

    @property
    def events(self) -> EventLog:
        """Where what happens is recorded."""
        return self.kernel.manager.events
