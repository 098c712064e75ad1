"""The gated delta rule, step by step and in chunks.

A head keeps a state S [K, V], which maps keys to values. A token writes its value v [V] in the
place of what the state has for its key k [K], as far as β in [0, 1] says (the delta rule), after
all that is older has faded by e^g, g <= 0 (Yang, Kautz & Hatamizadeh, arXiv:2412.06464):

    S_t = e^{g_t} (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,    o_t = S_tᵀ q_t / sqrt(K)

q and k are normalised to length 1. Within a chunk of C tokens that begins with state S, and G_i the
sum of g up to its token i, what the tokens write comes from a triangular system (the WY form of
Yang et al., arXiv:2406.06484):

    A_ij = β_i (k_i·k_j) e^{G_i - G_j}  for j < i,    T = (I + A)^-1
    W = T [β e^G k],  U = T [β v],    R = U - W S     (rows: what each token writes)
    O = [e^G q] S + tril[(q kᵀ) e^{G_i - G_j}] R
    S' = M S + Bᵀ U,    B = [e^{G_C - G} k],    M = e^{G_C} I - Bᵀ W

so that only S' = M S + ..., one product a chunk, is computed in turn, and all else at once.

Shapes: B rows, T tokens, H heads, K width of a key, V of a value, N chunks of C tokens. States are
in fp32, or in fp64 for inputs in fp64, and so is all that is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Added to the squared length of queries and keys before they are normalised."""


class Sizes(NamedTuple):
    """The number of heads H and the widths K of a key and V of a value, whose channels
    [..., F], F = H (2K + V), are the queries of all heads, then their keys, then their values."""

    heads: int
    keys: int
    values: int

    @property
    def channels(self) -> int:
        """F."""
        return self.heads * (2 * self.keys + self.values)

    def split(self, channels: Tensor) -> list[Tensor]:
        """Views q, k [..., H, K] and v [..., H, V] of channels [..., F]."""
        widths = [self.heads * width for width in (self.keys, self.keys, self.values)]
        return [part.unflatten(-1, (self.heads, -1)) for part in channels.split(widths, -1)]


