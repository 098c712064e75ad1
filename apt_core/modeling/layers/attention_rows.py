"""Softmax attention of growing texts: see :mod:`apt_core.modeling.row_decoding`.

Shapes: B rows, T new tokens a row, N = B*T, S the places that are looked at, D d_model, H query
heads, K key and value heads, R the width at which a head attends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.layers.rope import PairTurn, Turn, paired, turning
from apt_core.modeling.row_decoding import (
    CalledAsEver,
    Function,
    Order,
    Products,
    RowCache,
    RowStep,
)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
AttendRows = Callable[[Tensor, Tensor, Tensor, RowStep], Tensor]


class AttentionRows:
    """An attention for decoding rows.

    ``qkv_weight`` [(H+2K)*R, D] and ``out_weight`` [D, H*R] are its projections, ``qk_scales``
    [H+K, R] the scales of QK-norm. ``project``, ``read_out`` and ``attend`` are the methods of a
    layer that computes these otherwise, with weights as it needs them. ``attend_rows`` may be set
    to a kernel for all rows of a step, of their keys and values as the cache gives them, ``added``
    to a function of x whose result is added.
    """

    attend_rows: AttendRows | None = None
    added: Function | None = None

    def __init__(
        self,
        products: Products,
        qkv_weight: Tensor,
        out_weight: Tensor,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        rotary: nn.Module | None,
        qk_scales: Tensor | None,
        qk_eps: float,
        project: Callable[[Tensor, Tensor], Tensor] | None,
        read_out: Callable[[Tensor, Tensor], Tensor] | None,
        attend: Attend | None,
    ) -> None:
        self.cache = RowCache()
        self._heads = num_heads, 2 * num_kv_heads
        self._qk_heads = num_heads + num_kv_heads, num_kv_heads
        self._width, self._mixed_width = width, num_heads * width
        self._grouped = num_heads != num_kv_heads
        self._turn: Turn | None = None
        order: Order | None = None
        if rotary is not None:
            # Scores do not depend on the order of the places of a head, if q and k have the same.
            pair = paired(rotary, products) if project is None else None
            if pair is not None:
                order = partial(pair, heads=num_heads + num_kv_heads)
                qk_scales = None if qk_scales is None else pair(qk_scales.flatten())
            self._turn = turning(
                rotary, num_heads + num_kv_heads, products, paired=pair is not None
            )
        self._qk_eps = qk_eps
        self._qk_scales = None if qk_scales is None else qk_scales.view(-1, width)
        self._project: Function
        if project is None:
            self._project = products.of(qkv_weight, order)
        else:
            self._project = lambda x: project(x, qkv_weight)
        self.read_out: Function
        """What was attended to [N, H*R] to [N, D]."""
        if read_out is None:
            self.read_out = products.of(out_weight)
        else:
            self.read_out = lambda x: read_out(x.view(len(x), -1, width), out_weight)
        self._attend = attend
        self._own = project is None and read_out is None and attend is None
        self.example = out_weight.new_zeros(1, out_weight.shape[0])
        """An x of one token."""
        self._example_new = out_weight.new_zeros(1, 2 * num_kv_heads, width)

    def __call__(self, x: Tensor, step: RowStep) -> Tensor:
        """x [N, D] of the new tokens of a step's rows to [N, D]."""
        packed = self._packed(x)
        if self._turn is not None:
            packed = self._turn(packed, step)
        return self._with_added(self.read_out(self.mixed(packed, step)), x)

    @property
    def compilable(self) -> bool:
        """Whether it is what :meth:`by_one` computes, of operations of torch alone."""
        turns = self._turn is None or isinstance(self._turn, PairTurn)
        own = self._own and self.attend_rows is None and not isinstance(self.added, CalledAsEver)
        return own and turns

    def slot(self, step: RowStep) -> Tensor:
        """The keys and values [2K, room, R] of the one row of a step, with room for its token."""
        return self.cache.slot(step, self._example_new)

    def by_one(self, x: Tensor, step: RowStep, held: Tensor, unseen: Tensor) -> Tensor:
        """x [1, D] of a step's one token to [1, D], for the compiler. Writes the token's keys and
        values into what is ``held`` in :meth:`slot`. ``unseen`` [room] is added to the scores: 0
        for the places of the text, -inf for those after it. The compiler's loops take less time
        than torch's kernel for one query."""
        heads, kv_heads, width = self._heads[0], self._qk_heads[1], self._width
        packed = self._packed(x)
        if isinstance(self._turn, PairTurn):
            packed = self._turn.by_one(packed, step)
        held.index_copy_(1, step.places.view(1), packed[0, heads:].unsqueeze(1))
        q = packed[:, :heads].view(kv_heads, heads // kv_heads, 1, width)
        k, v = held.unsqueeze(1).split_with_sizes((kv_heads, kv_heads))
        scores = (k * q).sum(3) * width**-0.5 + unseen
        mixed = (scores.softmax(2).unsqueeze(3) * v).sum(2).view(1, -1)
        return self._with_added(self.read_out(mixed), x)

    def _with_added(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.added is None else y + self.added(x)

    def _packed(self, x: Tensor) -> Tensor:
        """x [N, D] to the queries, keys and values [N, H+2K, R], not turned yet."""
        packed = self._project(x).view(len(x), -1, self._width)
        if self._qk_scales is not None:
            qk, v = packed.split_with_sizes(self._qk_heads, 1)
            qk = F.rms_norm(qk, (self._width,), eps=self._qk_eps) * self._qk_scales
            packed = torch.cat([qk.to(v.dtype), v], 1)
        return packed

    def mixed(self, packed: Tensor, step: RowStep) -> Tensor:
        """Queries, keys and values [N, H+2K, R] of the new tokens to what they attend to [N, H*R];
        keys and values are added to the cache."""
        q, new = packed.split_with_sizes(self._heads, 1)
        k, v = self.cache.update(step, new)
        if step.length == 1:
            mixed = self._attended(q.unsqueeze(2), k, v, step)
        else:
            q = q.unflatten(0, (step.batch, step.length)).transpose(1, 2)
            mixed = self._attended(q, k, v, step).transpose(1, 2)
        return mixed.reshape(step.size, self._mixed_width)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, step: RowStep) -> Tensor:
        """q [B, H, T, R], k and v [B, K, S, R] to [B, H, T, R]."""
        attend = self._attend
        if self.attend_rows is not None:
            return self.attend_rows(q, k, v, step)
        if attend is None:
            if step.length == 1:
                # The heads of a group are queries of one place, so keys are read once for them all.
                grouped = q.view(*k.shape[:2], -1, self._width)
                mask = step.added_mask(q.dtype)
                return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view_as(q)
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if step.whole else step.added_mask(q.dtype),
                is_causal=step.whole,
                enable_gqa=self._grouped,
            )
        if not step.masked:
            return attend(q, k, v, None)
        # Another kernel takes the last query to see every key, so each row has its own keys.
        rows = []
        for row, end in enumerate(step.ends):
            keys, one = slice(0, end), slice(row, row + 1)
            rows.append(attend(q[one], k[one, :, keys], v[one, :, keys], None))
        return torch.cat(rows)
