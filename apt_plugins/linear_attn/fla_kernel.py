"""fla's kernels (flash-linear-attention), where they are installed and the tensors are on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from apt_plugins.linear_attn.delta_rule import Sizes

PACKAGE = "fla"
WIDEST = 256
"""The widest keys and values that the kernels take."""


def missing() -> str:
    """Why there are no such kernels here, in words; empty if there are."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if find_spec(PACKAGE) is None:
        return "flash-linear-attention is not installed: pip install 'apt-kernel[linear_attn]'"
    return ""


def takes(channels: Tensor, sizes: Sizes, documents: Tensor | None) -> bool:
    """Whether the kernels compute these inputs: they multiply in 16 bits, and would have to know on
    the host where documents begin."""
    narrow = channels.dtype in (torch.float16, torch.bfloat16)
    fits = max(sizes.keys, sizes.values) <= WIDEST
    return channels.is_cuda and narrow and fits and documents is None


def chunked_by_fla(
    channels: Tensor, g: Tensor, beta: Tensor, sizes: Sizes, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`apt_plugins.linear_attn.delta_rule.chunked`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (part.contiguous() for part in sizes.split(channels))
    out, last = chunk_gated_delta_rule(
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out.to(g.dtype), last
