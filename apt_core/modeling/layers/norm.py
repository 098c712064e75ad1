"""Normalisation layers: ``norm:rmsnorm`` and ``norm:layernorm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.row_decoding import Function, Products
from apt_core.providers.norm import NormProvider

EPS = 1e-8
"""Small compared with the mean square of the residual stream, which starts below 1e-5."""


def _as_wide(parameter: Tensor, x: Tensor) -> Tensor:
    """``parameter`` in the dtype of ``x`` if that is wider: FSDP2 may gather parameters in a
    narrower dtype, and torch's kernels need equal dtypes."""
    if parameter.dtype == x.dtype:
        return parameter
    return parameter.to(torch.promote_types(parameter.dtype, x.dtype))


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm whose parameters may have a narrower dtype than the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _as_wide(self.weight, x), self.eps)

    def decoding(self, products: Products) -> Function:
        """The layer as a function of x [N, D], for many calls with the same weights."""
        shape, weight, size = self.normalized_shape, self.weight, self.weight.numel()
        eps = EPS if self.eps is None else self.eps
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return lambda x: F.rms_norm(x, shape, _as_wide(weight, x), eps)
        epsilon = torch.tensor(eps)

        # Half the time of F.rms_norm for a few tokens on a CPU, where that is not fused.
        def normalized(x: Tensor) -> Tensor:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale = torch.addcmul(epsilon, length, length, value=1 / size).rsqrt_()
            return (x * scale).mul_(weight)

        return normalized


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm whose parameters may have a narrower dtype than the input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _as_wide(self.weight, x), _as_wide(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNormProvider(NormProvider):
    """``norm:rmsnorm`` (Zhang and Sennrich 2019); setting ``eps`` (1e-8: the stream
    starts small)."""

    name = "rmsnorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return RMSNorm(_checked(d_model), eps=float(self.setting("eps", EPS)))


class LayerNormProvider(NormProvider):
    """``norm:layernorm`` (Ba et al. 2016), with a scale and a shift; setting ``eps`` (1e-8: the
    stream starts small)."""

    name = "layernorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return LayerNorm(_checked(d_model), eps=float(self.setting("eps", EPS)))


def _checked(d_model: int) -> int:
    if d_model < 1:
        raise ValueError(f"model.d_model must be positive, not {d_model}")
    return d_model
