"""An attention provider: every token sees itself and the ``window - 1`` tokens before it.

apt-train -p tiny_debug --plugin examples/window_attention.py --model.attention_name window
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section
from apt_core.modeling.layers import TVAProvider

PLUGIN = PluginInfo(summary="attention in a sliding window", version="1.0.0")


class Settings(Section):
    window: int = Field(default=32, ge=1, description="Tokens that each token sees.")


class WindowAttention(nn.Module):
    def __init__(self, inner: nn.Module, window: int) -> None:
        super().__init__()
        self.inner, self.window = inner, window

    def forward(self, x, *, mask=None, positions=None, cache=None):
        held = 0 if cache is None else cache.length
        keys = torch.arange(held + x.shape[1], device=x.device)
        near = keys[held:, None] - keys < self.window
        mask = near if mask is None else mask & near
        return self.inner(x, mask=mask, positions=positions, cache=cache)


class WindowProvider(TVAProvider):
    """``attention:window``: multi-head attention (TVA at full rank) behind a mask."""

    name = "window"

    def __init__(self, config: Settings | None = None) -> None:
        super().__init__({"r": 1, "s": 0})
        self.window = (config or Settings()).window

    def create_layer(self, d_model, num_heads, **options):
        return WindowAttention(super().create_layer(d_model, num_heads, **options), self.window)


@hookimpl
def apt_register_config():
    return [SectionSpec("window_attention", Settings)]


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec(
            kind="attention",
            name="window",
            factory=WindowProvider,
            version=PLUGIN.version,
            summary=PLUGIN.summary,
            config=Settings,
            section="window_attention",
        )
    ]
