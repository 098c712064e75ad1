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

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6
"""Added to the squared length of queries and keys before they are normalised."""


def unit(x: Tensor) -> Tensor:
    """``x`` [..., K] with vectors of length 1."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for inputs of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def stepped(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule token by token: o [B, T, H, V] and the state [B, H, K, V] after the last token.

    q, k [B, T, H, K], v [B, T, H, V], g, beta [B, T, H] and the ``state`` before the first token.
    """
    dtype = wide(q.dtype)
    q, k = unit(q.to(dtype)) * q.shape[-1] ** -0.5, unit(k.to(dtype))
    v, decay, beta = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        held = k[:, t, :, None] @ state
        written = (v[:, t, :, None] - held) * beta[:, t, :, None, None]
        state = state + k[:, t, :, :, None] * written
        outputs.append(q[:, t, :, None] @ state)
    return torch.cat(outputs, 2).transpose(1, 2), state


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
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
    chunk = min(chunk, q.shape[1])
    # The products would be computed in the type of autocast.
    with torch.autocast(q.device.type, enabled=False):
        out, last = _Chunked.apply(q, k, v, g, beta, state, documents, chunk)
    return out, last


class _Decays(NamedTuple):
    """What is left of things after others, as factors: ``between`` two tokens of a chunk
    [M, C, C], 0 above the diagonal; from its beginning ``to_token`` [M, C, 1] and over the
    ``whole`` of it [M]; from a token ``to_end`` [M, C, 1]. 0 where a document begins in between."""

    between: Tensor
    to_token: Tensor
    to_end: Tensor
    whole: Tensor


