"""Decoding many texts of different lengths together: a step of them, and the caches of layers.

A model, block or attention that takes part has a method ``rows`` beside its ``forward``, which
makes what computes such steps; see :class:`~apt_core.providers.attention.AttentionProvider`. On a
CPU that is called in torch's inference mode. Texts are the rows of a batch; each has a slot in the
caches, where the keys and values of its tokens stand from place 0 on.

Shapes: B rows, T new tokens a row, N = B*T, S the places that are looked at, D d_model, H query
heads, K key and value heads, R the width at which a head attends.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from apt_core.modeling.masks import Tokens

FIRST_LENGTH = 64
"""The places that a cache has at first; it grows by doubling."""

Made = TypeVar("Made")

Function = Callable[[Tensor], Tensor]

Order = Callable[[Tensor], Tensor]
"""Moves the rows of a tensor [F, ...]."""

Copied = Callable[[Tensor], Function | None]


class RowStep:
    """What every layer needs of a step: T new tokens for each of the rows in slots ``first`` to
    ``first`` + B.

    ``places`` int64 [B, T] are the tokens' places in their texts, ``positions`` the same, but at
    most ``last``, which padding may be beyond. ``span`` is the number of places that are looked at,
    ``context`` int64 [B, reach + T] has the symbols (ids plus 1) of the tokens and of those before
    them, 0 where a text begins, if the model asks for that. ``tokens`` marks padding, which stands
    after a row's tokens; None: there is none. ``ends`` are the places after each row's last token,
    padding included; where they are not given, who asks for them waits for the device. ``mask``
    tells whether rows see different places; otherwise all tokens see the ``span`` up to themselves.
    ``kept`` has what later steps can use again.
    """

    def __init__(
        self,
        places: Tensor,
        *,
        first: int,
        span: int,
        mask: bool,
        last: int,
        context: Tensor | None = None,
        tokens: Tokens | None = None,
        ends: Sequence[int] | None = None,
        kept: dict[Any, Tensor] | None = None,
    ) -> None:
        self.batch, self.length = places.shape
        self._kept = {} if kept is None else kept
        self._ends = ends
        self.places, self.first, self.span, self.masked = places, first, span, mask
        self.context, self.tokens = context, tokens
        self.positions = places if span <= last + 1 else places.clamp_max(last)
        self._mask: Tensor | None = None
        self._added: Tensor | None = None
        self.size, self.end = self.batch * self.length, first + self.batch
        # Whether each row's tokens are all that it has: causal attention needs no mask then.
        self.whole = self.length == span and not mask
        self._indices: dict[tuple[int, int], Tensor] = {}
        self._tables: dict[Any, Any] = {}

    @classmethod
    def example(cls) -> RowStep:
        """A step of one token, the first of its text, on the CPU."""
        return cls(torch.zeros(1, 1, dtype=torch.int64), first=0, span=1, mask=False, last=0)

    @property
    def ends(self) -> Sequence[int]:
        """The place after each row's last token."""
        if self._ends is None:
            self._ends = (self.places[:, -1] + 1).tolist()
        return self._ends

    def mask(self) -> Tensor | None:
        """Which places are seen, boolean [B, 1, T, S]; None: all of the span."""
        if self._mask is None and (self.masked or self.length > 1):
            seen = torch.arange(self.span, device=self.places.device)
            self._mask = (seen <= self.places[:, :, None])[:, None]
        return self._mask

    def added_mask(self, dtype: torch.dtype) -> Tensor | None:
        """:meth:`mask` as what is added to scores."""
        mask = self.mask()
        if mask is None:
            return None
        if self._added is None or self._added.dtype != dtype:
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            self._added = zeros.masked_fill_(~mask, float("-inf"))
        return self._added

    def all_places(self, room: int) -> Tensor:
        """The numbers of the places of a cache with ``room``, int64 [room]."""
        found = self._kept.get(room)
        if found is None:
            found = self._kept[room] = torch.arange(room, device=self.places.device)
        return found

    def indices(self, heads: int, room: int) -> Tensor:
        """Where the new tokens stand among all places of a cache with ``room`` for each head
        of a slot, int64 [N*heads]."""
        found = self._indices.get((heads, room))
        if found is None:
            key = self.first, self.batch, heads, room
            firsts = self._kept.get(key)
            if firsts is None:
                device = self.places.device
                slots = torch.arange(self.first, self.first + self.batch, device=device)
                firsts = (slots[:, None] * heads + torch.arange(heads, device=device)) * room
                firsts = self._kept[key] = firsts[:, None]
            found = (firsts + self.places[:, :, None]).flatten()
            self._indices[heads, room] = found
        return found

    def table(self, key: Any, whole: Tensor) -> Tensor:
        """The rows of ``whole`` [places, ...] at the positions of the new tokens [N, ...], taken
        once for all layers with the same ``key``."""
        return self.once(key, lambda: whole.index_select(0, self.positions.flatten()))

    def once(self, key: Any, made: Callable[[], Made]) -> Made:
        """What ``made`` gives, made once for all layers with the same ``key``."""
        found: Made | None = self._tables.get(key)
        if found is None:
            found = self._tables[key] = made()
        return found


