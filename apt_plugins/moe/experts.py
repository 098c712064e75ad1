"""Expert feed-forwards, a few of which compute each token.

Legend: N tokens, K assignments of each, S = N*K assignments, E experts, D d_model, F hidden units
of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling import cast_weight, write_std
from apt_core.modeling.growth import Larger, Sizes, resized
from apt_core.modeling.row_decoding import Products
from apt_plugins.moe.cpu_experts import assigned_on_cpu
from apt_plugins.moe.device_experts import assigned_on_device

Computed = Callable[[Tensor, Tensor, Tensor], Tensor]

Activation = Literal["swiglu", "gelu", "relu2"]


class Experts(nn.Module):
    """E feed-forwards with the parameters ``gate`` [E, F, D] (of swiglu), ``up`` [E, F, D] and
    ``down`` [E, D, F], each as ``nn.Linear`` keeps it.

    The cost grows with the number of assignments, not with E: assignments are sorted by expert, and
    the rows of each expert are multiplied together.
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

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``, where ``d_ff`` is that of an expert."""
        self.d_model, self.d_ff = sizes.d_model or self.d_model, sizes.d_ff or self.d_ff
        for name in self.reads_stream:
            old = getattr(self, name)
            setattr(self, name, resized(old, self.num_experts, self.d_ff, self.d_model))
        self.down = resized(self.down, self.num_experts, self.d_model, self.d_ff)
        return {
            "down": Larger({1: "zero", 2: "zero"}),
            **{name: Larger({1: "initial", 2: "initial"}) for name in self.reads_stream},
        }

    @property
    def cast_once(self) -> tuple[str, ...]:
        return (*self.reads_stream, "down")

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        down = name == "down"
        std = write_std(self.d_ff, num_layers) if down else self.d_model**-0.5
        nn.init.normal_(tensor, 0.0, std, generator=generator)
        return True

    def decoding(self, products: Products) -> Computed:
        """The experts as a function of x [N, D], indices and weights [N, K], for many calls with
        the same weights."""
        return self

    def forward(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        dropout: float = 0.0,
        limit: int | None = None,
    ) -> Tensor:
        """The weighted sum of the chosen experts.

        x [N, D], indices int64 [N, K], weights [N, K] to [N, D]. An index of -1 stands for no
        expert: it adds nothing and costs next to nothing. ``dropout`` is the probability for hidden
        units. No expert may be chosen more than ``limit`` times (by default N).
        """
        # The meta device has no autocast: treat it as a CPU.
        device = "cpu" if x.is_meta else x.device.type
        gate = self.gate if self.activation == "swiglu" else None
        up, down = self.up, self.down
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, up, down = x.to(dtype), cast_weight(up, dtype), cast_weight(down, dtype)
            gate = None if gate is None else cast_weight(gate, dtype)
        factors = None
        if dropout:
            factors = F.dropout(x.new_ones(indices.numel(), self.d_ff), dropout)
        tensors = (x, indices, weights, gate, up, down, factors)
        if device == "cpu" and not x.is_cuda:
            return assigned_on_cpu(self.activation, *tensors)
        return assigned_on_device(self.activation, *tensors, limit=limit)
