"""Outputs of two states, and tiny runs with the plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apt_core import ModelOutput
from apt_core.data.packing.rows import IGNORED
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_states() -> Callable[..., tuple[ModelOutput, ModelOutput, torch.Tensor, torch.Tensor]]:
    """Two outputs that require gradients, targets of which some do not count, and a vein."""

    def make(
        dtype: torch.dtype = torch.float64, batch: int = 2, length: int = 7, vocab: int = 11
    ) -> tuple[ModelOutput, ModelOutput, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def output() -> ModelOutput:
            logits, hidden = draw(batch, length, vocab), draw(batch, length, 6)
            return ModelOutput(logits.requires_grad_(), hidden.requires_grad_())

        targets = torch.randint(vocab, (batch, length), generator=generator)
        targets[0, 2], targets[1, 4:] = IGNORED, IGNORED
        return output(), output(), targets, torch.linalg.qr(draw(6, 3).double())[0]

    return make


@pytest.fixture
def align_run() -> Callable[..., TinyRun]:
    """A tiny run of a model that has a vein, with the plugin where it is ``aligned``; ``bistate``
    are keys of its section."""

    def run(
        *plugins: Any, bistate: dict[str, Any] | None = None, aligned: bool = True, **options: Any
    ) -> TinyRun:
        model = {**TINY_PROFILE["model"], "tva": {"s": 1}}
        if aligned:
            model["bistate"] = bistate or {}
            plugins = ("apt_plugins.align.plugin", *plugins)
        training = {**TINY_PROFILE["training"], "log_every_steps": 1}
        profile = {**TINY_PROFILE, "model": model, "training": training}
        return tiny_run(*plugins, profile=profile, **options)

    return run
