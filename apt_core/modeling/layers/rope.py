"""Rotary position embedding (RoFormer, Su et al. 2021): ``position:rope``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apt_core.modeling.row_decoding import Products, RowStep, takes_part
from apt_core.providers.base import read_settings
from apt_core.providers.plain import PlainRope
from apt_core.providers.position import PositionProvider, RoPEScaling, RoPESettings


class Rotary(nn.Module):
    """Turns pairs (i, i + R/2) of a width R by angles position * theta^(-2i/R), whose frequencies
    ``scaling`` changes.

    The halves are paired as in Llama, so weights move between the two without permutation.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, max_seq_len: int, theta: float, scaling: RoPEScaling | None = None
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(
                f"RoPE turns pairs, and the head width {head_dim} is odd: choose an even width "
                "(model.d_model / model.num_heads, model.mha.head_dim, model.tva.r or .rank), or "
                "another model.position_name"
            )
        if theta <= 1:
            raise ValueError(
                f"model.rope.theta: the base of the frequencies must be more than 1, not {theta}"
            )
        for key, message, remedy in scaling.faults() if scaling is not None else ():
            raise ValueError(f"{RoPEScaling.SECTION}.{key}: {message}: {remedy}")
        self.head_dim, self.max_seq_len = head_dim, max_seq_len
        self.theta, self.scaling = theta, scaling
        self._cast: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None
        self.register_buffer("cos", torch.empty(max_seq_len, 1, head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, 1, head_dim), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the tables. The first half of the sine is negated, so that rotating is a product
        with the swapped halves."""
        if self.cos.is_meta:
            return
        frequencies, gain = rotary_frequencies(self.head_dim, self.theta, self.scaling)
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * frequencies
        cos, sin = gain * angles.cos()[:, None], gain * angles.sin()[:, None]
        self.cos.copy_(torch.cat([cos, cos], dim=-1))
        self.sin.copy_(torch.cat([-sin, sin], dim=-1))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn x [B, T, H, R] by ``positions`` [T] or [B, T], by default 0..T-1.

        Raises ValueError for more than ``max_seq_len`` tokens.
        """
        length = x.shape[1]
        if length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {length} tokens is longer than model.max_seq_len "
                f"{self.max_seq_len}: shorten it or raise the setting"
            )
        cos, sin = self._tables(x.dtype)
        if positions is None:
            cos, sin = cos[:length], sin[:length]
        else:
            cos, sin = cos[positions], sin[positions]
        swapped = x.roll(self.head_dim // 2, dims=-1)
        return torch.addcmul(x * cos, swapped, sin)

    def plain(self) -> PlainRope:
        """The module itself."""
        return PlainRope(self.theta, self.scaling)

    def _tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tables as ``dtype``; cast again only if the tables or ``dtype`` have changed."""
        cos, sin = self.cos, self.sin
        if dtype == cos.dtype:
            return cos, sin
        # The compiler fuses the cast; inference tensors have no version counter.
        if torch.compiler.is_compiling() or cos.is_inference() or sin.is_inference():
            return cos.to(dtype), sin.to(dtype)
        made_of = cos, sin, dtype, cos._version, sin._version
        if self._cast is None or not _same(self._cast[0], made_of):
            # Tensors made in inference mode could not be used in autograd later.
            with torch.inference_mode(False), torch.no_grad():
                self._cast = made_of, (cos.to(dtype), sin.to(dtype))
        return self._cast[1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy may get other tables.
        return {**self.__dict__, "_cast": None}


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RoPEScaling | None = None
) -> tuple[Tensor, float]:
    """The angles by which a step of one position turns each pair, fp64 [head_dim / 2] on the CPU,
    and the factor on queries and keys; the rules are those of :class:`RoPEScaling`."""
    half = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    kept: Tensor = theta ** (-half / head_dim)
    if scaling is None:
        return kept, 1.0
    divided = kept / scaling.factor
    if scaling.type == "linear":
        return divided, 1.0
    context = scaling.original_max_seq_len
    assert context is not None
    if scaling.type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = ((context * kept / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return share * kept + (1 - share) * divided, 1.0

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # Equal ends are told apart as the paper's code does it.
    width = last - first or 0.001
    share = 1 - ((half / 2 - first) / width).clamp(0, 1)
    gain = scaling.attention_factor
    if gain is None:
        gain = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return share * kept + (1 - share) * divided, gain


class Paired(Protocol):
    """Moves the rows of a weight [heads*R, ...]: those of the first ``heads`` heads, or of all."""

    def __call__(self, weight: Tensor, heads: int | None = None) -> Tensor: ...


def paired(rotary: nn.Module, products: Products) -> Paired | None:
    """A function that brings the two places of each pair of a head next to each other, so that
    they may be turned as one complex number: of the first heads of a weight [heads*R, ...], all if
    it is None. None where that is not faster, or ``rotary`` is not a plain :class:`Rotary`."""
    plain = type(rotary) is Rotary and takes_part(rotary, "forward")
    if not plain or products.dtype is not None or rotary.cos.dtype != torch.float32:
        return None
    half = rotary.head_dim // 2

    def moved(weight: Tensor, heads: int | None = None) -> Tensor:
        end = len(weight) if heads is None else 2 * half * heads
        pairs = weight[:end].unflatten(0, (-1, 2, half)).transpose(1, 2)
        return torch.cat([pairs.flatten(0, 2), weight[end:]])

    return moved


Turn = Callable[[Tensor, RowStep], Tensor]
"""x [N, heads, R] of a step's new tokens to the same, with queries and keys turned."""


def turning(rotary: nn.Module, turned: int, products: Products, *, paired: bool) -> Turn:
    """What turns the first ``turned`` heads by the tokens' positions; those that are ``paired``
    where they stand."""
    if not paired:
        return lambda x, step: _turned_by(rotary, x, turned, step)
    return PairTurn(rotary, turned, products)


class PairTurn:
    """Turns the first ``turned`` heads as complex numbers: pairs stand next to each other."""

    def __init__(self, rotary: nn.Module, turned: int, products: Products) -> None:
        self._turned, self._width, self._half = turned, rotary.head_dim, rotary.head_dim // 2
        cos, sin = rotary.cos[..., self._half :], rotary.sin[..., self._half :]
        self.key = rotary.head_dim, rotary.theta, rotary.scaling
        self._turns = products.shared(self.key, lambda: torch.complex(cos, sin))
        self._pairs = torch.view_as_real(self._turns)

    def __call__(self, x: Tensor, step: RowStep) -> Tensor:
        shape, strides = (step.size, self._turned, self._half, 2), (x.stride(0), self._width, 2, 1)
        pairs = x.as_strided(shape, strides)
        torch.view_as_complex(pairs).mul_(step.table(self.key, self._turns))
        return x

    def by_one(self, x: Tensor, step: RowStep) -> Tensor:
        """x [N, heads, R] to the same, for the compiler, which knows no complex numbers."""
        turns = step.table((*self.key, "pairs"), self._pairs)
        pairs = x[:, : self._turned].unflatten(2, (self._half, 2))
        (a, b), (cos, sin) = pairs.unbind(3), turns.unbind(3)
        found = torch.stack([a * cos - b * sin, a * sin + b * cos], 3).flatten(2)
        return torch.cat([found, x[:, self._turned :]], 1)


def _turned_by(rotary: nn.Module, x: Tensor, turned: int, step: RowStep) -> Tensor:
    rows = x[:, :turned].unflatten(0, (step.batch, step.length))
    return torch.cat([rotary(rows, step.positions).flatten(0, 1), x[:, turned:]], dim=1)


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether the elements of both are the same objects or equal numbers."""
    return all(a is b or (type(a) is int and a == b) for a, b in zip(before, now, strict=True))


class RoPEProvider(PositionProvider):
    """``position:rope``; settings as :class:`RoPESettings`."""

    name = "rope"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(RoPESettings, config, "model.rope")

    def create_rotary(self, head_dim: int, max_seq_len: int) -> nn.Module:
        return Rotary(head_dim, max_seq_len, self.settings.theta, self.settings.scaling)
