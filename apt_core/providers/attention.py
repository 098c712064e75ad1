"""Providers of self-attention layers (kind ``attention``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.providers.norm import NORM_EPS, Epsilon
from apt_core.providers.rank import Ranked
from apt_core.sections import Section, Size
from apt_core.types import Inactive

if TYPE_CHECKING:
    from torch import nn

    from apt_core.providers.position import PositionProvider


LEAST_NORMALISED = 16
"""The rank from which QK-norm lowers the loss; at 8 it raises it (docs/model.md has both)."""


class QKNorm:
    """What settings with ``qk_norm`` share; ``SECTION`` is where a profile has them."""

    SECTION: ClassVar[str]

    if TYPE_CHECKING:
        qk_norm: bool | None

    def without_epsilon(self) -> Iterator[Inactive]:
        """The epsilon, where nothing is normalised."""
        if self.qk_norm is False:
            key = f"{self.SECTION}.qk_norm"
            yield Inactive(f"{self.SECTION}.qk_norm_eps", f"{key} is false", (key,))


class TVASettings(QKNorm, Ranked, Section):
    """``model.tva``: the default attention, in a space of rank R."""

    SECTION: ClassVar[str] = "model.tva"
    WIDTH: ClassVar[str] = "the head dimension {} (model.d_model / model.num_heads)"
    ATTENTIONS: ClassVar[tuple[str, ...]] = ("tva_default", "flash_v2")
    """The attentions that have these settings."""

    r: Size = Field(default=2, description="Compression ratio: rank = head dimension // r.")
    s: Annotated[int, Field(ge=0, le=2**16)] = Field(
        default=0, description="Number of normal directions of the compensator; 0 leaves it out."
    )
    tau: Annotated[float, Field(ge=-1e3, le=1e3)] = Field(
        default=0.18,
        description="Shift of the compensator's threshold, in spreads of the residual.",
    )
    rank: Size | None = Field(default=None, description="The rank itself, in place of r.")
    qk_norm: bool | None = Field(
        default=None,
        description="Normalise queries and keys, per head; by default from a rank of "
        f"{LEAST_NORMALISED} on.",
    )
    qk_norm_eps: Epsilon = Field(default=NORM_EPS, description="The epsilon of qk_norm.")
    factored: bool = Field(
        default=False, description="Compute by the definition (slow; the reference for tests)."
    )

    def normalises(self, rank: int) -> bool:
        """Whether queries and keys of width ``rank`` are normalised."""
        return rank >= LEAST_NORMALISED if self.qk_norm is None else self.qk_norm

    def inactive(self, head: int) -> Iterator[Inactive]:
        """Settings that have no effect beside others, or beside heads of the width ``head``."""
        yield from self.without_ratio()
        yield from self.without_epsilon()
        if self.qk_norm is None and not self.normalises(self.rank_in(head)):
            because = f"a rank below {LEAST_NORMALISED} is not normalised by itself"
            keys = ("model.tva.qk_norm", "model.tva.r", "model.tva.rank")
            yield Inactive("model.tva.qk_norm_eps", because, keys)
        if self.s == 0:
            because = "model.tva.s is 0: there is no compensator"
            yield Inactive("model.tva.tau", because, ("model.tva.s",))


class MHASettings(QKNorm, Section):
    """``model.mha``: multi-head attention; ``num_kv_heads`` makes it grouped or multi-query."""

    SECTION: ClassVar[str] = "model.mha"

    head_dim: Size | None = Field(
        default=None, description="Width of a head; without it model.d_model / model.num_heads."
    )
    qk_norm: bool = Field(default=False, description="Normalise queries and keys, per head.")
    qk_norm_eps: Epsilon = Field(default=NORM_EPS, description="The epsilon of qk_norm.")

    def width_of(self, d_model: int, num_heads: int) -> int:
        """The width of a head of a model ``d_model`` wide with ``num_heads``."""
        return d_model // num_heads if self.head_dim is None else self.head_dim

    def inactive(self) -> Iterator[Inactive]:
        """Settings that have no effect beside others."""
        return self.without_epsilon()


class DecodingCache(Protocol):
    """What decoding needs of a layer's cache: one object a layer, made by the layer.

    What else it does is between the layer and its cache: softmax attention appends keys and values
    (:class:`apt_core.modeling.KeyValueCache`), a recurrent layer keeps its state. A cache may offer
    ``truncate(length)``, to forget what came after, ``fork()``, which gives a cache of its own with
    the same content, to continue a text in several ways, and ``nbytes``, the memory that it takes,
    which is then checked against ``kv_cache_bytes``.
    """

    @property
    def length(self) -> int:
        """How many positions the cache holds."""


@dataclass(frozen=True)
class AttentionSupport:
    """What the layers of a provider can do; the conformance checks test what is claimed.

    ``cache``: decode with a cache (the layer has ``create_cache``); ``mask``: take a mask;
    ``autocast``: run under bf16 autocast; ``compile``: no graph break under torch.compile.
    """

    cache: bool = False
    mask: bool = True
    autocast: bool = True
    compile: bool = True


class AttentionProvider(Provider, ABC):
    """Builds causal self-attention layers.

    The layer is called as ``layer(x, *, mask=None, positions=None, cache=None)`` with x [B, T, D]
    and returns [B, T, D]:

    - Position t sees positions 0..t of its own row only, with or without ``mask``.
    - ``mask``: boolean, True where attention is allowed, broadcastable to [B, H, T, S]; it narrows
      the causal rule. A position that is left with nothing to see gives finite values and
      gradients. Any other mask is a ValueError, and so is every mask where masks are not supported.
      A layer with the attribute ``takes_documents = True`` also takes, and is given for packed
      documents, int64 [B, S]: the number of each token's document, of which it sees no other; a run
      of padding has a number too. All that such a layer keeps of a text begins anew with each
      document (:mod:`apt_core.modeling.masks`).
    - ``positions``: int64 [T] or [B, T], the place of each token in its sequence; by default
      0..T-1, or from ``cache.length`` on.
    - ``cache``: what ``layer.create_cache(max_length)`` gave, a :class:`DecodingCache` for up to
      ``max_length`` tokens of texts that grow together. The layer adds what it needs of x and
      attends to all that came before: feeding a sequence in pieces gives what feeding it whole
      gives. A layer without ``create_cache``, or whose ``create_cache`` gives None, is decoded by
      computing everything anew.
    - ``layer.rows(products)``, if the layer has it, makes a function of (x, step) with a ``cache``,
      which is the same for the new tokens x [N, D] of texts of different lengths
      (:class:`apt_core.modeling.row_decoding.Rows`). Texts of layers without it are generated one
      by one; a subclass with another ``forward`` or ``create_cache`` and no ``rows`` of its own is
      one without.
    - More than ``max_seq_len`` tokens, cached ones included, are a ValueError that names
      ``model.max_seq_len``.
    - No value is read on the host, dropout acts in training alone, evaluation is deterministic, and
      all state is in the state dict; computed buffers have ``reset_buffers``.
    - The layer adds no residual and normalises nothing before or after: the block does.

    A layer may define ``init_parameter`` (see :mod:`apt_core.modeling.init`), and ``plain``, which
    says what it is to other programs (a :class:`~apt_core.providers.plain.PlainAttention`; see
    :mod:`apt_core.modeling.plain`).
    """

    supports: ClassVar[AttentionSupport] = AttentionSupport()

    @abstractmethod
    def create_layer(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_seq_len: int = 2048,
        dropout: float = 0.0,
        position: PositionProvider | None = None,
        num_kv_heads: int | None = None,
    ) -> nn.Module:
        """A new layer of width ``d_model`` with ``num_heads`` query heads.

        ``position`` gives the layer its rotary module, called as ``rotary(x [B, T, H, R],
        positions)`` (none where it is None), ``num_kv_heads``
        (default: ``num_heads``) shares key and value heads among groups of query heads.
        Raises ValueError, naming the setting and the remedy, for sizes that cannot be built
        (``model.num_heads``, ``model.num_kv_heads``).
        """

    def kv_cache_bytes(
        self,
        d_model: int,
        num_heads: int,
        num_tokens: int,
        *,
        num_kv_heads: int | None = None,
        bytes_per_value: int = 2,
    ) -> int:
        """Bytes that one layer keeps to decode one sequence of ``num_tokens`` tokens.

        The default is that of multi-head attention.
        """
        width = (num_kv_heads or num_heads) * (d_model // num_heads)
        return 2 * width * num_tokens * bytes_per_value

    def flops(
        self, d_model: int, num_heads: int, seq_len: int, *, num_kv_heads: int | None = None
    ) -> int:
        """Floating-point operations of one layer's forward for one sequence of ``seq_len`` tokens.

        A multiply-add counts as two; the full T x T score matrix is counted. The default is that
        of multi-head attention.
        """
        width = (num_kv_heads or num_heads) * (d_model // num_heads)
        projections = 4 * d_model * (d_model + width) * seq_len
        return projections + 4 * d_model * seq_len**2
