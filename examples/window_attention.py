"""An attention provider: every token sees itself and the ``window - 1`` tokens before it.

apt-train -p tiny_debug --plugin examples/window_attention.py --model.attention_name window
"""

from __future__ import annotations

import torch
from pydantic import Field

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section
from apt_core.modeling.layers import MHAProvider, MultiHeadAttention

PLUGIN = PluginInfo(summary="attention in a sliding window", version="2.0.0")


class Settings(Section):
    window: int = Field(default=32, ge=1, description="Tokens that each token sees, with itself.")


class WindowAttention(MultiHeadAttention):
    """Multi-head attention, with its cache and checks, that adds the mask of the window."""

    def __init__(self, d_model, num_heads, window, **options):
        super().__init__(d_model, num_heads, **options)
        self.window = window

    def attend(self, q, k, v, mask):
        places = torch.arange(k.shape[2], device=k.device)
        near = places[-q.shape[2] :, None] - places < self.window  # [T, S]
        return super().attend(q, k, v, near if mask is None else near & mask)


class WindowProvider(MHAProvider):
    """``attention:window``: supports, caches and costs what multi-head attention does."""

    name = "window"

    def __init__(self, config: Settings | None = None) -> None:
        super().__init__()
        self.window = (config or Settings()).window

    def create_layer(self, d_model, num_heads, **options):
        return WindowAttention(d_model, num_heads, self.window, **options)


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
