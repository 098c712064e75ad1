"""Normalisation layers: ``norm:rmsnorm``."""

from __future__ import annotations

from torch import nn

from apt_core.providers.norm import NormProvider


class RMSNormProvider(NormProvider):
    """``norm:rmsnorm`` (Zhang and Sennrich 2019); setting ``eps`` (1e-8: the stream
    starts small)."""

    name = "rmsnorm"

    def create_layer(self, d_model: int) -> nn.Module:
        return nn.RMSNorm(d_model, eps=float(self.setting("eps", 1e-8)))
