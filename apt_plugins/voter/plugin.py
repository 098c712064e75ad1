"""Registers ``model.voting`` and the decoder that votes on uncertain tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_plugins.voter.settings import VotingSettings, contradictions, inactive, settings_of

if TYPE_CHECKING:
    from apt_core import GenerationRequest
    from apt_plugins.voter.decoder import VotingDecoder

PLUGIN = PluginInfo(summary="a vote on the next token where its entropy is high", version="1.0.0")

log = logging.getLogger("apt.voter")


class Plugin:
    """Votes in generations; ``_decoder`` is that of the current one."""

    def __init__(self) -> None:
        self._decoder: VotingDecoder | None = None

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [
            SectionSpec(
                "model.voting",
                VotingSettings,
                schedule_params=("vote_threshold",),
                inactive=inactive,
                check=contradictions,
            )
        ]

    @hookimpl
    def apt_decoder(self, request: GenerationRequest, session: Any) -> VotingDecoder | None:
        settings = settings_of(session.config)
        self._decoder = None
        # One voter is plain sampling, and at temperature 0 all voters take the same token.
        if settings.k == 1 or request.temperature <= 0:
            return None
        from apt_plugins.voter.decoder import VotingDecoder

        self._decoder = VotingDecoder(
            request,
            threshold=session.param("vote_threshold", settings.threshold),
            k=settings.k,
            normalized=settings.normalized,
        )
        return self._decoder

    @hookimpl
    def on_generation_end(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            log.info("%d of %d tokens were put to the vote", decoder.votes, decoder.tokens)
