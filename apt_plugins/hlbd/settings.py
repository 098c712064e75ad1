"""The section ``hlbd`` of the profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from apt_core import Problem
from apt_core.sections import Count, Section, Size

if TYPE_CHECKING:
    from apt_core.config import Config

SOURCE = "hlbd"
"""The dataset whose tasks are scored."""


class HLBDSettings(Section):
    """``hlbd``: when tasks are scored, and how many."""

    every_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Epochs between scores; they are taken at the end in any case."
    )
    max_tasks: Count | None = Field(
        default=None,
        description="How many to score of the tasks that are trained, and of those that are held "
        "out, drawn at random but always alike. Without it all are scored.",
    )
    batch_size: Size = Field(default=256, description="Prompts that are answered at a time.")


def settings_of(config: Config) -> HLBDSettings:
    """The section of a profile that was loaded with the plugin."""
    settings = config.section("hlbd")
    assert isinstance(settings, HLBDSettings)
    return settings


def source_names(config: Config) -> list[str]:
    """The names of the sources of the profile that have HLBD tasks; a source that is no item of a
    mixture has an empty one."""
    data = config.data
    items = [("", data)] if data.mixture is None else [(item.name, item) for item in data.mixture]
    return [name for name, section in items if section.dataset_name == SOURCE]


def contradictions(config: Config) -> Iterator[Problem]:
    """The plugin has nothing to score where no source has such tasks."""
    if not source_names(config):
        yield Problem(
            "no source of the profile is hlbd, so there are no tasks to score",
            key="plugins",
            hint="set data.loader to hlbd, or leave the plugin out",
        )
