"""Feed-forwards side by side, of which each token passes through a few.

Legend: N tokens, K assignments of each, S = N*K assignments, E experts, D d_model, F hidden units
of an expert.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from apt_core.modeling import write_std
from apt_plugins.moe.cpu_experts import assigned_on_cpu

Activation = Literal["swiglu", "gelu", "relu2"]


class Experts(nn.Module):
    """E feed-forwards with the parameters ``gate`` [E, F, D] (of swiglu), ``up`` [E, F, D] and
    ``down`` [E, D, F], each as ``nn.Linear`` keeps it.

    What is computed grows with the assignments and not with E: they are sorted by expert, and each
    expert's rows are one product.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: Activation = "swiglu"
    ) -> None:
        super().__init__()
        if min(num_experts, d_model, d_ff) < 1:
            raise ValueError(
                "model.moe.experts, model.d_model and model.d_ff must be positive, not "
                f"{num_experts}, {d_model}, {d_ff}"
            )
        self.num_experts, self.d_model, self.d_ff = num_experts, d_model, d_ff
        self.activation = activation
        if activation == "swiglu":
            self.gate = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.up = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                self.init_parameter(name, parameter, None, num_layers=1)

    @property
    def reads_stream(self) -> tuple[str, ...]:
        return ("gate", "up") if self.activation == "swiglu" else ("up",)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        down = name == "down"
        std = write_std(self.d_ff, num_layers) if down else self.d_model**-0.5
        nn.init.normal_(tensor, 0.0, std, generator=generator)
        return True

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, dropout: float = 0.0) -> Tensor:
        """The weighted sum of the chosen experts.

        x [N, D], indices int64 [N, K], weights [N, K] to [N, D]. An assignment of weight 0 adds
        nothing. ``dropout`` is a probability for the hidden units.
        """
        gate = self.gate if self.activation == "swiglu" else None
        tensors = [x, gate, self.up, self.down]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
        x, gate, up, down = tensors
        weights = weights.to(x.dtype)
        kept = None
        if dropout:
            ones = x.new_ones(indices.numel(), self.d_ff)
            kept = F.dropout(ones, dropout)
        with torch.autocast(x.device.type, enabled=False):
            if _computes_on_cpu(x):
                return assigned_on_cpu(self.activation, x, indices, weights, gate, up, down, kept)
            return _grouped(self.activation, x, indices, weights, gate, up, down, kept)


def _computes_on_cpu(x: Tensor) -> bool:
    """Are there numbers to be read, without waiting for anything and without breaking a graph?"""
    return (
        x.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
    )


def _grouped(
    activation: Activation,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """By grouped products, whose sizes stay on the device."""
    order = indices.flatten().argsort(stable=True)
    experts = torch.arange(len(up), device=x.device)
    ends = torch.searchsorted(indices.flatten()[order], experts, right=True).to(torch.int32)
    tokens = order // indices.shape[1]

    def product(rows: Tensor, matrices: Tensor) -> Tensor:
        return F.grouped_mm(rows, matrices.transpose(-2, -1), offs=ends)

    rows = x[tokens]
    hidden = product(rows, up)
    if gate is not None:
        hidden = F.silu(product(rows, gate)) * hidden
    elif activation == "relu2":
        hidden = F.relu(hidden)
        hidden = hidden * hidden
    else:
        hidden = F.gelu(hidden)
    if kept is not None:
        hidden = hidden * kept
    outputs = product(hidden * weights.flatten()[order, None], down)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return outputs[back].view(*indices.shape, -1).sum(1)
