"""Emulates a GPU's operators for fake tensors on the CPU, to count the memory of a run on a GPU.

Autograd needs a driver even for fake tensors on a GPU; without one it aborts the process. So the
tensors stay on the CPU, and operators that differ on a GPU are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

HALF = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
FLASH_WIDTH = 256
"""The largest head width of the flash kernel, which pads it to a multiple of 8."""
EFFICIENT_MASK = 16
"""The efficient kernel reads rows of a mask whose length is a multiple of this."""

IN_FP32 = {
    *("exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "softplus"),
    *("pow", "__pow__", "__rpow__", "layer_norm", "group_norm", "rms_norm", "norm", "renorm"),
    *("cosine_similarity", "dist", "cdist", "logsumexp", "cross_entropy", "nll_loss", "kl_div"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cosine_embedding_loss"),
    "binary_cross_entropy_with_logits",
}
"""Names of functions that autocast computes in fp32 on a GPU, but not on a CPU."""

TO_FP32 = {"prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"}
"""As :data:`IN_FP32`, for functions that convert to fp32 inside the kernel."""


class GPUOperators(TorchFunctionMode):
    """While it is active, CPU tensors report ``is_cuda``, and attention, dropout, RMS norms and
    autocast save what they save on a GPU of compute ``capability``. For fake tensors only: values
    are not computed.

    A layer that asks for ``device.type`` still sees a CPU.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self._capability = capability
        self._instead: dict[Any, Callable[..., Any]] = {
            Tensor.is_cuda.__get__: lambda tensor: True,
            Tensor.is_cpu.__get__: lambda tensor: False,
            F.scaled_dot_product_attention: self._attention,
            F.dropout: _dropout,
            torch.dropout: lambda input, p, train: _dropout(input, p, train),
            F.rms_norm: _rms_norm,
            torch.rms_norm: _rms_norm,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in IN_FP32:
                args = [_widened(value) for value in args]
                kwargs = {key: _widened(value) for key, value in kwargs.items()}
            elif name in TO_FP32 and args and _is_half(args[0]) and not _types(args, kwargs):
                kwargs = {**kwargs, "dtype": torch.float32}
        return self._instead.get(func, func)(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Call the attention kernel that torch would choose on a GPU."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (part.to(dtype) for part in (query, key, value))
        width, half = query.shape[-1], query.dtype in HALF
        alike = query.ndim == 4 and width == value.shape[-1]
        if (
            alike
            and half
            and attn_mask is None
            and width <= FLASH_WIDTH
            and self._capability >= FLASH_CAPABILITY
        ):
            padding = -width % 8
            parts = (F.pad(p, (0, padding)) if padding else p for p in (query, key, value))
            out = aten._scaled_dot_product_flash_attention(
                *parts, dropout_p, is_causal, False, scale=scale
            )[0]
            return out[..., :width]
        groups = enable_gqa and query.shape[-3] != key.shape[-3]
        aligned = width % (8 if half else 4) == 0
        if alike and aligned and not groups and (half or query.dtype == torch.float32):
            bias = None if attn_mask is None else _bias(attn_mask, query, key)
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, dropout_p, is_causal, scale=scale
            )[0]
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


def _types(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.dtype]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _widened(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """``mask``, boolean or additive, as the additive mask [B, H, T, S] of the efficient kernel."""
    length = key.shape[-2]
    added = mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=query.dtype)
    if length % EFFICIENT_MASK and added.shape[-1] == length:
        added = F.pad(added, (0, -length % EFFICIENT_MASK))[..., :length]
    return added.expand(*query.shape[:-1], length)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that saves one boolean per element."""
    if inplace or not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RMSNorm.apply(input, len(normalized_shape), weight)


class _RMSNorm(torch.autograd.Function):
    """RMS norm that saves its input and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, weight: Tensor | None) -> Tensor:
        rows = x.shape[: x.ndim - dims]
        ctx.save_for_backward(x, weight, x.new_empty(*rows, *[1] * dims, dtype=torch.float32))
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        return torch.empty_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, None if weight is None else torch.empty_like(weight)
