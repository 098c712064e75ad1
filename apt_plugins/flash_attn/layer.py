"""Fused TVA on flash-attn's kernel; everything else is that of ``tva_default``."""

from __future__ import annotations

import torch
from torch import Tensor

from apt_core.modeling.layers import TVAAttention, TVAProvider
from apt_core.providers import PlainAttention

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


class FlashTVAAttention(TVAAttention):
    """:class:`TVAAttention` with the same parameters and state dict on another kernel.

    The kernel takes fp16 and bf16: other inputs are cast to bf16 and the result back. A call with
    a mask, which the kernel does not support, uses the inherited kernel. Raises RuntimeError on a
    device that is not CUDA.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return super().attend(q, k, v, mask)
        if not q.is_cuda:
            raise RuntimeError(f"flash-attn runs on CUDA devices, not on {q.device.type}")
        from flash_attn import flash_attn_func

        kernel_dtype = q.dtype if q.dtype in KERNEL_DTYPES else torch.bfloat16
        mixed = flash_attn_func(
            *(part.transpose(1, 2).to(kernel_dtype) for part in (q, k, v)),
            dropout_p=self.dropout if self.training else 0.0,
            causal=True,
            # The kernel does not ask torch whether its backward must be deterministic.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return mixed.transpose(1, 2).to(q.dtype)

    def plain(self) -> PlainAttention:
        """That of the inherited layer: another kernel computes the same."""
        return super().plain()


class FlashTVAProvider(TVAProvider):
    """``attention:flash_v2``, with the settings of ``tva_default``."""

    name = "flash_v2"
    version = "2.0.0"
    # 2.1: the causal mask ends at the last key, as cached keys need it; 2.4: a deterministic
    # backward.
    dependencies = ("flash-attn>=2.4",)
    layer_class = FlashTVAAttention
