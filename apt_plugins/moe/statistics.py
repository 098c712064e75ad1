"""The load of the experts: losses that balance it, and metrics of it.

L layers, G granularity, E experts, K of them per token, N tokens of a micro-batch. A layer has G
groups of E experts, and experts are compared within a group. Everything is computed for all layers
together and counts tokens and not padding: a token of a prompt takes a place as any other does,
though it has no target. Only :func:`figures` waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from apt_core.data.batches import Batch
    from apt_plugins.moe.layer import MoELayer
    from apt_plugins.moe.settings import MoeSettings

Layers = Sequence["MoELayer"]

QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "max": 1.0}


def losses(layers: Layers, batch: Batch, settings: MoeSettings) -> dict[str, Tensor]:
    """The loss terms of the last forward of ``layers``, which was of ``batch``; also counts its
    loads.

    ``balance``: weight * E * Σ f_i P_i, the mean over layers and groups (Fedus et al.,
    arXiv:2101.03961): f_i is the share of assignments to expert i, P_i its mean probability. With
    an even load it equals the weight. ``z``: weight * the mean of logsumexp(logits)² (Zoph et al.,
    arXiv:2202.08906). Both are means over tokens. A weight of 0 drops the term.
    """
    if not batch.token_count:
        return {}
    mask = batch.token_mask().flatten()
    counts = count(layers, mask)
    groups, experts = layers[0].granularity, layers[0].num_experts
    token_weights = mask.to(counts.dtype) / batch.token_count
    terms = {}
    if settings.balance_loss:
        shares = counts / (batch.token_count * layers[0].top_k)
        # Layer by layer: stacking the probabilities would double their memory.
        means = [token_weights @ layer.router.probabilities.to(counts.dtype) for layer in layers]
        scale = settings.balance_loss * experts / (len(layers) * groups)
        terms["balance"] = scale * (shares * torch.stack(means)).sum()
    if settings.z_loss:
        spreads = [
            layer.router.logits.unflatten(-1, (groups, experts)).logsumexp(-1) for layer in layers
        ]
        spread = torch.stack(spreads).square().mean((0, 2))  # [N]
        terms["z"] = settings.z_loss * (token_weights * spread).sum()
    return terms


@torch.no_grad()
def count(layers: Layers, mask: Tensor) -> Tensor:
    """Add the assignments of the tokens in ``mask`` [N] to the layers' ``load`` and ``dropped``.

    Returns the assignments of this forward, fp32 [L, G*E].
    """
    indices = torch.stack([layer.indices for layer in layers])  # [L, N, G*K]
    width = layers[0].granularity * layers[0].num_experts
    offsets = width * torch.arange(len(layers), device=indices.device)
    weights = mask.to(torch.float32)[:, None].expand(indices.shape)
    counts = torch.zeros(len(layers) * width, device=indices.device)
    # In one dimension, for which torch has a deterministic GPU kernel.
    counts.scatter_add_(0, (indices + offsets[:, None, None]).flatten(), weights.flatten())
    counts = counts.view(len(layers), width)
    torch._foreach_add_([layer.load for layer in layers], list(counts.unbind()))
    limited = [layer for layer in layers if layer.kept is not None]
    if limited:
        kept = torch.stack([layer.kept for layer in limited])
        lost = ((~kept) & mask[:, None]).sum((1, 2)).to(torch.float32)
        torch._foreach_add_([layer.dropped for layer in limited], list(lost.unbind()))
    return counts


@torch.no_grad()
def start_counting(layers: Layers) -> None:
    """Reset the counts at the beginning of a step."""
    torch._foreach_zero_([buffer for layer in layers for buffer in (layer.load, layer.dropped)])


@torch.no_grad()
def sum_over_processes(layers: Layers) -> None:
    """Sum the counts over all processes, in one message."""
    buffers = [buffer for layer in layers for buffer in (layer.load, layer.dropped)]
    message = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(message)
    parts = message.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(parts, buffers, strict=True)])


@torch.no_grad()
def figures(layers: Layers) -> dict[str, float]:
    """Metrics of the experts' load in the last step, empty if nothing was counted; waits for the
    device.

    An expert's load is relative to its fair share, the mean of its group. ``max_violation`` is
    the largest load minus 1 in the worst group of any layer, ``max_violation_mean`` that of the
    mean group (MaxVio of Wang et al., arXiv:2408.15664). ``load_entropy`` is the mean entropy of
    the load over that of an even one, ln E: from 0 to 1. ``drop_rate`` is the share of assignments
    beyond capacity. ``load_min``, ``load_p25``, ``load_p50``, ``load_p75`` and ``load_max`` are
    quantiles of the load over all experts of the model: its histogram in five numbers.
    """
    experts = layers[0].num_experts
    loads = torch.stack([layer.load for layer in layers]).view(-1, experts).cpu().double()
    dropped = torch.stack([layer.dropped for layer in layers]).sum().item()
    total = loads.sum().item()
    if not total:
        return {}
    loads = loads[loads.any(1)]  # layers in eval mode are not counted
    relative = loads / loads.mean(1, keepdim=True)
    violation = relative.amax(1) - 1
    entropy = torch.special.entr(loads / loads.sum(1, keepdim=True)).sum(1).mean().item()
    levels = torch.tensor(list(QUANTILES.values()), dtype=relative.dtype)
    quantiles = torch.quantile(relative.flatten(), levels).tolist()
    return {
        "max_violation": violation.max().item(),
        "max_violation_mean": violation.mean().item(),
        "load_entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "drop_rate": dropped / total,
        **{f"load_{name}": value for name, value in zip(QUANTILES, quantiles, strict=True)},
    }
