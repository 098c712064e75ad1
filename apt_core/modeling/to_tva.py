"""Turns multi-head attention into TVA of a lower rank, by singular value decompositions.

Fused, TVA is multi-head attention with heads R wide, so that per key head two pairs of matrices are
sought, for the heads of its group together; V and U are then orthonormal and the matrices of the
heads are made so that V W and W_o U are what was found.

- Values and output: W_o W_v, a matrix of rank d_h, is replaced by one of rank R. What is minimised
  is the mean square of the change of the group's output, were every token attended to alone.
- Queries and keys: RoPE turns pair j by the frequency f_j. TVA's R/2 pairs have frequencies of
  their own; each takes the pairs of the head whose frequencies are nearest, and is the best single
  pair in their place. What is minimised is the mean square of the change of their part of a score,
  over pairs of tokens and over distances up to the context. Seen as complex numbers, a score is
  Re sum_j (a_j x_m) conj(b_j x_n) exp(i f_j (m - n)): of sum_j c_j a_j conj(b_j), with c_j the mean
  of exp(i (f_j - f) (m - n)) over distances, the largest singular value is kept.

Where R = d_h nothing is lost, and nothing needs to be sought: with V and U drawn, Vᵀ W and W_o Uᵀ
give W and W_o back.

Tokens count by the second moment C = E[x xᵀ] of what the attention reads: x is written as C^½ z.
With QK-norm, whose mean goes over a whole head, queries and keys count as divided by the root of
their mean square, and the learned scales become one number a layer.

Shapes: D d_model, H query heads, K key heads, G = H/K, d_h the width of a head, R the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_core.modeling.init import generator_for, orthonormal_
from apt_core.modeling.layers.rope import rotary_frequencies
from apt_core.providers.position import RoPESettings

MINIMISED = (
    "per layer and key head: the mean square of the change of the output of W_o W_v, and of each "
    "pair's part of the scores over distances up to the context, both by the second moment of the "
    "layer's inputs"
)
RIDGE = 1e-4
"""Of the mean variance, added to every direction: those that the sample has not seen count a
little."""


@dataclass(frozen=True)
class Heads:
    """The sizes of an attention, with its RoPE; ``context`` is the longest distance of tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RoPESettings
    context: int


@dataclass(frozen=True)
class Converted:
    """The parameters of a TVA layer by name, and the shares of the squares that were lost."""

    parameters: Mapping[str, Tensor]
    scores_lost: float
    values_lost: float


@torch.no_grad()
def converted(
    qkv: Tensor,
    out: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    moment: Tensor,
    heads: Heads,
    rank: int,
    *,
    width: int,
    seed: int,
    name: str,
) -> Converted:
    """TVA of ``rank`` for attention of ``qkv`` [(H + 2K)*d_h, D] and ``out`` [D, H*d_h].

    ``norms`` are the scales of QK-norm [d_h], ``moment`` [D, D] is C, ``width`` D/H, which TVA's
    heads have before they are compressed; V and U are drawn by ``seed`` and ``name``.
    """
    h, k, d = heads.num_heads, heads.num_kv_heads, heads.head_dim
    wide = torch.float64
    queries, keys, values = qkv.to(wide).split([h * d, k * d, k * d])
    queries, keys = queries.unflatten(0, (h, d)), keys.unflatten(0, (k, d))
    values, outs = values.unflatten(0, (k, d)), out.to(wide).unflatten(1, (h, d)).movedim(1, 0)
    root, inverse = _roots(moment.to(wide))
    if norms is not None:
        queries = _normalised(queries, norms[0].to(wide), root)
        keys = _normalised(keys, norms[1].to(wide), root)
    new_q, new_k, scores = _scores(queries, keys, root, inverse, heads, rank)
    new_v, new_out, lost = _values(values, outs, root, inverse, rank)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    compress, lift = drawn(rank, width, seed, name, dtype)
    packed = torch.cat([new_q, new_k, new_v])  # [N, R, D]
    parameters = {
        "qkv_weight": (compress.to(wide).T @ packed).flatten(0, 1).float(),
        "out_weight": (new_out.movedim(0, 1) @ lift.to(wide).T).flatten(1).float(),
        "compress": compress,
        "lift": lift,
    }
    if norms is not None:
        for part, found in (("q_norm", new_q), ("k_norm", new_k)):
            size = (found @ root).square().sum((1, 2)).mean() / rank
            parameters[f"{part}.weight"] = torch.full((rank,), float(size.sqrt()))
    return Converted(parameters, scores, lost)


