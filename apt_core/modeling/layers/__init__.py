"""The core's layers and their providers."""

from apt_core.modeling.layers.attention_tva import TVAAttention, TVAProvider, TVASettings
from apt_core.modeling.layers.ffn import SwiGLU, SwiGLUProvider
from apt_core.modeling.layers.norm import RMSNormProvider
from apt_core.modeling.layers.rope import RoPEProvider, Rotary

__all__ = [
    "RMSNormProvider",
    "RoPEProvider",
    "Rotary",
    "SwiGLU",
    "SwiGLUProvider",
    "TVAAttention",
    "TVAProvider",
    "TVASettings",
]