class Rows(Protocol):
    """An attention for decoding rows, valid until its weights change; its ``cache`` is a
    :class:`RowCache`, or has its methods."""

    cache: RowCache

    def __call__(self, x: Tensor, step: RowStep) -> Tensor:
        """x [N, D] of the new tokens of a step's rows to [N, D]."""


class RowCache:
    """Keys and values of one layer for rows of texts.

    Keys and values stand in one tensor, so that a step writes once: the heads of a slot are first
    those of the keys, then those of the values. ``cuts`` says that what a slot holds of a text can
    be cut to fewer tokens; a cache without it, which keeps a state, is copied for a whole text
    alone, and holds nothing at a text's first token, at place 0.
    """

    cuts = True

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._rows = self._room = 0

    def update(self, step: RowStep, new: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values ``new`` [N, 2K, R]; return those of the step's rows, views
        [B, K, S, R]."""
        held = self._add(step, new)
        heads, width, room = self._heads, self._width, self._room
        # As few operations as possible: each is a good part of a step of a small model.
        shape = step.batch, heads // 2, step.span, width
        slot = heads * room * width
        strides = slot, room * width, width, 1
        first = step.first * slot
        keys = held.as_strided(shape, strides, first)
        return keys, held.as_strided(shape, strides, first + slot // 2)

    def slot(self, step: RowStep, like: Tensor) -> Tensor:
        """All of the slot [2K, room, R] of the one row of a step, with room for its new keys and
        values, which are as ``like`` [N, 2K, R]; those of places that are not taken yet too."""
        held = self._ready(step, like)
        view = self._slots.get(step.first)
        if view is None:
            view = self._slots[step.first] = held[step.first]
        return view

    def _ready(self, step: RowStep, new: Tensor) -> Tensor:
        """What is held, with room for the keys and values ``new`` of a step."""
        held = self._held
        if (
            held is None
            or step.end > self._rows
            or step.span > self._room
            or held.dtype != new.dtype
        ):
            held = self._with_room(step, new)
        return held

    def _add(self, step: RowStep, new: Tensor) -> Tensor:
        held = self._ready(step, new)
        heads, width, room = self._heads, self._width, self._room
        self._flat.index_copy_(0, step.indices(heads, room), new.reshape(-1, width))
        return held

    def _with_room(self, step: RowStep, new: Tensor) -> Tensor:
        """Keys and values with room for the step, in the type of what is added."""
        held = self._held
        if held is None or held.dtype != new.dtype:
            held = None
            rows, length = step.end, doubled(FIRST_LENGTH, step.span)
        else:
            rows = self._rows if step.end <= self._rows else doubled(self._rows, step.end)
            length = self._room if step.span <= self._room else doubled(self._room, step.span)
        return self._hold(_grown(held, new, rows, length))

    def _hold(self, held: Tensor) -> Tensor:
        self._held = held
        self._slots: dict[int, Tensor] = {}
        self._rows, self._heads, self._room, self._width = held.shape
        self._flat = held.view(-1, self._width)
        return held

    def copy(self, source: int, to: int, length: int) -> None:
        """Copy the first ``length`` places of one slot to another."""
        held = self._held
        if held is None:
            return
        if to >= self._rows:
            rows = doubled(self._rows, to + 1)
            held = self._hold(_grown(held, held[:, :, 0], rows, self._room))
        held[to, :, :length] = held[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` places of two slots."""
        held = self._held
        if held is not None:
            kept = held[one, :, :length].clone()
            held[one, :, :length] = held[other, :, :length]
            held[other, :, :length] = kept

    def erase(self, slot: int) -> None:
        """Write zeros over all of a slot."""
        if self._held is not None and slot < self._rows:
            self._held[slot].zero_()

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values."""
        return 0 if self._held is None else self._held.nbytes


def likeliest(logits: Tensor) -> Tensor:
    """What is read of fp32 ``logits`` [B, V] where the most likely token is taken: their sum, which
    is not finite if one of its terms is not, and the token's id; fp32 [B, 2], which holds ids below
    2**24 exactly."""
    return torch.stack([logits.sum(-1), logits.argmax(-1).float()], 1)


def doubled(size: int, least: int) -> int:
    """``size`` doubled until it is at least ``least``.

    >>> [doubled(64, length) for length in (1, 64, 65, 300)]
    [64, 64, 128, 512]
    """
    while size < least:
        size *= 2
    return size


def _grown(held: Tensor | None, new: Tensor, rows: int, length: int) -> Tensor:
    """A larger copy of ``held`` [rows, 2K, places, R], or an empty one for tensors as ``new``
    [N, 2K, R]. Places that nothing was written to are 0, since a masked NaN would still count."""
    made = new.new_zeros(rows, new.shape[1], length, new.shape[2])
    if held is not None:
        made[: held.shape[0], :, : held.shape[2]] = held
    return made


MOST_COPIED = 3 * 2**29
"""Bytes of weights that are copied into faster layouts at most."""

LEAST_PACKED = 2**17
"""Elements of a weight from which oneDNN's layout is faster for several tokens."""

LEAST_HALVED = 2**16, 256
"""Elements and columns of a weight from which one token is faster multiplied by two halves of it at
once."""

LARGE_PAGE, PAGES_AT_ONCE = 2**21, 2**26
"""Bytes of a large page, and bytes of addresses that are asked for at once; what is not written to
takes no memory."""


class LargePages:
    """Copies of weights, one after the other, in pages of 2 MiB where the system has them: a token
    reads all weights once, which looks up each page of 4 KiB anew."""

    def __init__(self) -> None:
        self._free = torch.empty(0)

    def copy(self, weight: Tensor) -> Tensor:
        """A copy of ``weight``, fp32 on the CPU."""
        size = weight.numel()
        if size > len(self._free):
            self._free = _pages(max(weight.nbytes, PAGES_AT_ONCE))
        made = self._free[:size].view(weight.shape).copy_(weight)
        self._free = self._free[size + -size % 16 :]
        return made


def _pages(size: int) -> Tensor:
    """An fp32 tensor of ``size`` bytes that begins with a page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size // 4)
    try:
        held = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages
        return torch.empty(size // 4)
    tensor = torch.frombuffer(held, dtype=torch.float32)
    before = -tensor.data_ptr() % LARGE_PAGE // 4
    return tensor[before : before + size // 4]


class Stored(Protocol):
    """What a weight is kept as in place of its elements: integers and scales, say. A weight
    [F, D] that was made of it for a forward has it as its attribute ``stored``."""

    def product(self, order: Order | None, copied: Copied) -> Function | None:
        """x [N, D] to x Wᵀ [N, F], computed from what is kept; None where that cannot be done
        here, or not faster. ``order`` moves the rows of W. ``copied`` makes the function that
        multiplies by a copy of the elements of W, for many rows at once; None where there are
        too many copies."""

    def joined(self, other: Any) -> Stored | None:
        """What [W, W'] is kept as, with ``other`` that of W'; None if they do not go together."""


class Products:
    """Makes the functions that multiply by a weight, once for many steps. ``dtype`` is the type of
    autocast in which they will be called, None for none: weights are cast to it here.

    On a CPU in fp32, some shapes have faster ways than F.linear. Measured on Zen 4 with weights
    that no cache holds: one token by the halves of a [4096, 640] weight takes 0.4 of the time with
    two threads (28 GB/s, and F.linear does not use the second one) and 0.55 with one, while a
    weight of 96 columns takes 1.3 times as long; 4 and 16 tokens by oneDNN's layout, a copy, 0.3 to
    0.5. In large pages one token takes 0.91 of the time, with another copy. Up to MOST_COPIED bytes
    are copied in all. The way is a function of the shape, so that results are the same each time.

    A weight that is :class:`Stored` is computed as that where it can be, unless products are to be
    ``exact``; ``rounded`` of them are, and x is rounded for it. Those that are ``compiled`` for one
    token, which takes copies of its own, are not copied for it here.
    """

    def __init__(
        self, dtype: torch.dtype | None = None, *, exact: bool = False, compiled: bool = False
    ) -> None:
        self.dtype, self.exact, self._compiled = dtype, exact, compiled
        self.copied = self.rounded = 0
        self._large_pages = LargePages()
        self._shared: dict[Any, Tensor] = {}

    def shared(self, key: Any, made: Callable[[], Tensor]) -> Tensor:
        """What ``made`` gives, made once for all layers with the same ``key``."""
        if key not in self._shared:
            self._shared[key] = made()
        return self._shared[key]

    def pair(self, one: Tensor, other: Tensor) -> Callable[[Tensor], Sequence[Tensor]]:
        """x [N, D] to its products with two weights [F, D] each, [N, F]. On a CPU in fp32 they are
        computed together, by a copy of both."""
        first, second = self._stored(one), self._stored(other)
        joined = None if first is None or second is None else first.joined(second)
        if joined is not None:
            found = joined.product(None, self._copied)
            if found is not None:
                self.rounded += 2
                return lambda x: found(x).chunk(2, 1)
        size = one.nbytes + other.nbytes
        copies = self.dtype is None and all(
            weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in (one, other)
        )
        if not copies or one.shape != other.shape or self.copied + size > MOST_COPIED:
            return self._apart(one, other)
        both = self.of(torch.cat([one.detach(), other.detach()]))
        return lambda x: both(x).chunk(2, 1)

    def _apart(self, one: Tensor, other: Tensor) -> Callable[[Tensor], Sequence[Tensor]]:
        first, second = self.of(one), self.of(other)
        return lambda x: (first(x), second(x))

    def _stored(self, weight: Tensor) -> Stored | None:
        """What ``weight`` is kept as, where products may be computed from that."""
        if self.exact or self.dtype is not None or weight.device.type != "cpu":
            return None
        return getattr(weight, "stored", None)

    def of(self, weight: Tensor, order: Order | None = None) -> Function:
        """x [N, D] to x Wᵀ [N, F], for ``weight`` W [F, D], whose rows ``order`` moves."""
        stored = self._stored(weight)
        if stored is not None:
            found = stored.product(order, self._copied)
            if found is not None:
                self.rounded += 1
                return found
        return self._of_elements(weight if order is None else order(weight))

    def _copied(self, weight: Tensor) -> Function | None:
        """x of many rows to its product with a copy of ``weight``, as long as there are few."""
        if self.copied + weight.nbytes > MOST_COPIED:
            return None
        self.copied += weight.nbytes
        if weight.numel() < LEAST_PACKED or not _has_packed_products():
            return partial(torch.nn.functional.linear, weight=weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def _of_elements(self, weight: Tensor) -> Function:
        linear = torch.nn.functional.linear
        if self.dtype is not None:
            cast = weight.detach().to(self.dtype)
            return lambda x: linear(x, cast)
        own = weight.detach()
        if own.device.type != "cpu" or own.dtype != torch.float32:
            return lambda x: linear(x, own)
        packs = own.numel() >= LEAST_PACKED and _has_packed_products()
        packs = packs and self.copied + own.nbytes <= MOST_COPIED
        least, columns = LEAST_HALVED
        halves = own.numel() >= least and own.shape[1] >= columns and own.shape[0] > 1
        if not (packs or halves):
            return lambda x: linear(x, own)
        self.copied += own.nbytes * packs
        if halves and not self._compiled and self.copied + own.nbytes <= MOST_COPIED:
            self.copied += own.nbytes
            own = self._large_pages.copy(own)
        one = _halved(own) if halves else partial(linear, weight=own)
        packed: Tensor | None = None

        def product(x: Tensor) -> Tensor:
            nonlocal packed
            if x.shape[0] == 1:
                return one(x)
            if not packs:
                return linear(x, own)
            if packed is None:
                packed = torch.ops.mkldnn._reorder_linear_weight(own.contiguous(), 16)
            found: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            return found

        return product


def _halved(weight: Tensor) -> Function:
    """x [1, D] to x Wᵀ [1, F] by two products of half of ``weight`` W [F, D] each, which torch
    computes at once."""
    rows, width = weight.shape
    halves = weight[: rows - rows % 2].view(2, -1, width)
    last = weight[-1:] if rows % 2 else None
    shape, strides = (2, width, 1), (0, 1, width)

    def product(x: Tensor) -> Tensor:
        # Two columns with the strides of a transposed row: others make torch copy the weight.
        found = torch.bmm(halves, x.contiguous().as_strided(shape, strides)).view(1, -1)
        if last is not None:
            found = torch.cat([found, torch.nn.functional.linear(x, last)], 1)
        return found

    return product


def _has_packed_products() -> bool:
    """Whether this torch has oneDNN's products with packed weights, as its compiler uses them."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


class Int8Products(Products):
    """Products with weights of 8 bits and one scale a row of the weight, where torch computes these
    faster on this CPU: a weight is a quarter as large, and a token waits for little else.

    x is rounded to bf16 for it. ``used`` of ``number`` products are computed so.
    """

    def __init__(
        self, dtype: torch.dtype | None = None, *, exact: bool = False, compiled: bool = False
    ) -> None:
        super().__init__(dtype, exact=exact, compiled=compiled)
        self.used = self.number = 0
        self._faster: dict[torch.Size, bool] = {}

    def pair(self, one: Tensor, other: Tensor) -> Callable[[Tensor], Sequence[Tensor]]:
        return self._apart(one, other)

    def of(self, weight: Tensor, order: Order | None = None) -> Function:
        """x [N, D] to about x Wᵀ [N, F], for ``weight`` W [F, D], whose rows ``order`` moves."""
        self.number += 1
        plain = super().of(weight, order)
        if self._stored(weight) is not None:
            return plain
        weight = weight if order is None else order(weight)
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        # For other shapes the kernel reads beyond the weight.
        if self.dtype is not None or not on_cpu or weight.shape[1] % 32 or weight.shape[0] % 16:
            return plain
        scales = weight.detach().abs().amax(1).clamp_min(1e-30) / 127
        rounded = (weight.detach() / scales[:, None]).round().to(torch.int8).contiguous()
        ones = torch.ones_like(scales, dtype=torch.bfloat16)

        def product(x: Tensor) -> Tensor:
            # The scales are applied in fp32: the kernel's are bf16.
            return torch._weight_int8pack_mm(x.bfloat16(), rounded, ones).float() * scales

        if weight.shape not in self._faster:
            self._faster[weight.shape] = _faster(product, plain, weight.shape[1])
        if not self._faster[weight.shape]:
            return plain
        self.used += 1
        return product


def _faster(one: Function, other: Function, width: int) -> bool:
    """Whether ``one`` is the faster function of x [1, ``width``], where it can be computed."""
    x = torch.ones(1, width)

    def seconds(function: Function) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function(x)
            times.append(time.perf_counter() - start)
        return min(times)

    try:
        return seconds(one) < seconds(other)
    except RuntimeError:  # the kernel takes no such shape
        return False


CALLED = ("forward", "create_cache", "create_caches")
"""Methods beside which a layer's ``rows`` is valid: one who replaces them means another layer."""


def takes_part(module: nn.Module, method: str) -> bool:
    """Whether ``module`` may be computed by what its ``method`` makes in place of its ``forward``:
    no class derived from the one with the method has another forward, nobody has replaced that of
    the object, and no hook waits for a call of it."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or any(name in own for name in CALLED):
        return False
    for of_class in type(module).__mro__:
        if method in vars(of_class):
            return True
        if any(name in vars(of_class) for name in CALLED):
            return False
    return False


def function_of(module: nn.Module, products: Products) -> Function:
    """A function of x [N, D] that computes a norm or a feed-forward ``module``: what its
    ``decoding(products)`` gives, or calls of the module, as x [1, N, D]."""
    parts = [part for part in module.modules() if part is not module]
    plain = all(takes_part(part, "forward") for part in parts)
    if plain and takes_part(module, "decoding"):
        made: Function = module.decoding(products)
        return made
    return CalledAsEver(module)


class CalledAsEver:
    """A function of x [N, D] that calls ``module`` with x [1, N, D]; what else the module does with
    a call is not known."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return call_as_ever(self._module, x[None])[0]


def call_as_ever(module: nn.Module, x: Tensor) -> Tensor:
    """What a ``module`` that knows nothing of rows gives: steps on a CPU are computed in inference
    mode, and what a module keeps of that could never be trained with."""
    with torch.inference_mode(False), torch.no_grad():
        found: Tensor = module(x.clone() if x.is_inference() else x)
        return found
