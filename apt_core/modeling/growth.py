"""Grows layers so that they compute what they did before.

A layer takes part in a growth of width or vocabulary by ``grow(sizes)``, which is called on the
meta device: it takes on the larger sizes and says of each of its parameters that changes how it is
made from the smaller one, as a :class:`Larger`. It raises CannotGrow, or ValueError, with the
reason, if it cannot. A class derived from such a layer that has a ``forward`` of its own computes
something else, and cannot grow unless it defines ``grow`` too.

The new places of the residual stream hold zeros, for what writes to it writes zeros there; what
reads them has initial values, so that they are learned from the first step. The same holds for
hidden units and heads: they compute something from the start, and what reads them starts at zero.
A norm of the stream is exact if its scale takes up the ratio of the widths (Yao et al.,
arXiv:2305.02869, keep a mask for it).

A growth of depth needs to know how a block is silent: ``writes_stream`` names the parameters that
write to the stream. With these at zero the block adds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from apt_core.modeling.blocks import block_stack
from apt_core.modeling.init import NORMS, initial_value
from apt_core.modeling.lr_scale import declared
from apt_core.modeling.transforms import Carried, Rule, unchanged

New = Literal["zero", "initial", "mean"]
"""What new places hold: zeros, the initial values of a new model, or the mean of the old places."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a model grows to; None for those that stay."""

    d_model: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    d_ff: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Larger:
    """How a larger parameter is made: ``new`` says what the new places of each axis hold, ``scale``
    is a factor on the old values.

    The old places of an axis are its first ones, or ``spans``: (start in the old parameter, end,
    start in the new one).
    """

    new: Mapping[int, New]
    scale: float = 1.0
    spans: Mapping[int, Sequence[tuple[int, int, int]]] = field(default_factory=dict)


class CannotGrow(ValueError):
    """Layers that cannot grow: ``reasons`` by their places."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__("; ".join(f"{place}: {why}" for place, why in self.reasons.items()))


def grow_parts(sizes: Sizes, **parts: nn.Module | None) -> dict[str, Larger]:
    """Grow several modules of a layer, given by their names in it. Raises CannotGrow with the
    reasons of all that cannot."""
    found, reasons = {}, {}
    for name, part in parts.items():
        if part is None:
            continue
        if not can_grow(part):
            reasons[name] = f"{type(part).__name__} has no grow(), which says how it grows"
            continue
        try:
            grown: Mapping[str, Larger] = part.grow(sizes)
        except CannotGrow as error:
            reasons.update({f"{name}.{place}": why for place, why in error.reasons.items()})
        except ValueError as error:
            reasons[name] = str(error)
        else:
            found.update({f"{name}.{own}": larger for own, larger in grown.items()})
    if reasons:
        raise CannotGrow(reasons)
    return found


def can_grow(part: nn.Module) -> bool:
    """Whether what ``part`` computes is what its ``grow`` keeps."""
    own = part.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    for of_class in type(part).__mro__:
        if "grow" in vars(of_class):
            return True
        if "forward" in vars(of_class):
            return False
    return False


def resized(parameter: nn.Parameter, *shape: int) -> nn.Parameter:
    """A parameter of ``shape`` like ``parameter``, without a value. Raises ValueError for one that
    is of another kind than torch's own, such as a quantised one, or that would shrink."""
    if type(parameter.data) is not Tensor or not parameter.is_floating_point():
        kind = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
        raise ValueError(f"its weights are {kind}, as those of quantised layers are: grow it first")
    if any(now < before for before, now in zip(parameter.shape, shape, strict=True)):
        raise ValueError(f"{list(parameter.shape)} cannot shrink to {list(shape)}")
    empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def resize_linear(linear: nn.Module, out_features: int, in_features: int) -> None:
    """Give ``linear`` other sizes. Raises ValueError for what only looks like an ``nn.Linear``."""
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(
            f"{type(linear).__name__} is in the place of an nn.Linear, and may compute another "
            "product, as quantised layers do: grow it first"
        )
    if linear.bias is not None:
        raise ValueError("it has a bias, of which no growth is known")
    linear.weight = resized(linear.weight, out_features, in_features)
    linear.out_features, linear.in_features = out_features, in_features


# Rules ---------------------------------------------------------------------------------------


