"""The plain form of a model: the weights and numbers of a pre-norm transformer as other programs
know it. What trains in another form (compressed heads, low-rank feed-forwards) says by its
``plain()`` which of these it is equal to; exporters read nothing else.

Shapes: V token ids, D d_model, H query heads, K key and value heads, R the width of a head, F
hidden units, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apt_core.providers.position import RoPEScaling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Beyond:
    """Something in a layer or model that a plain form cannot hold.

    ``name`` is what ``--drop`` calls it, ``what`` says what it does to the model. ``drop`` takes it
    away from the model; None where a model without it would be none. What some programs have, and a
    form can say, is held by exporters that name it
    (:attr:`apt_core.providers.ExporterProvider.holds`).
    """

    name: str
    what: str
    drop: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class PlainNorm:
    """x / sqrt(mean(x²) + eps) * weight [D]."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class PlainRope:
    """Turns pairs (i, i + R/2) of queries and keys by angles position * theta^(-2i/R), whose
    frequencies ``scaling`` changes."""

    theta: float
    scaling: RoPEScaling | None = None


@dataclass(frozen=True, eq=False)
class PlainAttention:
    """softmax(q kᵀ / sqrt(R)) v per head, causal, without biases: ``q`` [H*R, D], ``k`` and ``v``
    [K*R, D], ``out`` [D, H*R].

    Each key and value head serves H/K query heads that follow each other. ``q_norm`` and
    ``k_norm``, RMSNorms [R] of every head before RoPE, are both given or both None. With a
    ``window`` a token sees itself and the ``window - 1`` tokens before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: PlainRope
    q_norm: PlainNorm | None = None
    k_norm: PlainNorm | None = None
    window: int | None = None


@dataclass(frozen=True, eq=False)
class PlainFFN:
    """(silu(x gateᵀ) * (x upᵀ)) downᵀ, with ``gate`` and ``up`` [F, D], ``down`` [D, F]."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class PlainRouter:
    """softmax(x weightᵀ), ``weight`` [E, D], of which the largest ``experts_per_token`` are the
    weights of their experts: divided by their sum where ``renormalised``, else as they are."""

    weight: Tensor
    experts_per_token: int
    renormalised: bool


@dataclass(frozen=True, eq=False)
class PlainExperts:
    """A weighted sum of E :class:`PlainFFN`: ``gate`` and ``up`` [E, F, D], ``down`` [E, D, F]."""

    router: PlainRouter
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class PlainBlock:
    """x + attention(attention_norm(x)), then x + ffn(ffn_norm(x))."""

    attention_norm: PlainNorm
    attention: PlainAttention
    ffn_norm: PlainNorm
    ffn: PlainFFN | PlainExperts


@dataclass(frozen=True)
class PlainShape:
    """The numbers of a plain model. ``d_ff`` is that of one expert where ``num_experts`` is not 0;
    ``tied``: the embedding is the projection to logits, too."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    rope: PlainRope
    norm_eps: float
    tied: bool
    qk_norm: bool
    num_experts: int = 0
    experts_per_token: int = 0
    renormalised: bool = True
    window: int | None = None


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A model in plain form: ``embedding`` [V, D], blocks, ``final_norm``, and the projection
    ``head`` [V, D] (None: the embedding). All tensors are fp32 on the CPU and contiguous; none may
    be changed.
    """

    shape: PlainShape
    embedding: Tensor
    final_norm: PlainNorm
    head: Tensor | None
    block: Callable[[int], PlainBlock]
    """Makes the block of a number, from 0; what it makes is not kept."""

    def blocks(self) -> Iterator[PlainBlock]:
        """The blocks in their order, each made when it is asked for."""
        return (self.block(number) for number in range(self.shape.num_layers))
