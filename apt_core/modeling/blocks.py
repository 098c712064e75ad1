"""Where a model keeps its blocks."""

from __future__ import annotations

from torch import nn


def block_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name of the ``nn.ModuleList`` in which a backbone keeps its blocks, and the list: the
    first one among the children of ``model``. ``""`` and an empty list where there is none."""
    lists = ((n, child) for n, child in model.named_children() if isinstance(child, nn.ModuleList))
    return next(lists, ("", nn.ModuleList()))
