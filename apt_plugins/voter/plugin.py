"""Registers ``model.voting`` and the decoder that votes on uncertain tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_plugins.voter.settings import VotingSettings, contradictions, inactive, settings_of

if TYPE_CHECKING:
    from apt_core import GenerationRequest
    from apt_plugins.voter.decoder import VotingDecoder

PLUGIN = PluginInfo(summary="a vote on the next token where its entropy is high", version="1.0.0")

log = logging.getLogger("apt.voter")


class Plugin:
    """Votes in generations; ``_decoders`` are those of the generations that go on."""

    def __init__(self) -> None:
        # Weak, since nobody is told of the end of a generation that a failing model ends.
        self._decoders: WeakSet[VotingDecoder] = WeakSet()

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
        # One voter is plain sampling, and without a draw all voters take the same token.
        if settings.k == 1 or request.temperature <= 0 or request.top_k == 1:
            return None
        from apt_plugins.voter.decoder import VotingDecoder

        decoder = VotingDecoder(
            request,
            settings,
            threshold=session.param("vote_threshold", settings.threshold),
            decode=session.tokenizer.decode,
        )
        self._decoders.add(decoder)
        return decoder

    @hookimpl
    def on_generation_end(self, request: GenerationRequest) -> None:
        own = [decoder for decoder in self._decoders if decoder.request is request]
        for decoder in own[:1]:  # several generations of one request are alike
            self._decoders.discard(decoder)
            price = f", which took {decoder.computed} more tokens" if decoder.computed else ""
            log.info("%d of %d tokens were put to the vote%s", decoder.votes, decoder.tokens, price)
