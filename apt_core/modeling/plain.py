"""Makes the plain form of a model (:mod:`apt_core.providers.plain`), of which other programs have
an implementation.

A layer takes part by ``plain()``, which gives its form: an attention a ``PlainAttention``, a
feed-forward a ``PlainFFN`` or ``PlainExperts``, a norm a ``PlainNorm``, a rotary module a
``PlainRope``, a router a ``PlainRouter``. It raises ValueError, with the reason, where there is
none. What the form leaves out is what ``beyond_plain()`` gives, if the layer has it. A class
derived from such a layer that defines methods of its own computes something else, and has no plain
form unless it defines ``plain`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from apt_core.errors import ConfigError, Problem, did_you_mean
from apt_core.providers.plain import (
    Beyond,
    PlainAttention,
    PlainBlock,
    PlainExperts,
    PlainFFN,
    PlainModel,
    PlainNorm,
    PlainRope,
    PlainRouter,
    PlainShape,
)

Form = TypeVar("Form")

HARMLESS = frozenset({"init_parameter", "reset_buffers", "extra_repr", "decoding", "rows"})
"""Methods of a derived class that do not change what its ``forward`` computes."""


@dataclass(frozen=True, eq=False)
class PlainParts:
    """What ``plain()`` of a whole model gives: tensors as in a :class:`PlainModel`, and its
    ``blocks``, whose ``plain()`` gives a :class:`PlainBlock`."""

    embedding: Tensor
    blocks: Sequence[nn.Module]
    final_norm: PlainNorm
    head: Tensor | None
    max_seq_len: int


class NotPlain(ValueError):
    """Layers that have no plain form: ``reasons`` by their places."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__("; ".join(f"{place}: {why}" for place, why in self.reasons.items()))


