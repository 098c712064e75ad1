"""Generations with plugins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apt_core import GenerationRequest
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.inference import generate
from apt_core.providers import SpecialTokens
from apt_core.testing import tiny_session


class Endless(ByteTokenizer):
    """Without an end of documents, so that every text gets as long as it may."""

    special = SpecialTokens()


@pytest.fixture
def continuation():
    """``continuation(*plugins, voting=None, **request)``: the tokens and the manager, by a model
    whose next token is sometimes certain and sometimes not; with the voter if it has settings."""

    def continued(*plugins, voting=None, **request):
        voter = () if voting is None else ("voter",)
        settings = {f"model.voting.{key}": value for key, value in (voting or {}).items()}
        session = tiny_session(*voter, *plugins, strict=False, overrides=settings)
        session = replace(session, tokenizer=Endless())
        with torch.no_grad():
            for index, parameter in enumerate(session.model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.add_(0.4 * noise)
        options = {"max_new_tokens": 24, "seed": 3, **request}
        result = generate(session, GenerationRequest("The ", **options))
        return list(result.token_ids), session.manager

    return continued
