"""Chooses by a vote where the model is uncertain of the next token."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ref

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_plugins.voter.settings import VotingSettings, contradictions, settings_of, unused

if TYPE_CHECKING:
    from apt_core import GenerationRequest
    from apt_core.config import Config
    from apt_plugins.voter.decoder import VotingDecoder

PLUGIN = PluginInfo(summary="a vote on the next token where its entropy is high", version="1.0.0")

log = logging.getLogger("apt.voter")


@dataclass
class Current:
    """What the hooks of a generation are not given: the ``settings`` of the newest profile, the
    ``trainer`` of the run that is under way, and the ``decoder`` of the generation."""

    settings: VotingSettings = field(default_factory=VotingSettings)
    trainer: ref[Any] | None = None
    decoder: VotingDecoder | None = None


current = Current()


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [
        SectionSpec(
            "model.voting",
            VotingSettings,
            schedule_params=("vote_threshold",),
            unused=unused,
            check=contradictions,
        )
    ]


@hookimpl
def apt_configure(config: Config) -> None:
    current.settings = settings_of(config)


@hookimpl
def on_plugin_enabled(trainer: Any) -> None:
    current.trainer = ref(trainer)


@hookimpl
def on_training_end() -> None:
    current.trainer = None


@hookimpl
def on_exception() -> None:
    current.trainer = None


@hookimpl
def apt_decoder(request: GenerationRequest) -> VotingDecoder | None:
    trainer = current.trainer() if current.trainer is not None else None
    settings = current.settings if trainer is None else settings_of(trainer.config)
    current.decoder = None
    # One voter, and voters that all take the most likely token, are plain sampling.
    if settings.k == 1 or request.temperature <= 0:
        return None
    from apt_plugins.voter.decoder import VotingDecoder

    threshold = settings.threshold
    if trainer is not None:
        threshold = trainer.param("vote_threshold", threshold)
    current.decoder = VotingDecoder(
        request, threshold=threshold, k=settings.k, normalized=settings.normalized
    )
    return current.decoder


@hookimpl
def on_generation_end() -> None:
    decoder, current.decoder = current.decoder, None
    if decoder is not None:
        log.info("%d of %d tokens were put to the vote", decoder.votes, decoder.tokens)