class LeftOut(nn.Module):
    """Stands for a layer that was dropped from a block: it adds nothing to the stream. In the plain
    form it is a layer like those of other blocks whose output matrix is 0."""

    def __init__(self, form: type[PlainAttention] | type[PlainFFN]) -> None:
        super().__init__()
        self._form = form

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x [B, T, D] to zeros [B, T, D]."""
        return torch.zeros_like(x)

    def plain(self) -> PlainAttention | PlainFFN:
        """A form of no size, which :func:`plain_model` replaces."""
        none = torch.empty(0, 0)
        if self._form is PlainFFN:
            return PlainFFN(none, none, none)
        return PlainAttention(none, none, none, none, 0, 0, 0, PlainRope(1.0))


def without_form(block: nn.Module, names: Mapping[str, type[Any]]) -> Iterator[Beyond]:
    """The layers of ``block``, of those with these attributes and forms, that have no plain form;
    they can be left out."""
    for name, form in names.items():
        layer = getattr(block, name)
        if not has_form(layer):
            drop = partial(setattr, block, name, LeftOut(form))
            what = f"its {name} ({type(layer).__name__}) has no plain form"
            yield Beyond(name, what, drop)


def plain_of(part: nn.Module | None, form: type[Form] | tuple[type[Form], ...]) -> Form:
    """The plain form of a layer. Raises ValueError if it has none, or another than ``form``."""
    if part is None:
        raise ValueError("there is none, and a plain model needs one")
    name = type(part).__name__
    if not has_form(part):
        raise ValueError(f"{name} has no plain form")
    found = part.plain()
    if not isinstance(found, form):
        raise ValueError(f"the plain() of {name} gives a {type(found).__name__}")
    return found


def plain_parts(**parts: tuple[nn.Module | None, Any]) -> dict[str, Any]:
    """The plain forms of several layers, each given with the class of its form. Raises NotPlain
    with the reasons of all that have none."""
    found, reasons = {}, {}
    for name, (part, form) in parts.items():
        try:
            found[name] = plain_of(part, form)
        except NotPlain as error:
            reasons.update({f"{name}.{place}": why for place, why in error.reasons.items()})
        except ValueError as error:
            reasons[name] = str(error)
    if reasons:
        raise NotPlain(reasons)
    return found


def beyond_plain(model: nn.Module) -> list[tuple[str, Beyond]]:
    """What a plain form of ``model`` would leave out, with the name of the module that has it."""
    found = []
    for name, module in model.named_modules():
        beyond = getattr(module, "beyond_plain", None)
        found += [(name, each) for each in (() if beyond is None else beyond())]
    return found


def drop_beyond(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """Take out of ``model`` what ``names`` call; in how many places each was.

    Raises ConfigError for a name that nothing has, and for what cannot be dropped.
    """
    there = beyond_plain(model)
    droppable = {each.name for _, each in there if each.drop is not None}
    problems = []
    for name in names:
        if name not in droppable:
            known = ", ".join(sorted(droppable)) or "nothing"
            hint = did_you_mean(name, droppable) or f"what can be dropped: {known}"
            problems.append(Problem(f"the model has no {name} to drop", "--drop", hint=hint))
    if problems:
        raise ConfigError(problems)
    counts: dict[str, int] = {}
    for _, each in there:
        if each.name in names and each.drop is not None:
            each.drop()
            counts[each.name] = counts.get(each.name, 0) + 1
    return counts


@torch.no_grad()
def plain_model(
    model: nn.Module, vocab_size: int | None = None, holds: Collection[str] = ()
) -> PlainModel:
    """The plain form of ``model``, of whose vocabulary the first ``vocab_size`` ids are kept, and
    what ``holds`` names of what is beyond a bare form.

    Raises ConfigError with everything that stands against it: what is beyond a plain form and was
    not dropped, layers without one, blocks that differ from each other.
    """
    reasons: list[tuple[str, str, str]] = []  # place, message, hint
    named = set()
    for place, each in beyond_plain(model):
        if each.name in holds:
            continue
        hint = f"--drop {each.name} leaves it out" if each.drop is not None else ""
        reasons.append((place, each.what, hint))
        named.add(f"{place}.{each.name}")
    try:
        parts = plain_of(model, PlainParts)
    except ValueError as error:
        why = error.reasons if isinstance(error, NotPlain) else {"": str(error)}
        reasons += [(place, message, "") for place, message in why.items()]
        raise ConfigError(problems_by_message(reasons)) from None
    shapes: dict[int, dict[str, Any]] = {}
    final_norm = parts.final_norm
    for number, block in enumerate(parts.blocks):
        place = f"blocks.{number}"
        try:
            found = plain_of(block, PlainBlock)
            shapes[number] = _numbers(found, parts.embedding.shape[1], final_norm)
        except NotPlain as error:
            reasons += [
                (f"{place}.{part}", message, "")
                for part, message in error.reasons.items()
                if f"{place}.{part}" not in named
            ]
        except ValueError as error:
            reasons.append((place, str(error), ""))
    common: dict[str, tuple[Any, int]] = {}
    for number, numbers in shapes.items():
        for key, value in numbers.items():
            expected, first = common.setdefault(key, (value, number))
            if value != expected:
                message = f"its {key} is {value}, that of blocks.{first} is {expected}"
                message += ": a plain model has one for all"
                hint = "--drop window leaves it out" if key == "window" else ""
                reasons.append((f"blocks.{number}", message, hint))
    if not reasons:
        for key, what in (("num_heads", "attention"), ("d_ff", "feed-forward")):
            if key not in common:
                reasons.append(("", f"there is no {what} left in any block", ""))
    if reasons:
        raise ConfigError(problems_by_message(reasons))
    rows = parts.embedding.shape[0] if vocab_size is None else vocab_size
    shape = PlainShape(
        vocab_size=rows,
        d_model=parts.embedding.shape[1],
        num_layers=len(parts.blocks),
        max_seq_len=parts.max_seq_len,
        tied=parts.head is None,
        **{key: value for key, (value, _) in common.items()},
    )

    @torch.no_grad()
    def made(number: int) -> PlainBlock:
        return _filled(_as_fp32(plain_of(parts.blocks[number], PlainBlock)), shape)

    return PlainModel(
        shape,
        _as_fp32(parts.embedding[:rows]),
        _as_fp32(final_norm),
        None if parts.head is None else _as_fp32(parts.head[:rows]),
        made,
    )


def has_form(part: nn.Module) -> bool:
    """Whether what ``part`` computes is what its ``plain`` says."""
    own = part.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    for of_class in type(part).__mro__:
        if "plain" in vars(of_class):
            return True
        for name, value in vars(of_class).items():
            if callable(value) and not name.startswith("__") and name not in HARMLESS:
                return False
    return False


def problems_by_message(reasons: Sequence[tuple[str, str, str]]) -> Iterator[Problem]:
    """A problem for each message, with the places where it is so."""
    places: dict[tuple[str, str], list[str]] = {}
    for place, message, hint in reasons:
        places.setdefault((message, hint), []).append(place or "the model")
    for (message, hint), where in places.items():
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        yield Problem(message, f"{where[0]}{more}", hint=hint)


def _numbers(block: PlainBlock, d_model: int, final_norm: PlainNorm) -> dict[str, Any]:
    """The numbers of a block for a :class:`PlainShape`. Raises NotPlain for tensors of other shapes
    than these ask for, and norms with several eps."""
    attention, ffn = block.attention, block.ffn
    heads, kv_heads, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    qk_norms = [each for each in (attention.q_norm, attention.k_norm) if each is not None]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "attention_norm": (block.attention_norm.weight, (d_model,)),
        "ffn_norm": (block.ffn_norm.weight, (d_model,)),
        **{f"attention.qk_norm[{n}]": (norm.weight, (width,)) for n, norm in enumerate(qk_norms)},
    }
    if heads:
        expected |= {
            "attention.q": (attention.q, (heads * width, d_model)),
            "attention.k": (attention.k, (kv_heads * width, d_model)),
            "attention.v": (attention.v, (kv_heads * width, d_model)),
            "attention.out": (attention.out, (d_model, heads * width)),
        }
    experts = isinstance(ffn, PlainExperts)
    d_ff, each = ffn.gate.shape[-2], tuple(ffn.gate.shape[:-2])
    numbers = {"num_experts": 0, "experts_per_token": 0, "renormalised": True}
    if isinstance(ffn, PlainExperts):
        router = ffn.router
        numbers = {
            "num_experts": router.weight.shape[0],
            "experts_per_token": router.experts_per_token,
            "renormalised": router.renormalised,
        }
        expected["ffn.router"] = (router.weight, (*each, d_model))
    if ffn.gate.numel():
        expected |= {
            "ffn.gate": (ffn.gate, (*each, d_ff, d_model)),
            "ffn.up": (ffn.up, (*each, d_ff, d_model)),
            "ffn.down": (ffn.down, (*each, d_model, d_ff)),
        }
    reasons = {
        name: f"its plain form has {list(tensor.shape)} in place of {list(shape)}"
        for name, (tensor, shape) in expected.items()
        if tuple(tensor.shape) != shape
    }
    if len(each) != experts:
        reasons["ffn.gate"] = f"its plain form has {ffn.gate.dim()} dimensions"
    if len(qk_norms) == 1:
        reasons["attention"] = "its plain form has one of q_norm and k_norm alone"
    epses = {norm.eps for norm in (block.attention_norm, block.ffn_norm, final_norm, *qk_norms)}
    if len(epses) > 1:
        listed = ", ".join(f"{eps:g}" for eps in sorted(epses))
        reasons["norms"] = f"their eps are {listed}, and a plain model has one"
    if reasons:
        raise NotPlain(reasons)
    found: dict[str, Any] = {"norm_eps": final_norm.eps}
    if heads:
        found |= {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width}
        found |= {"rope": attention.rope, "qk_norm": bool(qk_norms)}
        found["window"] = attention.window
    if ffn.gate.numel():
        found |= {"d_ff": d_ff, **numbers}
    return found


def _filled(block: PlainBlock, shape: PlainShape) -> PlainBlock:
    """``block`` with layers of this shape, which do nothing, in the place of those that were left
    out."""
    if not block.attention.num_heads:
        width, norm = shape.head_dim, PlainNorm(torch.ones(shape.head_dim), shape.norm_eps)
        read, shared = shape.num_heads * width, shape.num_kv_heads * width
        q, k, v = (torch.zeros(rows, shape.d_model) for rows in (read, shared, shared))
        qk_norm = norm if shape.qk_norm else None
        sizes = (shape.num_heads, shape.num_kv_heads, width)
        out = torch.zeros(shape.d_model, read)
        attention = PlainAttention(q, k, v, out, *sizes, shape.rope, qk_norm, qk_norm)
        block = replace(block, attention=attention)
    if not block.ffn.gate.numel():
        each = (shape.num_experts,) if shape.num_experts else ()
        gate, up = (torch.zeros(*each, shape.d_ff, shape.d_model) for _ in range(2))
        ffn: PlainFFN | PlainExperts = PlainFFN(gate, up, gate.mT.contiguous())
        if shape.num_experts:
            weight = torch.zeros(shape.num_experts, shape.d_model)
            router = PlainRouter(weight, shape.experts_per_token, shape.renormalised)
            ffn = PlainExperts(router, gate, up, gate.mT.contiguous())
        block = replace(block, ffn=ffn)
    return block


def with_tensors(form: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A plain form, or a tensor, with what ``change`` makes of its tensors; a whole model with
    blocks that are changed when they are made."""
    if isinstance(form, Tensor):
        return change(form)
    if not is_dataclass(form) or isinstance(form, type | PlainRope | PlainShape):
        return form
    made = {each.name: with_tensors(getattr(form, each.name), change) for each in fields(form)}
    if isinstance(form, PlainModel):
        made["block"] = lambda number: with_tensors(form.block(number), change)
    return replace(form, **made)


def _as_fp32(form: Any) -> Any:
    """A tensor, or a form with its tensors, in fp32 on the CPU."""
    return with_tensors(form, lambda t: t.detach().to("cpu", torch.float32).contiguous())
