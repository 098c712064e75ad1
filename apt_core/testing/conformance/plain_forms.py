"""What a layer says of itself in plain form is what it computes.

Shapes: B batch, T tokens, D d_model, H query heads, K key and value heads, R the width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.layers.rope import Rotary
from apt_core.modeling.plain import beyond_plain, has_form, plain_of
from apt_core.providers.plain import PlainAttention, PlainExperts, PlainFFN, PlainNorm
from apt_core.testing.conformance.checks import LeftOut, require_equal

Form = TypeVar("Form")

BF16 = 0.03
"""Tolerance of results of bf16, relative to the largest value."""


@torch.no_grad()
def computes_its_form(
    layer: nn.Module,
    x: Tensor,
    form: type[Form] | tuple[type[Form], ...],
    computed: Callable[[Any, Tensor], Tensor],
) -> None:
    """The layer gives for ``x`` what ``computed`` gives with its form, once it has dropped what
    that leaves out. Raises LeftOut for a layer that has none."""
    if not has_form(layer):
        raise LeftOut("its layers have no plain form")
    layer = layer.eval()
    for _, beyond in beyond_plain(layer):
        if beyond.drop is not None:
            beyond.drop()
    left = [beyond.name for _, beyond in beyond_plain(layer)]
    assert not left, f"{', '.join(left)} is there after it was dropped"
    # Kernels of a GPU may compute in bf16.
    tolerance = BF16 if x.is_cuda else None
    require_equal(computed(plain_of(layer, form), x), layer(x), "its plain form", tolerance)


def attended(form: PlainAttention, x: Tensor) -> Tensor:
    """x [B, T, D] to [B, T, D]."""
    turn = Rotary(form.head_dim, x.shape[1], form.rope.theta, form.rope.scaling).to(x.device)

    def heads(weight: Tensor, norm: PlainNorm | None = None) -> Tensor:
        each = F.linear(x, weight).unflatten(-1, (-1, form.head_dim))
        return each if norm is None else normed(norm, each)

    q, k = turn(heads(form.q, form.q_norm)), turn(heads(form.k, form.k_norm))
    shared = form.num_heads // form.num_kv_heads
    k, v = (each.repeat_interleave(shared, dim=2) for each in (k, heads(form.v)))
    scores = torch.einsum("bthr,bshr->bhts", q, k) / form.head_dim**0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, float("-inf")).softmax(-1)
    return F.linear(torch.einsum("bhts,bshr->bthr", shares, v).flatten(2), form.out)


def fed_forward(form: PlainFFN | PlainExperts, x: Tensor) -> Tensor:
    """x [B, T, D] to [B, T, D]."""
    if isinstance(form, PlainFFN):
        return F.linear(F.silu(F.linear(x, form.gate)) * F.linear(x, form.up), form.down)
    shares, chosen = F.linear(x, form.router.weight).softmax(-1).topk(form.router.experts_per_token)
    if form.router.renormalised:
        shares = shares / shares.sum(-1, keepdim=True)
    weights = torch.zeros(*x.shape[:-1], len(form.gate), dtype=x.dtype, device=x.device)
    weights = weights.scatter(-1, chosen, shares)
    parts = zip(form.gate, form.up, form.down, strict=True)
    each = torch.stack([fed_forward(PlainFFN(*part), x) for part in parts], dim=-1)
    return (each * weights[..., None, :]).sum(-1)


def normed(form: PlainNorm, x: Tensor) -> Tensor:
    """x [..., D] to [..., D]."""
    return x * (x.square().mean(-1, keepdim=True) + form.eps).rsqrt() * form.weight