def drawn(rank: int, width: int, seed: int, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """V [R, ``width``] and U [``width``, R] of a new TVA layer that is called ``name``, whose
    parameters have this ``dtype``."""
    compress = torch.empty(rank, width, dtype=dtype, device="cpu")
    lift = torch.empty(width, rank, dtype=dtype, device="cpu")
    for matrix, part in ((compress, "compress"), (lift, "lift")):
        orthonormal_(matrix, generator_for(seed, f"{name}.{part}"))
    return compress, lift


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and its inverse."""
    size, floor = len(moment), moment.diagonal().mean() * RIDGE
    sizes, directions = torch.linalg.eigh(moment + floor * torch.eye(size, dtype=moment.dtype))
    roots = sizes.clamp_min(floor).sqrt()
    return (directions * roots) @ directions.T, (directions / roots) @ directions.T


def _normalised(rows: Tensor, scale: Tensor, root: Tensor) -> Tensor:
    """Queries or keys [H, d_h, D] divided by the root of their mean square, and scaled."""
    size = (rows @ root).square().sum((1, 2), keepdim=True) / rows.shape[1]
    return rows / size.sqrt() * scale[:, None]


def _scores(
    queries: Tensor, keys: Tensor, root: Tensor, inverse: Tensor, heads: Heads, rank: int
) -> tuple[Tensor, Tensor, float]:
    """Queries [H, R, D] and keys [K, R, D] for [H, d_h, D] and [K, d_h, D], and the share of the
    square of scores that is lost."""
    half, group = heads.head_dim // 2, heads.num_heads // heads.num_kv_heads
    rope = heads.rope
    old, _ = rotary_frequencies(heads.head_dim, rope.theta, rope.scaling)
    new, _ = rotary_frequencies(rank, rope.theta, rope.scaling)
    taken_by = (old.log()[:, None] - new.log()).abs().argmin(1)
    distances = torch.arange(heads.context, dtype=torch.float64)
    # Scores are divided by the root of the width, which is another one.
    factor = (rank / heads.head_dim) ** 0.25
    queries, keys = queries @ (factor * root), keys @ (factor * root)
    a = torch.complex(queries[:, :half], queries[:, half:])
    b = torch.complex(keys[:, :half], keys[:, half:])
    found_q = torch.zeros(heads.num_heads, rank // 2, a.shape[2], dtype=a.dtype)
    found_k = torch.zeros(heads.num_kv_heads, rank // 2, a.shape[2], dtype=a.dtype)
    kept = total = 0.0
    for pair in range(rank // 2):
        pairs = (taken_by == pair).nonzero().flatten()
        if not len(pairs):
            continue
        apart = (old[pairs] - new[pair])[:, None] * distances
        shares = torch.polar(torch.ones_like(apart), apart).mean(1)
        for key in range(heads.num_kv_heads):
            own = slice(key * group, (key + 1) * group)
            left = a[own][:, pairs].movedim(1, 0).flatten(1).T  # [G*D, n]
            right = b[key, pairs].conj()  # [n, D]
            total += float(_cross(left, right, old[pairs], distances))
            q_basis, r_left = torch.linalg.qr(left * shares)
            k_basis, r_right = torch.linalg.qr(right.mH)
            u, sizes, vh = torch.linalg.svd(r_left @ r_right.mH)
            kept += float(sizes[0].square())
            size = sizes[0].sqrt()
            best_q = (q_basis @ u[:, 0] * size).unflatten(0, (group, -1))  # [G, D]
            found_q[own, pair] = best_q
            found_k[key, pair] = k_basis @ vh[0].conj() * size
    lost = 1 - kept / total if total else 0.0
    return (
        torch.cat([found_q.real, found_q.imag], 1) @ inverse,
        torch.cat([found_k.real, found_k.imag], 1) @ inverse,
        lost,
    )


def _cross(left: Tensor, right: Tensor, frequencies: Tensor, distances: Tensor) -> Tensor:
    """The mean over distances of the square of sum_j left_j right_j exp(i f_j distance)."""
    apart = (frequencies[:, None] - frequencies)[..., None] * distances
    shares = torch.polar(torch.ones_like(apart), apart).mean(-1)
    # <left_i right_i, left_j right_j> = (left_iᴴ left_j)(right_j right_iᴴ)
    products = (left.mH @ left) * (right.conj() @ right.T)
    return (products * shares.mT).sum().real


def _values(
    values: Tensor, outs: Tensor, root: Tensor, inverse: Tensor, rank: int
) -> tuple[Tensor, Tensor, float]:
    """Values [K, R, D] and outputs [H, D, R] for [K, d_h, D] and [H, D, d_h], and the share of the
    square that is lost."""
    group = len(outs) // len(values)
    new_values, new_outs, kept, total = [], [], 0.0, 0.0
    for key, value in enumerate(values):
        stacked = outs[key * group : (key + 1) * group].flatten(0, 1)  # [G*D, d_h]
        basis, rest = torch.linalg.qr(stacked)
        u, sizes, vh = torch.linalg.svd(rest @ value @ root, full_matrices=False)
        scale = sizes[:rank].sqrt()
        new_outs.append((basis @ u[:, :rank] * scale).unflatten(0, (group, -1)))
        new_values.append(scale[:, None] * vh[:rank] @ inverse)
        kept += float(sizes[:rank].square().sum())
        total += float(sizes.square().sum())
    return torch.stack(new_values), torch.cat(new_outs), 1 - kept / total if total else 0.0
