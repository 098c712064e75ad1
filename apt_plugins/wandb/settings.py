"""The section ``monitoring.wandb``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from apt_core.sections import Name
from apt_plugins.tracking.settings import TrackerSettings

SECTION = "monitoring.wandb"


class WandbSettings(TrackerSettings):
    """Which run on Weights & Biases a run reports to."""

    project: Name | None = Field(
        default=None, description="Project to log to; none: the name of the profile."
    )
    entity: Name | None = Field(
        default=None, description="User or team that has the project; none: that of the key."
    )
    tags: Annotated[tuple[Name, ...], Strict(False)] = Field(
        default=(), description="Tags of the run."
    )
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto",
        description="online sends what is reported, offline keeps it in the run's folder for "
        "`wandb sync`; auto is online where there is a key and the service answers (WANDB_MODE "
        "says otherwise).",
    )
