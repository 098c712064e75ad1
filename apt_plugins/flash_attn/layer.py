"""Fused TVA whose attention runs on flash-attn's kernel; everything else is ``tva_default``."""

from __future__ import annotations

import torch
from torch import Tensor

from apt_core.modeling.layers import TVAAttention, TVAProvider

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


class FlashTVAAttention(TVAAttention):
    """:class:`TVAAttention` with the same parameters and state dict on another kernel.

    The kernel takes fp16 and bf16: other inputs are cast to bf16 for it and back. A mask, which the
    kernel has no place for, goes to the inherited kernel.
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
            # torch does not know of its backward, which adds in any order unless told.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return mixed.transpose(1, 2).to(q.dtype)


class FlashTVAProvider(TVAProvider):
    """``attention:flash_v2``; settings as those of ``tva_default``."""

    name = "flash_v2"
    version = "2.0.0"
    # Since 2.1 the last query sees every key, however many come from a cache; since 2.4 the
    # backward may be deterministic.
    dependencies = ("flash-attn>=2.4",)
    layer_class = FlashTVAAttention
