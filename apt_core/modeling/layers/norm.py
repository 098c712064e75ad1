"""Normalisation layers: ``norm:rmsnorm`` and ``norm:layernorm``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resized
from apt_core.modeling.row_decoding import Function, Products
from apt_core.providers.base import read_settings
from apt_core.providers.norm import NormProvider, NormSettings
from apt_core.providers.plain import PlainNorm


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
        eps = torch.finfo(weight.dtype).eps if self.eps is None else self.eps
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return lambda x: F.rms_norm(x, shape, _as_wide(weight, x), eps)
        least, scale = torch.tensor(math.sqrt(size * eps)), weight.detach() * math.sqrt(size)
        vector_norm, hypot = torch.linalg.vector_norm, torch.hypot

        # Half the time of F.rms_norm for a few tokens on a CPU, where that is not fused:
        # x / sqrt(mean(x²) + eps) = x sqrt(size) / hypot(|x|, sqrt(size eps)).
        def normalized(x: Tensor) -> Tensor:
            return (x / hypot(vector_norm(x, dim=-1, keepdim=True), least)).mul_(scale)

        return normalized

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on a larger ``sizes.d_model``. Zeros in the new places make the mean square smaller
        by the ratio of the widths: eps follows it, and the weight takes up its root."""
        weight = self.get_parameter("weight")
        width = sizes.d_model or weight.numel()
        share = weight.numel() / width
        if self.eps is None:
            raise ValueError("its eps is that of the dtype, and would have to be another: give one")
        self.weight, self.normalized_shape = resized(weight, width), (width,)
        self.eps *= share
        return {"weight": Larger({0: "mean"}, scale=math.sqrt(share))}

    def plain(self) -> PlainNorm:
        """The layer itself."""
        eps = torch.finfo(self.weight.dtype).eps if self.eps is None else self.eps
        return PlainNorm(self.weight, eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm whose parameters may have a narrower dtype than the input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _as_wide(self.weight, x), _as_wide(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Raises ValueError: zeros in new places would move the mean that is subtracted."""
        raise ValueError(
            "LayerNorm subtracts the mean of the stream, which new places would change: only "
            "model.norm_name rmsnorm grows"
        )

    def decoding(self, products: Products) -> Function:
        """The layer as a function of x [N, D], for many calls with the same weights."""
        return self.forward


class _WithEpsilon(NormProvider):
    """A norm with the settings :class:`NormSettings`."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(NormSettings, config, "model.norm")


class RMSNormProvider(_WithEpsilon):
    """``norm:rmsnorm`` (Zhang and Sennrich 2019); settings as :class:`NormSettings`."""

    name = "rmsnorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return RMSNorm(_checked(d_model), eps=self.settings.eps)


class LayerNormProvider(_WithEpsilon):
    """``norm:layernorm`` (Ba et al. 2016), with a scale and a shift; settings as
    :class:`NormSettings`."""

    name = "layernorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return LayerNorm(_checked(d_model), eps=self.settings.eps)


def _checked(d_model: int) -> int:
    if d_model < 1:
        raise ValueError(f"model.d_model must be positive, not {d_model}")
    return d_model
