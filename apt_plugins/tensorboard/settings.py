"""The section ``monitoring.tensorboard``."""

from __future__ import annotations

from pydantic import Field

from apt_core.sections import Name
from apt_plugins.tracking.settings import TrackerSettings

SECTION = "monitoring.tensorboard"


class TensorboardSettings(TrackerSettings):
    """Where the event files are written."""

    log_dir: Name | None = Field(
        default=None,
        description="Folder in which each run has one of its own, by the name of the run's; none: "
        "tensorboard/ in the folder of the run.",
    )
