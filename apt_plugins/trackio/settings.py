"""The section ``monitoring.trackio``."""

from __future__ import annotations

from pydantic import Field

from apt_core.sections import Name
from apt_plugins.tracking.settings import TrackerSettings

SECTION = "monitoring.trackio"


class TrackioSettings(TrackerSettings):
    """Where in trackio's database a run is."""

    project: Name | None = Field(
        default=None, description="Project of the run; none: the name of the profile."
    )
