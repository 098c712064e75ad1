"""The training mode of modules: each has its own, and a model need not have one for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from apt_core.torch_state import set_modes


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model`` and all that it consists of are in eval mode inside; after that each module has the
    mode that it had, also one that was in eval mode alone."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        set_modes(modes)
