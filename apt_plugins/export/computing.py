"""Computes with a model in plain form, in fp32 on the CPU.

Shapes: T tokens, D d_model, V token ids, K key and value heads, R the width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_core.modeling.layers.rope import Rotary
from apt_core.providers import PlainAttention, PlainExperts, PlainModel, PlainNorm


class PlainRunner:
    """Runs ``model``, all of whose blocks it holds in memory."""

    def __init__(self, model: PlainModel) -> None:
        shape = model.shape
        self._model, self._blocks = model, list(model.blocks())
        self._turn = Rotary(shape.head_dim, shape.max_seq_len, shape.rope.theta, shape.rope.scaling)

    @torch.no_grad()
    def forward(self, ids: Sequence[int], *, whole: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The logits [T, V] of ``ids``, and the stream [T, D] after each block; without ``whole``
        no streams, and the logits [1, V] of the last place."""
        model = self._model
        x = model.embedding[torch.tensor(ids)]
        streams = []
        for block in self._blocks:
            x = x + self._attention(block.attention, _normed(block.attention_norm, x))
            normed, ffn = _normed(block.ffn_norm, x), block.ffn
            if isinstance(ffn, PlainExperts):
                x = x + _experts(ffn, normed)
            else:
                x = x + _gated(normed, ffn.gate, ffn.up, ffn.down)
            if whole:
                streams.append(x)
        x = x if whole else x[-1:]
        head = model.embedding if model.head is None else model.head
        return _normed(model.final_norm, x) @ head.T, streams

    def _attention(self, form: PlainAttention, x: Tensor) -> Tensor:
        def heads(weight: Tensor, norm: PlainNorm | None = None) -> Tensor:
            each = (x @ weight.T).unflatten(-1, (-1, form.head_dim))
            return each if norm is None else _normed(norm, each)

        turned = [
            self._turn(heads(weight, norm)[None])
            for weight, norm in ((form.q, form.q_norm), (form.k, form.k_norm))
        ]
        q, k, v = (each.transpose(1, 2) for each in (*turned, heads(form.v)[None]))
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        if form.window is not None:
            seen = seen.triu(1 - form.window)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1) @ form.out.T


def _normed(norm: PlainNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(form: PlainExperts, x: Tensor) -> Tensor:
    router = form.router
    weights, chosen = (x @ router.weight.T).softmax(-1).topk(router.experts_per_token)
    if router.renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    found = torch.zeros_like(x)
    for number in chosen.unique().tolist():
        token, place = (chosen == number).nonzero(as_tuple=True)
        made = _gated(x[token], form.gate[number], form.up[number], form.down[number])
        found.index_add_(0, token, made * weights[token, place, None])
    return found