def origins_of(model: nn.Module, grown: Mapping[str, Larger], seed: int) -> dict[str, Carried]:
    """The rules that make the parameters of ``model``, which was grown, by name. New places of
    moments hold 0, those of squares the mean of the old ones, so that their first steps have the
    size of the others'."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())  # under these names, whatever becomes of the model
    return {
        name: _carried(name, shapes[name], larger, _Initial(modules, name, shapes[name], seed))
        for name, larger in grown.items()
    }


def _carried(name: str, shape: torch.Size, larger: Larger, initial: _Initial) -> Carried:
    def value(old: Tensor) -> Tensor:
        fresh = initial(old) if "initial" in larger.new.values() else None
        return enlarged(old * larger.scale, shape, larger, larger.new, fresh)

    def first(old: Tensor) -> Tensor:
        return enlarged(old / larger.scale, shape, larger, dict.fromkeys(larger.new, "zero"))

    def second(old: Tensor) -> Tensor:
        return enlarged(old / larger.scale**2, shape, larger, dict.fromkeys(larger.new, "mean"))

    return Carried(name, value, first, second)


def enlarged(
    old: Tensor,
    shape: Sequence[int],
    larger: Larger,
    new: Mapping[int, New],
    fresh: Tensor | None = None,
) -> Tensor:
    """``old`` with further places up to ``shape``, which hold what ``new`` says of their axis;
    initial values are those of ``fresh``, of that shape."""
    places = {axis: _places(old.shape[axis], larger.spans.get(axis)) for axis in new}
    made = old
    for axis, kind in new.items():
        size, where = shape[axis], places.pop(axis).to(old.device)
        if size == len(where):
            continue
        sizes = [*made.shape]
        sizes[axis] = size
        wide = made.new_zeros(sizes)
        added = torch.ones(size, dtype=torch.bool, device=old.device)
        added[where] = False
        added = added.nonzero().flatten()
        if kind == "mean":
            sizes[axis] = len(added)
            wide.index_copy_(axis, added, made.mean(axis, keepdim=True).expand(sizes).contiguous())
        elif kind == "initial":
            assert fresh is not None
            part = fresh.index_select(axis, added)
            for later, first in places.items():
                part = part.index_select(later, first.to(old.device))
            wide.index_copy_(axis, added, part)
        wide.index_copy_(axis, where, made)
        made = wide
    return made


def _places(size: int, spans: Sequence[tuple[int, int, int]] | None) -> Tensor:
    """Where the old places of an axis of ``size`` are in the new one."""
    if spans is None:
        return torch.arange(size)
    return torch.cat([torch.arange(new, new + end - start) for start, end, new in spans])


def composed(first: Carried | None, then: Carried) -> Carried:
    """The rule ``then`` for what ``first`` makes of an old parameter."""
    if first is None:
        return then
    rules = {}
    for kind in ("value", "first_moment", "second_moment"):
        one, other = getattr(first, kind), getattr(then, kind)
        rules[kind] = partial(_after, one, other)
    return Carried(first.source, others=first.others, **rules)


def _after(first: Rule, then: Rule, *old: Tensor) -> Tensor:
    return then(first(*old))


@dataclass(frozen=True, eq=False)
class _Initial:
    """A rule: the initial value of a parameter, whatever the old one is."""

    modules: dict[str, nn.Module]
    name: str
    shape: torch.Size
    seed: int

    def __call__(self, old: Tensor) -> Tensor:
        return initial_value(self.modules, self.name, self.shape, self.seed).to(old)


# Depth ---------------------------------------------------------------------------------------


def insert_blocks(
    model: nn.Module, sources: Sequence[int], *, copies: bool, seed: int
) -> tuple[dict[str, str], dict[str, Carried]]:
    """Give ``model`` a block for each of ``sources``, numbers of its blocks in their order: the
    first of a number is that block, and further ones are like it and add nothing. Returns ``moved``
    and ``origins`` of a transform.

    New blocks start as ``copies``, or with initial values. What writes to the stream starts at 0,
    and is the only part with a gradient at first: the moments of the others start at 0. Squares of
    gradients are those of the block that it is like. Raises CannotGrow for a block that does not
    say what writes to the stream.
    """
    stack, blocks = block_stack(model)
    old, reasons = [*blocks], {}
    new = [source in sources[:number] for number, source in enumerate(sources)]
    for source in dict.fromkeys(s for s, is_new in zip(sources, new, strict=True) if is_new):
        if found := _not_silent(old[source]):
            reasons[f"{stack}.{source}{found[0]}"] = found[1]
    if reasons:
        raise CannotGrow(reasons)
    made = [
        copy.deepcopy(old[source]) if is_new else old[source]
        for source, is_new in zip(sources, new, strict=True)
    ]
    setattr(model, stack, nn.ModuleList(made))
    modules = dict(model.named_modules())
    moved: dict[str, str] = {}
    origins: dict[str, Carried] = {}
    for number, (source, is_new) in enumerate(zip(sources, new, strict=True)):
        place, before = f"{stack}.{number}", f"{stack}.{source}"
        if place != before:
            moved[place] = before
        writers = set(declared("", made[number], "writes_stream")) if is_new else set()
        for own, parameter in made[number].named_parameters() if is_new else ():
            name = f"{place}.{own}"
            value: Rule = unchanged
            if own in writers:
                origins[name] = Carried(f"{before}.{own}", value=torch.zeros_like)
                continue
            if not copies:
                value = _Initial(modules, name, parameter.shape, seed)
            origins[name] = Carried(f"{before}.{own}", value, first_moment=torch.zeros_like)
    return moved, origins


def _not_silent(block: nn.Module) -> tuple[str, str] | None:
    """The place in ``block``, and the reason, that it cannot be made to add nothing; None if it
    can."""
    said = "{} does not name in writes_stream the parameters that write to the residual stream"
    if hasattr(block, "writes_stream"):
        try:
            declared("", block, "writes_stream")
        except ValueError as error:
            return "", str(error)
        return None
    for name, child in block.named_children():
        if not hasattr(child, "writes_stream") and not isinstance(child, NORMS):
            return f".{name}", said.format(type(child).__name__)
    return "", said.format(type(block).__name__)
