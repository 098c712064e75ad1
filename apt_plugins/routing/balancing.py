"""Balance of the experts' load without a loss.

Wang et al., arXiv:2408.15664: experts are chosen by score + b and weighed by the score alone, and
after each step b rises where an expert was sent less than its fair share and falls where more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from apt_plugins.moe.layer import MoELayer


@torch.no_grad()
def move_biases(layers: Sequence[MoELayer], rate: float, void: bool | Tensor) -> None:
    """Move every router's bias [G*E] by rate * (sign(mean c - c) - mean of those signs), with the
    counts c of the step in ``layer.load`` [G*E] and the means over the E experts of a group.

    The second mean keeps that of the biases where it is. After a ``void`` step (a bool, or 0-d)
    they stay, as all that it would have changed.
    """
    if void is True:
        return
    loads = torch.stack([layer.load for layer in layers])
    loads = loads.unflatten(-1, (layers[0].granularity, layers[0].num_experts))  # [L, G, E]
    # E times mean c - c, in whole numbers: an expert at its fair share stays exactly there.
    signs = (loads.sum(-1, keepdim=True) - loads.shape[-1] * loads).sign()
    moves = rate * (signs - signs.mean(-1, keepdim=True))
    if isinstance(void, Tensor):
        moves *= 1 - void
    torch._foreach_add_([layer.router.bias for layer in layers], list(moves.flatten(1).unbind()))
