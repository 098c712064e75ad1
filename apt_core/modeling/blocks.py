"""Finds the list of a model's blocks."""

from __future__ import annotations

from torch import nn


def block_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The first ``nn.ModuleList`` among the children of ``model``, which holds its blocks, with its
    name; ``""`` and an empty list if there is none."""
    lists = ((n, child) for n, child in model.named_children() if isinstance(child, nn.ModuleList))
    return next(lists, ("", nn.ModuleList()))
