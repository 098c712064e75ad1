"""Probes whether a layer works on a device by one tiny forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from apt_core.modeling.init import construction_rng, initialize_parameters


def probe_layer(
    provider: Any,
    kind: str,
    *,
    device: str | torch.device = "cpu",
    head_dim: int = 32,
    position: Any = None,
) -> str | None:
    """None if the layers of ``provider`` run on ``device``, otherwise the reason in one line.

    ``kind`` is attention, ffn or norm. The layer has two heads of ``head_dim`` (give the profile's
    own, since a ratio or a kernel may not suit every width) and gets fp32 input [2, 8, D]. Global
    generators are not changed. A ValueError of ``create_layer`` is ignored: it is about the sizes
    of the probe, and the profile's sizes are checked when the model is built.
    """
    if kind not in ("attention", "ffn", "norm"):
        raise ValueError(f"a provider of kind {kind!r} cannot be probed")
    d_model = 2 * head_dim
    try:
        with construction_rng(0, "probe"), torch.enable_grad():
            try:
                layer = _tiny(provider, kind, d_model, position)
            except ValueError:
                return None
            initialize_parameters(layer, seed=0)
            layer.to(device)
            x = torch.randn(2, 8, d_model).to(device).requires_grad_()
            y = layer(x, mask=None, positions=None, cache=None) if kind == "attention" else layer(x)
            if y.shape != x.shape:
                return f"its layer maps {tuple(x.shape)} to {tuple(y.shape)}"
            y.square().mean().backward()
            if x.grad is None:
                return "no gradient reaches the input of its layer"
            if not (torch.isfinite(y).all() and torch.isfinite(x.grad).all()):
                return "its layer gives values that are not finite"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _tiny(provider: Any, kind: str, d_model: int, position: Any) -> nn.Module:
    if kind == "attention":
        built = provider.create_layer(d_model, 2, max_seq_len=8, position=position)
    elif kind == "ffn":
        built = provider.create_layer(d_model, 2 * d_model)
    else:
        built = provider.create_layer(d_model)
    if not isinstance(built, nn.Module):
        raise TypeError(f"create_layer returned {type(built).__name__}, not an nn.Module")
    return built
