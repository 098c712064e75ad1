"""Normalisation layers: ``norm:rmsnorm`` and ``norm:layernorm``."""

from __future__ import annotations

from torch import nn

from apt_core.providers.norm import NormProvider

EPS = 1e-8
"""Small beside the mean square of a stream that starts small, which is under 1e-5."""


class RMSNormProvider(NormProvider):
    """``norm:rmsnorm`` (Zhang and Sennrich 2019); setting ``eps`` (1e-8: the stream
    starts small)."""

    name = "rmsnorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return nn.RMSNorm(_checked(d_model), eps=float(self.setting("eps", EPS)))


class LayerNormProvider(NormProvider):
    """``norm:layernorm`` (Ba et al. 2016), with a scale and a shift; setting ``eps`` (1e-8: the
    stream starts small)."""

    name = "layernorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return nn.LayerNorm(_checked(d_model), eps=float(self.setting("eps", EPS)))


def _checked(d_model: int) -> int:
    if d_model < 1:
        raise ValueError(f"model.d_model must be positive, not {d_model}")
    return d_model
