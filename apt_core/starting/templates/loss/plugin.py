"""A loss term: the negative entropy of the predictions, which keeps them from being too sure
(Pereyra et al., arXiv:1701.06548)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from apt_core import ModelOutput, PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section

if TYPE_CHECKING:
    from torch import Tensor

PLUGIN = PluginInfo(summary="penalises predictions that are too sure", version="0.1.0")


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    weight: float = Field(
        default=0.01, ge=0, description="Weight of the term, where no schedule moves it."
    )


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec("my_plugin", Settings, schedule_params=("my_plugin_weight",))]


@hookimpl
def apt_loss_terms(trainer: Any, output: ModelOutput) -> dict[str, Tensor]:
    settings = trainer.config.section("my_plugin")
    weight = trainer.param("my_plugin_weight", default=settings.weight)
    log_p = output.logits.float().log_softmax(-1)  # [B, T, V]
    return {"negative_entropy": weight * (log_p.exp() * log_p).sum(-1).mean()}
