"""Load balancing of experts without a loss (Wang et al., arXiv:2408.15664).

The router chooses experts by score + b and weighs them by the score alone. After each step the bias
b of an expert rises where it got less than its fair share of the tokens, and falls where it got
more.
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
    """Add rate * (sign(mean c - c) - mean of those signs) to every router's bias [G*E].

    c are the step's counts in ``layer.load`` [G*E]; means are over the E experts of a group. The
    subtracted mean keeps the mean of the biases constant. A ``void`` step (a bool, or 0-d) changes
    no bias.
    """
    if void is True:
        return
    loads = torch.stack([layer.load for layer in layers])
    loads = loads.unflatten(-1, (layers[0].granularity, layers[0].num_experts))  # [L, G, E]
    # E * (mean c - c), in integers: exactly 0 for an expert at its fair share.
    signs = (loads.sum(-1, keepdim=True) - loads.shape[-1] * loads).sign()
    moves = rate * (signs - signs.mean(-1, keepdim=True))
    if isinstance(void, Tensor):
        moves *= 1 - void
    torch._foreach_add_([layer.router.bias for layer in layers], list(moves.flatten(1).unbind()))
