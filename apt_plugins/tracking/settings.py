"""The settings that every tracker has, and what is inactive of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from apt_core.sections import Section
from apt_core.types import Inactive

if TYPE_CHECKING:
    from apt_core.config import Config


class TrackerSettings(Section):
    """Settings of a tracker."""

    enabled: bool | None = Field(
        default=None,
        description="Whether the profile activates the plugin, as naming it in plugins or by "
        "--plugin does.",
    )
    histograms_every_steps: Annotated[int, Field(ge=0, le=2**62)] = Field(
        default=0,
        description="Optimizer steps between histograms of weights and gradients; each waits for "
        "the device. 0 makes none.",
    )


def inactive_of(section: str) -> Callable[[Any], Iterator[Inactive]]:
    """What is inactive in the section of a tracker that is active."""
    plugin = section.rpartition(".")[2]

    def inactive(config: Config) -> Iterator[Inactive]:
        settings: Any = config.section(section)
        if settings.enabled is False:
            reason = (
                f"plugin {plugin} is named, so it is active: --plugin no:{plugin} leaves it out"
            )
            yield Inactive(f"{section}.enabled", reason, ("plugins",))

    return inactive
