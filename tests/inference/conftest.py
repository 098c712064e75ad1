"""Models to generate with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.providers.tokenizer import SpecialTokens
from apt_core.runs import Session
from apt_core.testing import tiny_session


class Endless(ByteTokenizer):
    """Without an end of documents, so that every text gets as long as it may."""

    special = SpecialTokens()


def stirred(session: Session, scale: float = 0.2) -> Session:
    """The session with noise in its weights, so that its texts are not all of one token."""
    with torch.no_grad():
        for index, parameter in enumerate(session.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(scale * noise)
    return session


def lively_session(*plugins: Any, endless: bool = True, **options: Any) -> Session:
    """A session of a tiny model with a context of 64 tokens, whose texts vary."""
    overrides = {"model.max_seq_len": 64, **options.pop("overrides", {})}
    session = stirred(tiny_session(*plugins, overrides=overrides, **options), 0.3)
    return replace(session, tokenizer=Endless()) if endless else session


@pytest.fixture(scope="session")
def lively() -> Callable[..., Session]:
    """``lively(*plugins, endless=True, **options)``: see :func:`lively_session`."""
    return lively_session


@pytest.fixture(scope="session")
def session() -> Session:
    """One for tests that do not change it."""
    return lively_session()
