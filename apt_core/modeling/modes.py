"""Sets and restores the training mode of every module of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from apt_core.torch_state import set_modes


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` and all its modules into eval mode while the context lasts, then restore the
    mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        set_modes(modes)
