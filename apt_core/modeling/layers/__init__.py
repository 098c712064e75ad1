"""The core's layers and their providers."""

from apt_core.modeling.layers.attention import (
    SelfAttention,
    check_heads,
    check_mask,
)
from apt_core.modeling.layers.attention_mha import MHAProvider, MultiHeadAttention
from apt_core.modeling.layers.attention_tva import TVAAttention, TVAProvider
from apt_core.modeling.layers.ffn import (
    GELU,
    FeedForward,
    GELUProvider,
    SquaredReLU,
    SquaredReLUProvider,
    SwiGLU,
    SwiGLUProvider,
)
from apt_core.modeling.layers.learned import LearnedPosition, LearnedPositionProvider
from apt_core.modeling.layers.norm import LayerNormProvider, RMSNormProvider
from apt_core.modeling.layers.rope import RoPEProvider, Rotary
from apt_core.modeling.layers.vft import VFT, VFTProvider

__all__ = [
    "GELU",
    "VFT",
    "FeedForward",
    "GELUProvider",
    "LayerNormProvider",
    "LearnedPosition",
    "LearnedPositionProvider",
    "MHAProvider",
    "MultiHeadAttention",
    "RMSNormProvider",
    "RoPEProvider",
    "Rotary",
    "SelfAttention",
    "SquaredReLU",
    "SquaredReLUProvider",
    "SwiGLU",
    "SwiGLUProvider",
    "TVAAttention",
    "TVAProvider",
    "VFTProvider",
    "check_heads",
    "check_mask",
]
