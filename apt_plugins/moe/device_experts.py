"""The experts' computation on an accelerator. In bf16, or with a limit to an expert's rows, the
host does not wait for the numbers of rows.

Legend as in :mod:`apt_plugins.moe.experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_core.device import planned_capability, stands_for_gpu

GROUPED_MAJORS = (9, 10)
"""Major compute capabilities whose grouped products read the numbers of rows on the device; on
others torch uses a loop."""

MAX_GROUPED = 1023
"""The most experts of a grouped product."""


def assigned_on_device(
    activation: str,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
    *,
    limit: int | None,
) -> Tensor:
    """The weighted sum [N, D] of the chosen experts, of the type of ``x``, which is that of the
    parameters too.

    ``factors`` [S, F] multiply the hidden units of each assignment. Grouped products are used where
    they run (:func:`runs_grouped`). Otherwise each expert's rows are padded to ``limit``; without a
    limit padding would cost E/K times as much, so the numbers of rows are read from the device and
    the experts are computed one after the other.
    """
    experts = torch.arange(len(up), device=x.device)
    grouped = runs_grouped(x, up)
    # Assignments to no expert come last: beyond all bins, or to the last expert with weight 0.
    owners = indices.where(indices >= 0, len(up) - grouped).flatten()
    ordered, order = owners.sort(stable=True)
    positions = torch.arange(len(order), device=x.device)
    back = torch.empty_like(order).scatter_(0, order, positions)
    ends = torch.searchsorted(ordered, experts, right=True).to(torch.int32)
    product: Callable[[Tensor, Tensor], Tensor]
    if grouped:
        product = partial(_grouped, ends=ends)
    elif limit is None:
        product = partial(_in_turns, ends=_read(ends, len(order)))
    else:
        size = min(limit, len(x))
        places = size * ordered + positions - torch.searchsorted(ordered, ordered)
        product = partial(_padded, places=places.clamp(max=size * len(up)), size=size)

    rows = _Dispatched.apply(x, order, back, indices.shape[1])
    hidden = product(rows, up)
    if gate is not None:
        hidden = F.silu(product(rows, gate)) * hidden
    elif activation == "relu2":
        positive = F.relu(hidden)
        hidden = positive * positive
    else:
        hidden = F.gelu(hidden)
    if factors is not None:
        hidden = hidden * factors[order]
    shares = weights.masked_fill(indices < 0, 0).flatten()
    shares = _Permuted.apply(shares, order, back)[:, None]
    outputs = product((hidden * shares).to(x.dtype), down)
    return _Permuted.apply(outputs, back, order).unflatten(0, indices.shape).sum(1)


class _Permuted(torch.autograd.Function):
    """rows [S, ...] in the order ``order``, whose inverse is ``back``.

    The backward of indexing sums over repeated indices, for which a GPU sorts them. The backward of
    a permutation is indexing by its inverse.
    """

    @staticmethod
    def forward(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return upstream.index_select(0, back), None, None


class _Dispatched(torch.autograd.Function):
    """The tokens x [N, ...] of ``repeats`` assignments each, in the order of experts: [S, ...].
    Otherwise as :class:`_Permuted`."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor, repeats: int) -> Tensor:
        return x.index_select(0, order // repeats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.repeats = inputs[3]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        d_x = upstream.index_select(0, back).unflatten(0, (-1, ctx.repeats)).sum(1)
        return d_x, None, None, None


class _Read(torch.autograd.Function):
    """The rows [S, D] at ``places`` [S] of bins [P, D]. The last place belongs to no expert; it is
    the only one that repeats, and its gradient is arbitrary."""

    @staticmethod
    def forward(bins: Tensor, places: Tensor) -> Tensor:
        return bins.index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.number = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.number, upstream.shape[1]).index_copy(
            0, places, upstream
        ), None


def _grouped(rows: Tensor, matrices: Tensor, *, ends: Tensor) -> Tensor:
    """Multiply rows [S, D] by the matrices [E, F, D] of their experts: [S, F]. The rows of expert e
    end at ``ends[e]``."""
    return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


def _read(ends: Tensor, rows: int) -> list[int]:
    if stands_for_gpu(ends):  # fake tensors: memory does not depend on the choice
        return [rows * (expert + 1) // len(ends) for expert in range(len(ends))]
    numbers: list[int] = ends.tolist()
    return numbers


def _in_turns(rows: Tensor, matrices: Tensor, *, ends: list[int]) -> Tensor:
    """As :func:`_grouped`, expert by expert; rows after the last end give 0."""
    *parts, nobodys = rows.tensor_split(ends)
    products = [part @ matrix.T for part, matrix in zip(parts, matrices.unbind(), strict=True)]
    return torch.cat([*products, nobodys.new_zeros(len(nobodys), matrices.shape[1])])


def _padded(rows: Tensor, matrices: Tensor, *, places: Tensor, size: int) -> Tensor:
    """As :func:`_grouped`, with each expert's rows padded to ``size``; ``places`` [S] are the rows'
    positions, with one beyond all experts for rows of no expert."""
    bins = rows.new_zeros(size * len(matrices) + 1, rows.shape[1]).index_copy(0, places, rows)
    outputs = torch.bmm(bins[:-1].unflatten(0, (-1, size)), matrices.transpose(1, 2))
    return _Read.apply(F.pad(outputs.flatten(0, 1), (0, 0, 0, 1)), places)


def runs_grouped(x: Tensor, up: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` runs on dtype, device and widths of ``x`` and
    ``up`` without reading the numbers of rows on the host."""
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return False
    # Rows begin at multiples of 16 bytes.
    aligned = up.shape[1] % 8 == 0 and up.shape[2] % 8 == 0
    if not aligned or len(up) > MAX_GROUPED:
        return False
    if stands_for_gpu(x):
        return planned_capability()[0] in GROUPED_MAJORS
    return torch.cuda.get_device_capability(x.device)[0] in GROUPED_MAJORS
