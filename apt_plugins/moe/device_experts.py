"""The experts' computation on an accelerator: in bf16, or with a limit to an expert's rows, nothing
waits for how many there are.

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
"""Major compute capabilities whose grouped products read the numbers of rows from the device; torch
computes them with a loop on others."""

MAX_GROUPED = 1023
"""Experts that a grouped product takes."""


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

    ``factors`` [S, F] are of the hidden units of each assignment. Products are grouped where that
    runs (:func:`runs_grouped`). Elsewhere each expert's rows are padded to ``limit``; without one,
    where that would compute and hold E/K times as much, the numbers of rows are read from the
    device and the experts take turns.
    """
    experts = torch.arange(len(up), device=x.device)
    grouped = runs_grouped(x, up)
    # What is nobody's comes last: beyond all bins, or to the last expert with a weight of 0.
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
    """rows [S, ...] in the order ``order``, of which ``back`` is the inverse.

    The gradient of an index that may repeat is a sum, for which its numbers are sorted on a GPU. A
    permutation is undone by reading.
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
    """The rows [S, D] that stand at ``places`` [S] of bins [P, D]. What stands at the last place is
    nobody's: only there places repeat, and its gradient is one of them."""

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
    """rows [S, D] of which an expert's end at ``ends`` [E], by matrices [E, F, D]: [S, F]."""
    return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


def _read(ends: Tensor, rows: int) -> list[int]:
    if stands_for_gpu(ends):  # nobody has chosen: what is held does not depend on it
        return [rows * (expert + 1) // len(ends) for expert in range(len(ends))]
    numbers: list[int] = ends.tolist()
    return numbers


def _in_turns(rows: Tensor, matrices: Tensor, *, ends: list[int]) -> Tensor:
    """As :func:`_grouped`; rows after the last end are nobody's and give 0."""
    *parts, nobodys = rows.tensor_split(ends)
    products = [part @ matrix.T for part, matrix in zip(parts, matrices.unbind(), strict=True)]
    return torch.cat([*products, nobodys.new_zeros(len(nobodys), matrices.shape[1])])


def _padded(rows: Tensor, matrices: Tensor, *, places: Tensor, size: int) -> Tensor:
    """As :func:`_grouped`, with ``size`` places for each expert's rows; ``places`` [S] are theirs,
    and one beyond them all is nobody's."""
    bins = rows.new_zeros(size * len(matrices) + 1, rows.shape[1]).index_copy(0, places, rows)
    outputs = torch.bmm(bins[:-1].unflatten(0, (-1, size)), matrices.transpose(1, 2))
    return _Read.apply(F.pad(outputs.flatten(0, 1), (0, 0, 0, 1)), places)


def runs_grouped(x: Tensor, up: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` runs on the type, device and widths of these
    without asking the device for the number of rows."""
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return False
    # Rows begin at multiples of 16 bytes.
    aligned = up.shape[1] % 8 == 0 and up.shape[2] % 8 == 0
    if not aligned or len(up) > MAX_GROUPED:
        return False
    if stands_for_gpu(x):
        return planned_capability()[0] in GROUPED_MAJORS
    return torch.cuda.get_device_capability(x.device)[0] in GROUPED_MAJORS