class _Layout(NamedTuple):
    """How tokens stand in chunks: ``rows`` B of ``length`` T and ``heads`` H in chunks of
    ``chunk`` C, N of them a row. M = N*B*H chunks of one head stand one after the other, so that
    those at one place of all texts are a slice."""

    rows: int
    length: int
    heads: int
    chunk: int

    def view(self, x: Tensor) -> Tensor:
        """x [B, T, H, ...], filled up with zeros, as a view [N, B, H, C, ...]."""
        missing = -self.length % self.chunk
        if missing:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        return x.unflatten(1, (-1, self.chunk)).transpose(0, 1).transpose(2, 3)

    def inside(self, x: Tensor) -> Tensor:
        """x [B, T, H, ...] as [M, C, ...], copied."""
        return self.view(x).contiguous().flatten(0, 2)

    def outside(self, x: Tensor) -> Tensor:
        """x [M, C, ...] as a view [B, T, H, ...]."""
        x = x.unflatten(0, (-1, self.rows, self.heads)).transpose(2, 3).transpose(0, 1)
        return x.flatten(1, 2)[:, : self.length]

    def places(self, x: Tensor) -> Tensor:
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
            count = self.counts(documents)
            before = F.pad(count[:-1, :, -1:], (0, 0, 0, 0, 1, 0))
            hidden = self._of_heads(hidden | (count[..., None] != count[..., None, :]))
            to_token = to_token.masked_fill_(self._of_heads(count != before), 0.0)
            to_end = to_end.masked_fill_(self._of_heads(count != count[..., -1:]), 0.0)
        between = total[:, :, None] - total[:, None, :]
        # Masked before exp, which would overflow above the diagonal.
        between = between.masked_fill_(hidden, float("-inf")).exp_()
        return _Decays(between, to_token[..., None], to_end[..., None], to_token[:, -1])

    def counts(self, documents: Tensor) -> Tensor:
        """The counts [N, B, C] of counted ``documents`` [B, T]; what fills up belongs to the last.
        """
        missing = -self.length % self.chunk
        whole = torch.cat([documents, documents[:, -1:].expand(-1, missing)], 1)
        return whole.unflatten(1, (-1, self.chunk)).transpose(0, 1)

    def sums_to_end(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """For each token, the sum of x [M, C] from it to the end of the chunk, or of its document
        in it."""
        if documents is None:
            return x.flip(-1).cumsum_(-1).flip(-1)
        # Sums over other documents, which are 0, would be so up to rounding alone.
        count = self.counts(documents)
        of_same = (count[..., :, None] == count[..., None, :]).tril_().to(x.dtype)
        return (x.unflatten(0, (-1, self.rows, self.heads)) @ of_same).flatten(0, 2)

    def _of_heads(self, x: Tensor) -> Tensor:
        """x [N, B, ...] as [M, ...], the same for all heads."""
        x = x[:, :, None]
        return x.expand(-1, -1, self.heads, *x.shape[3:]).flatten(0, 2)


def _normed(x: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """x [N, B, H, C, K] with vectors of length ``size`` [M, C, K], and the factors [M, C, 1]."""
    y = x.clone(memory_format=torch.contiguous_format).flatten(0, 2)
    factor = (y.square().sum(-1, keepdim=True) + EPS).rsqrt_().mul_(size)
    return y.mul_(factor), factor


def _normed_backward(grad: Tensor, y: Tensor, factor: Tensor, size: float) -> Tensor:
    """The gradient of x for y of :func:`_normed`; writes to ``grad``."""
    along = (grad * y).sum(-1, keepdim=True).mul_(size**-2)
    return grad.addcmul_(y, along, value=-1).mul_(factor)


class _Chunked(torch.autograd.Function):
    """:func:`chunked`. The backward computes anew what takes one product."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        documents: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        (batch, length, heads, width), dtype = q.shape, wide(q.dtype)
        at = _Layout(batch, length, heads, chunk)
        ctx.at, ctx.dtypes = at, (q.dtype, k.dtype, v.dtype, g.dtype, beta.dtype)
        q, q_factor = _normed(at.view(q.to(dtype)), width**-0.5)
        k, k_factor = _normed(at.view(k.to(dtype)), 1.0)
        v, g, beta = (at.inside(x.to(dtype)) for x in (v, g, beta))
        decays = at.decays(g, documents)
        beta = beta[..., None]
        inverse = _inverse((k @ k.mT).mul_(decays.between).mul_(beta))
        w = inverse @ (k * decays.to_token).mul_(beta)
        u = inverse @ (v * beta)
        ends = k * decays.to_end
        states = _scan(at.places(_kept(ends, w, decays)), at.places(ends.mT @ u), state)
        held = states[:-1].flatten(0, 1)
        written = torch.baddbmm(u, w, held, alpha=-1)
        seen = (q @ k.mT).mul_(decays.between)
        out = torch.bmm(seen, written).baddbmm_(q * decays.to_token, held)
        ctx.save_for_backward(
            q, k, v, g, beta, q_factor, k_factor, inverse, w, u, states, documents
        )
        ctx.set_materialize_grads(False)
        last = states[-1].unflatten(0, (batch, heads))
        return at.outside(out), last.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_last: Tensor | None) -> tuple[Any, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _backward(ctx, d_out, d_last)


def _backward(ctx: Any, d_out: Tensor | None, d_last: Tensor | None) -> tuple[Any, ...]:
    at: _Layout = ctx.at
    q, k, v, g, beta, q_factor, k_factor, inverse, w, u, states, documents = ctx.saved_tensors
    d_out = torch.zeros_like(v) if d_out is None else at.inside(d_out.to(v.dtype))
    decays, held = at.decays(g, documents), states[:-1].flatten(0, 1)
    written = torch.baddbmm(u, w, held, alpha=-1)
    qk, ends = q @ k.mT, k * decays.to_end
    seen = qk * decays.between

    # What reaches the states, from the last to the first.
    reads = torch.baddbmm(q * decays.to_token, seen, w, alpha=-1).mT @ d_out
    d_states = _scan_back(at.places(_kept(ends, w, decays).mT), at.places(reads), d_last)
    d_next = d_states[1:].flatten(0, 1)

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
    weight = k @ k.mT
    weight.mul_(d_a)
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
    found = [d_q, d_k, d_uv.mul_(beta), d_g, d_beta]
    grads = [at.outside(x).to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)]
    d_state = d_states[0].unflatten(0, (at.rows, at.heads)) if ctx.needs_input_grad[5] else None
    return (*grads, d_state, None, None)


def _kept(ends: Tensor, w: Tensor, decays: _Decays) -> Tensor:
    """M [M, K, K] of the module's formula."""
    kept = torch.bmm(ends.mT, w).neg_()
    kept.diagonal(dim1=1, dim2=2).add_(decays.whole[:, None])
    return kept


def _inverse(a: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower A [M, C, C]; what is not below the diagonal is not read."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    return torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True)


def _scan(keys: Tensor, values: Tensor, state: Tensor | None) -> Tensor:
    """S_{n+1} = keys_n S_n + values_n from ``state`` [B, H, K, V] on: [N + 1, B*H, K, V]."""
    states = values.new_empty(len(values) + 1, *values.shape[1:])
    states[0] = 0 if state is None else state.flatten(0, 1)
    for n, (key, value) in enumerate(zip(keys, values, strict=True)):
        torch.baddbmm(value, key, states[n], out=states[n + 1])
    return states


def _scan_back(keys: Tensor, reads: Tensor, last: Tensor | None) -> Tensor:
    """D_n = keys_n D_{n+1} + reads_n up to ``last`` [B, H, K, V]: [N + 1, B*H, K, V]."""
    grads = reads.new_empty(len(reads) + 1, *reads.shape[1:])
    grads[-1] = 0 if last is None else last.flatten(0, 1)
    for n in range(len(reads) - 1, -1, -1):
        torch.baddbmm(reads[n], keys[n], grads[n + 1], out=grads[n])
    return grads
