"""The divergence between two distributions over a large vocabulary, a few tokens at a time.

Legend: N tokens, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU_CHUNK, ACCELERATOR_CHUNK = 2**20, 2**24
"""Logits of one state in a chunk: few enough for a CPU's caches to hold the intermediate results,
and enough for an accelerator that starting a kernel costs little beside running it."""


def divergence_sum(
    live: Tensor, stable: Tensor, counts: Tensor, *, chunk_elements: int | None = None
) -> Tensor:
    """The sum of KL(stable ‖ live) in nats over the tokens that count, 0-d, in fp32 or wider.

    ``live`` and ``stable`` are logits [N, V], ``counts`` [N] is 1 or 0. Both logits get a gradient
    where they require one. Probabilities are held for ``chunk_elements`` logits at a time only;
    the backward computes them again.
    """
    if chunk_elements is None:
        chunk_elements = CPU_CHUNK if live.device.type == "cpu" else ACCELERATOR_CHUNK
    return _Divergence.apply(live, stable, counts, max(1, chunk_elements // live.shape[-1]))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, live: Tensor, stable: Tensor, counts: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(live.dtype, torch.float32)
        each = torch.cat(
            [
                _divergences(*_log_probabilities(wide, a, s))
                for a, s in zip(live.split(rows), stable.split(rows), strict=True)
            ]
        )
        ctx.save_for_backward(live, stable, counts)
        ctx.rows, ctx.wide = rows, wide
        return each @ counts.to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        live, stable, counts = ctx.saved_tensors
        grads = [
            torch.empty_like(logits) if needed else None
            for logits, needed in zip((live, stable), ctx.needs_input_grad[:2], strict=True)
        ]
        factors = (counts.to(ctx.wide) * upstream).unsqueeze(-1)
        for start in range(0, len(live), ctx.rows):
            part = slice(start, start + ctx.rows)
            log_a, log_s = _log_probabilities(ctx.wide, live[part], stable[part])
            if grads[0] is not None:
                grads[0][part] = (log_a.exp() - log_s.exp()).mul_(factors[part])
            if grads[1] is not None:
                ahead = log_s - log_a
                ahead -= _divergences(log_a, log_s).unsqueeze(-1)
                grads[1][part] = ahead.mul_(log_s.exp()).mul_(factors[part])
        return grads[0], grads[1], None, None


def _log_probabilities(wide: torch.dtype, *logits: Tensor) -> list[Tensor]:
    return [part.to(wide).log_softmax(-1) for part in logits]


def _divergences(log_a: Tensor, log_s: Tensor) -> Tensor:
    """KL(s ‖ a) of each token, [N], of log-probabilities [N, V]."""
    return (log_s.exp() * (log_s - log_a)).sum(-1)