def unit(x: Tensor) -> Tensor:
    """``x`` [..., K] with vectors of length 1."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for inputs of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def stepped(
    channels: Tensor, g: Tensor, beta: Tensor, sizes: Sizes, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule token by token: o [B, T, H, V] and the state [B, H, K, V] after the last token.

    ``channels`` [B, T, F] are those of ``sizes``, g and beta [B, T, H], ``state`` [B, H, K, V] is
    that before the first token.
    """
    q, k, v = sizes.split(channels.to(wide(channels.dtype)))
    q, k = unit(q) * sizes.keys**-0.5, unit(k)
    decay, beta = g.to(q.dtype).exp(), beta.to(q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        held = k[:, t, :, None] @ state
        written = (v[:, t, :, None] - held) * beta[:, t, :, None, None]
        state = state + k[:, t, :, :, None] * written
        outputs.append(q[:, t, :, None] @ state)
    return torch.cat(outputs, 2).transpose(1, 2), state


def chunked(
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    sizes: Sizes,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The rule in chunks of ``chunk`` tokens, with a backward of its own; as :func:`stepped`.

    ``state`` is that before the first token, zeros without it. ``documents`` int64 [B, T] counts
    the documents that have begun, up to each token: the state begins anew with each, and where the
    count is 0 the text goes on from ``state``.
    """
    chunk = min(chunk, channels.shape[1])
    out, last, *_ = torch.ops.apt.gated_delta_rule(
        channels, g, beta, state, documents, sizes, chunk
    )
    return out, last


BLOCK = 2**18
"""Elements of a matrix of all chunks that are computed together on a CPU: all that is computed of
them stays in its caches, in memory that is used again."""


class _Decays(NamedTuple):
    """What is left of things after others, as factors: ``between`` two tokens of a chunk
    [M, C, C], 0 above the diagonal; from its beginning ``to_token`` [M, C, 1] and over the
    ``whole`` of it [M]; from a token ``to_end`` [M, C, 1]. 0 where a document begins in between."""

    between: Tensor
    to_token: Tensor
    to_end: Tensor
    whole: Tensor


class _Block(NamedTuple):
    """Tokens ``first`` to ``last`` of B rows, in N chunks of C tokens a row: M = N*B*H chunks of
    one head stand one after the other, so that those at one place of all texts are a slice."""

    rows: int
    heads: int
    chunk: int
    first: int
    last: int

    @property
    def places(self) -> slice:
        """Where its chunks stand among those of a row."""
        return slice(self.first // self.chunk, -(-self.last // self.chunk))

    def inside(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of x [B, T, H, ...] what is here as [M, C, ...], filled up with zeros: a copy."""
        x = x[:, self.first : self.last].to(dtype)
        missing = -x.shape[1] % self.chunk
        if missing:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        x = x.unflatten(1, (-1, self.chunk)).transpose(0, 1).transpose(2, 3)
        return x.clone(memory_format=torch.contiguous_format).flatten(0, 2)

    def write(self, to: Tensor, x: Tensor) -> None:
        """Copy x [M, C, ...] to its place in ``to`` [B, T, H, ...]."""
        x = x.unflatten(0, (-1, self.rows, self.heads)).transpose(2, 3).transpose(0, 1)
        to[:, self.first : self.last] = x.flatten(1, 2)[:, : self.last - self.first]

    def by_place(self, x: Tensor) -> Tensor:
        """x [M, ...] as a view [N, B*H, ...]."""
        return x.unflatten(0, (-1, self.rows * self.heads))

    def decays(self, g: Tensor, documents: Tensor | None) -> _Decays:
        """The decays of log gates g [M, C] and counted ``documents`` [B, T]."""
        total = g.cumsum(-1)
        last = total[:, -1:]
        places = torch.arange(self.chunk, device=g.device)
        hidden = places > places[:, None]
        to_token, to_end = total.exp(), (last - total).exp_()
        if documents is not None:
            count, before = self.counts(documents)
            hidden = self._of_heads(hidden | (count[..., None] != count[..., None, :]))
            to_token = to_token.masked_fill_(self._of_heads(count != before[..., None]), 0.0)
            to_end = to_end.masked_fill_(self._of_heads(count != count[..., -1:]), 0.0)
        between = total[:, :, None] - total[:, None, :]
        # Masked before exp, which would overflow above the diagonal.
        between = between.masked_fill_(hidden, float("-inf")).exp_()
        return _Decays(between, to_token[..., None], to_end[..., None], to_token[:, -1])

    def counts(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """The counts of ``documents`` [B, T] here [N, B, C], what fills up being of the last, and
        those before each chunk [N, B]."""
        count = documents[:, self.first : self.last]
        missing = -count.shape[1] % self.chunk
        count = torch.cat([count, count[:, -1:].expand(-1, missing)], 1)
        count = count.unflatten(1, (-1, self.chunk)).transpose(0, 1)
        first = documents[:, self.first - 1] if self.first else torch.zeros_like(documents[:, 0])
        return count, torch.cat([first[None], count[:-1, :, -1]])

    def sums_to_end(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """For each token, the sum of x [M, C] from it to the end of the chunk, or of its document
        in it."""
        if documents is None:
            return x.flip(-1).cumsum_(-1).flip(-1)
        # Sums over other documents, which are 0, would be so up to rounding alone.
        count, _ = self.counts(documents)
        of_same = (count[..., :, None] == count[..., None, :]).tril_().to(x.dtype)
        return (x.unflatten(0, (-1, self.rows, self.heads)) @ of_same).flatten(0, 2)

    def _of_heads(self, x: Tensor) -> Tensor:
        """x [N, B, ...] as [M, ...], the same for all heads."""
        x = x[:, :, None]
        return x.expand(-1, -1, self.heads, *x.shape[3:]).flatten(0, 2)


def _blocks(channels: Tensor, sizes: Sizes, chunk: int) -> list[_Block]:
    rows, length, _ = channels.shape
    places = -(-length // chunk)
    if channels.device.type == "cpu":
        widest = max(chunk, sizes.keys, sizes.values)
        places = max(1, BLOCK // (rows * sizes.heads * chunk * widest))
    step = places * chunk
    return [
        _Block(rows, sizes.heads, chunk, first, min(first + step, length))
        for first in range(0, length, step)
    ]


def _normed(x: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """x [M, C, K] with its vectors scaled to length ``size``, in place, and the factors."""
    factor = (x.square().sum(-1, keepdim=True) + EPS).rsqrt_().mul_(size)
    return x.mul_(factor), factor


def _normed_backward(grad: Tensor, y: Tensor, factor: Tensor, size: float) -> Tensor:
    """The gradient of x for y of :func:`_normed`; writes to ``grad``."""
    along = (grad * y).sum(-1, keepdim=True).mul_(size**-2)
    return grad.addcmul_(y, along, value=-1).mul_(factor)


class _Inputs(NamedTuple):
    """What a block is computed of, [M, C, ...]; queries and keys are normalised by factors."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    q_factor: Tensor
    k_factor: Tensor


def _inputs(at: _Block, channels: Tensor, g: Tensor, beta: Tensor, sizes: Sizes) -> _Inputs:
    dtype = wide(channels.dtype)
    q, k, v = (at.inside(part, dtype) for part in sizes.split(channels))
    q, q_factor = _normed(q, sizes.keys**-0.5)
    k, k_factor = _normed(k, 1.0)
    g, beta = at.inside(g, dtype), at.inside(beta, dtype)[..., None]
    return _Inputs(q, k, v, g, beta, q_factor, k_factor)


# As operators of torch's library, which torch.compile takes as they are: it would unroll the loops
# over all chunks.


@torch.library.custom_op(
    "apt::gated_delta_rule",
    mutates_args=(),
    schema="(Tensor channels, Tensor g, Tensor beta, Tensor? state, Tensor? documents, "
    "int[] sizes, int chunk) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _rule(
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    sizes: Sequence[int],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, the states before each chunk [N, B*H, K, V] and T [N, B*H, C, C]."""
    with torch.autocast(channels.device.type, enabled=False):
        return _forward(channels, g, beta, state, documents, Sizes(*sizes), chunk)


def _made(channels: Tensor, sizes: Sizes, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what the rule gives."""
    rows, length, _ = channels.shape
    places, dtype = -(-length // chunk), wide(channels.dtype)
    return (
        channels.new_empty((rows, length, sizes.heads, sizes.values), dtype=dtype),
        channels.new_empty((rows, *sizes), dtype=dtype),
        channels.new_empty((places, rows * sizes.heads, *sizes[1:]), dtype=dtype),
        channels.new_empty((places, rows * sizes.heads, chunk, chunk), dtype=dtype),
    )


@_rule.register_fake
def _(
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    sizes: Sequence[int],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _made(channels, Sizes(*sizes), chunk)


def _forward(
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    sizes: Sizes,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, last, states, inverses = _made(channels, sizes, chunk)
    now = last.flatten(0, 1)
    if state is None:
        now.zero_()
    else:
        now.copy_(state.flatten(0, 1))
    for at in _blocks(channels, sizes, chunk):
        q, k, v, gates, strength, *_ = _inputs(at, channels, g, beta, sizes)
        decays = at.decays(gates, documents)
        inverse = _inverse(torch.bmm(k, k.mT).mul_(decays.between).mul_(strength))
        inverses[at.places] = at.by_place(inverse)
        w = inverse @ (k * decays.to_token).mul_(strength)
        u = inverse @ v.mul_(strength)
        ends = k * decays.to_end
        kept, added = at.by_place(_kept(ends, w, decays)), at.by_place(ends.mT @ u)
        for n, held in enumerate(states[at.places]):
            held.copy_(now)
            now = added[n].baddbmm_(kept[n], now)
        held = states[at.places].flatten(0, 1)
        written = u.baddbmm_(w, held, alpha=-1)
        seen = torch.bmm(q, k.mT).mul_(decays.between)
        at.write(out, torch.bmm(seen, written).baddbmm_(q.mul_(decays.to_token), held))
    last.copy_(now.view_as(last))
    return out, last, states, inverses


@torch.library.custom_op(
    "apt::gated_delta_rule_backward",
    mutates_args=(),
    schema="(Tensor? d_out, Tensor? d_last, Tensor channels, Tensor g, Tensor beta, "
    "Tensor? documents, Tensor states, Tensor inverses, int[] sizes) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _rule_backward(
    d_out: Tensor | None,
    d_last: Tensor | None,
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of channels, g, beta and the first state."""
    with torch.autocast(channels.device.type, enabled=False):
        return _backward(
            d_out, d_last, channels, g, beta, documents, states, inverses, Sizes(*sizes)
        )


@_rule_backward.register_fake
def _(
    d_out: Tensor | None,
    d_last: Tensor | None,
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_like(channels, g, beta), states.new_empty((len(channels), *sizes))


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _backward(
    d_out: Tensor | None,
    d_last: Tensor | None,
    channels: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    states: Tensor,
    inverses: Tensor,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_channels, d_g, d_beta = _like(channels, g, beta)
    d_qkv = sizes.split(d_channels)
    d_state = torch.zeros_like(states[0]) if d_last is None else d_last.flatten(0, 1)
    for at in reversed(_blocks(channels, sizes, inverses.shape[-1])):
        inputs = _inputs(at, channels, g, beta, sizes)
        found, d_state = _block_backward(
            at,
            inputs,
            at.decays(inputs.g, documents),
            documents,
            inverses[at.places].flatten(0, 1),
            states[at.places].flatten(0, 1),
            torch.zeros_like(inputs.v) if d_out is None else at.inside(d_out, inputs.v.dtype),
            d_state,
        )
        for grad, part in zip((*d_qkv, d_g, d_beta), found, strict=True):
            at.write(grad, part)
    return d_channels, d_g, d_beta, d_state.clone().view(len(channels), *sizes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    channels, g, beta, state, documents, ctx.sizes, _ = inputs
    ctx.with_state = state is not None
    ctx.save_for_backward(channels, g, beta, documents, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_last: Tensor | None, *_: Any) -> Any:
    grads = torch.ops.apt.gated_delta_rule_backward(d_out, d_last, *ctx.saved_tensors, ctx.sizes)
    return (*grads[:3], grads[3] if ctx.with_state else None, None, None, None)


_rule.register_autograd(_differentiate, setup_context=_keep)


def _block_backward(
    at: _Block,
    inputs: _Inputs,
    decays: _Decays,
    documents: Tensor | None,
    inverse: Tensor,
    held: Tensor,
    d_out: Tensor,
    d_last: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients of q, k, v, g and beta [M, C, ...] of a block, and of its first states
    [B*H, K, V]; ``held`` [M, K, V] are those before each chunk, ``d_last`` is the gradient of the
    last. Names with ``d_`` are gradients; d_log is that of the logarithm of ``between``."""
    q, k, v, _, beta, q_factor, k_factor = inputs
    w = inverse @ (k * decays.to_token).mul_(beta)
    u = inverse @ (v * beta)
    written = torch.baddbmm(u, w, held, alpha=-1)
    qk, ends = torch.bmm(q, k.mT), k * decays.to_end
    seen = qk * decays.between

    # What reaches the states, from the last to the first.
    reads = torch.baddbmm(q * decays.to_token, seen, w, alpha=-1).mT @ d_out
    kept, d_states = at.by_place(_kept(ends, w, decays)), at.by_place(reads)
    d_next = torch.empty_like(d_states)
    for n in range(len(kept) - 1, -1, -1):
        d_next[n] = d_last
        d_last = d_states[n].baddbmm_(kept[n].mT, d_last)
    d_next = d_next.flatten(0, 1)

    # O and S'.
    d_written = torch.bmm(seen.mT, d_out).baddbmm_(ends, d_next)
    d_qk = torch.bmm(d_out, written.mT).mul_(decays.between)
    d_begun, d_ends = d_out @ held.mT, written @ d_next.mT
    d_to_token, d_to_end = (d_begun * q).sum(-1), (d_ends * k).sum(-1)
    d_q = d_begun.mul_(decays.to_token).baddbmm_(d_qk, k)
    d_k = d_ends.mul_(decays.to_end).baddbmm_(d_qk.mT, q)
    d_log = d_qk.mul_(qk)

    # W and U, of which T is the inverse of I + A.
    d_wk = inverse.mT @ torch.bmm(d_written, held.mT).neg_()
    d_uv = inverse.mT @ d_written
    d_a = torch.bmm(d_wk, w.mT).baddbmm_(d_uv, u.mT).neg_().mul_(decays.between)
    d_a.diagonal(dim1=1, dim2=2).zero_()
    weight = torch.bmm(k, k.mT).mul_(d_a)
    of_keys = (d_wk * k).sum(-1)
    d_beta = (d_uv * v).sum(-1).addcmul_(of_keys, decays.to_token[..., 0]).add_(weight.sum(-1))
    d_to_token.addcmul_(of_keys, beta[..., 0])
    d_k.addcmul_(d_wk, decays.to_token * beta)
    d_a.mul_(beta)
    d_k.baddbmm_(d_a + d_a.mT, k)
    d_log.addcmul_(weight, beta)

    # The gates.
    d_total = d_log.sum(-1).sub_(d_log.sum(-2)).addcmul_(d_to_token, decays.to_token[..., 0])
    left = d_to_end.mul_(decays.to_end[..., 0])
    d_total.sub_(left)
    d_total[:, -1] += left.sum(-1)
    d_total[:, -1].addcmul_((d_next * held).sum((1, 2)), decays.whole)
    d_g = at.sums_to_end(d_total, documents)

    d_q = _normed_backward(d_q, q, q_factor, q.shape[-1] ** -0.5)
    d_k = _normed_backward(d_k, k, k_factor, 1.0)
    return (d_q, d_k, d_uv.mul_(beta), d_g, d_beta), d_last


def _kept(ends: Tensor, w: Tensor, decays: _Decays) -> Tensor:
    """M [M, K, K] of the module's formula."""
    kept = torch.bmm(ends.mT, w).neg_()
    kept.diagonal(dim1=1, dim2=2).add_(decays.whole[:, None])
    return kept


def _inverse(a: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower A [M, C, C]; what is not below the diagonal is not read."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    return torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True)
