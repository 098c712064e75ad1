"""Finds the weights of a model that are rounded, and changes its layers so that they compute with
rounded ones.

Rounded are the matrices of the blocks (:func:`~apt_core.optim.parameter_groups.hidden_matrices`),
of an attention the matrices that it computes with (``projections``): those of TVA are folded first.
A layer names in ``full_precision`` what is to stay as it is. Embeddings and the projection to
logits are not in the blocks; rows of routers are learned separately, and are no such matrices.

A layer gets a class derived from its own in which the weight is computed: it does not know of it,
and whatever asks for the weight gets rounded values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt_core.modeling.blocks import block_stack
from apt_core.modeling.layers.attention import SelfAttention
from apt_core.modeling.lr_scale import declared
from apt_core.modeling.plain import has_form
from apt_core.modeling.row_decoding import CALLED, takes_part
from apt_core.optim.parameter_groups import hidden_matrices
from apt_core.providers.plain import PlainAttention
from apt_plugins.quant.cpu_products import StoredWeight
from apt_plugins.quant.rounding import Rounding, signal_to_noise

PROJECTIONS = ("qkv_weight", "out_weight")
"""The names of what an attention's ``projections`` gives."""

CODES, SCALES = "_codes", "_scales"
"""What the names of parameters end in that are kept in place of a weight."""

STAYS = {
    "elementwise": "its rows are learned separately",
    "full_precision": "its layer needs it exactly",
}
"""The attributes in which a layer names parameters that stay as they are, and why."""

OWN = "own_class"
"""The attribute of a derived class that has the class it was derived from."""


@dataclass(frozen=True)
class Kept:
    """A weight that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Layer:
    """A module at ``path`` of whose weights the ones in ``roundings`` are rounded; ``dropped`` are
    parameters of its that only these were made of."""

    path: str
    module: nn.Module
    roundings: dict[str, Rounding]
    projects: bool = False
    dropped: Sequence[str] = ()

    def weights(self) -> dict[str, Tensor]:
        """The weights that are rounded, by their names in the module."""
        if self.projects:
            found = dict(zip(PROJECTIONS, cast(Any, self.module).projections(), strict=True))
        else:
            found = {name: getattr(self.module, name) for name in self.roundings}
        return {name: found[name].detach() for name in self.roundings}

    def name(self, weight: str) -> str:
        return f"{self.path}.{weight}"


@dataclass(frozen=True)
class Choice:
    """The layers of a model that are rounded, and the weights that stay."""

    layers: list[Layer] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def choose(model: nn.Module, rounding: Rounding) -> Choice:
    """What of ``model``, which may be on the meta device, is rounded to ``rounding``; a function of
    its structure alone."""
    stack = block_stack(model)[0]
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    matrices = hidden_matrices(model)
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        for attribute, reason in STAYS.items():
            reasons.update(dict.fromkeys(declared(path, module, attribute).values(), reason))
    matrices = {name: count for name, count in matrices.items() if name not in reasons}
    choice = Choice()
    seen: set[str] = set()
    for path, module in model.named_modules():
        if stack and path.startswith(f"{stack}.") and _projects(module):
            attention = cast(SelfAttention, module)
            shapes = dict(zip(PROJECTIONS, (w.shape for w in attention.projections()), strict=True))
            own = [name for name in attention.projected if name in module._parameters]
            taken = _layer(choice, path, module, shapes, rounding, projects=True, dropped=own)
            seen.update(f"{path}.{name}" for name in (own if taken else ()))
    parameters = dict(model.named_parameters())
    for path, module in model.named_modules():
        names = [name for name in module._parameters if f"{path}.{name}" in matrices]
        names = [name for name in names if f"{path}.{name}" not in seen]
        shapes = {}
        for name in names:
            parameter = parameters[f"{path}.{name}"]
            if shared[id(parameter)] > 1:
                reason = "several modules share it"
                choice.kept.append(Kept(f"{path}.{name}", tuple(parameter.shape), reason))
                seen.add(f"{path}.{name}")
            else:
                shapes[name] = parameter.shape
        _layer(choice, path, module, shapes, rounding)
        seen.update(f"{path}.{name}" for name in shapes)
    for name, parameter in parameters.items():
        if name not in seen and parameter.ndim >= 2:
            inside = bool(stack) and name.startswith(f"{stack}.")
            reason = reasons.get(name, "no matrix") if inside else "outside of the blocks"
            choice.kept.append(Kept(name, tuple(parameter.shape), reason))
    return choice


def _projects(module: nn.Module) -> bool:
    """Whether ``module`` is an attention that computes with its ``projections`` alone, as those do
    whose ``forward`` is that of the class with ``rows``."""
    if not isinstance(module, SelfAttention):
        return False
    classes = type(module).__mro__
    return next("rows" in vars(c) for c in classes if {"rows", *CALLED} & vars(c).keys())


def _layer(
    choice: Choice,
    path: str,
    module: nn.Module,
    shapes: dict[str, torch.Size],
    rounding: Rounding,
    *,
    projects: bool = False,
    dropped: Sequence[str] = (),
) -> bool:
    """Add to ``choice`` what of a module's weights with these ``shapes`` is rounded. An attention's
    are rounded both or not at all."""
    found = {name: rounding.for_width(shape[-1]) for name, shape in shapes.items()}
    narrow = [name for name, own in found.items() if own is None]
    if projects and narrow:
        return False
    for name in narrow:
        shape = tuple(shapes[name])
        choice.kept.append(Kept(f"{path}.{name}", shape, f"{shape[-1]} columns do not group"))
    roundings = {name: own for name, own in found.items() if own is not None}
    if roundings:
        choice.layers.append(Layer(path, module, roundings, projects, dropped or [*roundings]))
    return bool(roundings)


# Packed -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A weight that was packed; ``noise`` is its ratio of signal to noise in dB."""

    name: str
    shape: tuple[int, ...]
    rounding: Rounding
    noise: float
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def pack(
    layers: Sequence[Layer], done: Callable[[Measured], None] = lambda measured: None
) -> list[str]:
    """Keep the weights of ``layers`` as integers, in place. Returns the names of the parameters
    that are there no more. ``done`` is called after each, unless they are on the meta device."""
    gone = []
    for layer in layers:
        weights = layer.weights()
        for name in layer.dropped:
            gone.append(layer.name(name))
            del layer.module._parameters[name]
        for name, weight in weights.items():
            rounding = layer.roundings[name]
            codes, scales = rounding.round(weight)
            kept = rounding.packed(codes)
            for end, tensor in ((CODES, kept), (SCALES, scales)):
                parameter = nn.Parameter(tensor.contiguous(), requires_grad=False)
                layer.module.register_parameter(f"{name}{end}", parameter)
            if not weight.is_meta:
                noise = signal_to_noise(weight, rounding.values(codes, scales))
                before, after = 4 * weight.numel(), kept.nbytes + scales.nbytes
                shape = tuple(weight.shape)
                done(Measured(layer.name(name), shape, rounding, noise, before, after))
        _derive(layer, _stored_values)
    return gone


def _stored_values(module: nn.Module, name: str, rounding: Rounding) -> Tensor:
    kept, scales = (module._parameters[f"{name}{end}"] for end in (CODES, SCALES))
    assert kept is not None and scales is not None
    return StoredWeight(kept, scales, rounding).values()


# Rounded in training ----------------------------------------------------------------------------


def fake(layers: Sequence[Layer]) -> None:
    """Let ``layers`` compute with rounded weights, in place; their parameters stay."""
    for layer in layers:
        _derive(layer, _rounded_parameter)


def without_fake(model: nn.Module) -> bool:
    """Undo :func:`fake`; returns whether there was anything to undo."""
    found = [each for each in model.modules() if hasattr(type(each), OWN)]
    for module in found:
        module.__class__ = getattr(type(module), OWN)
    return bool(found)


def _rounded_parameter(module: nn.Module, name: str, rounding: Rounding) -> Tensor:
    weight = module._parameters[name]
    assert weight is not None
    # A sharded one is whole inside the forward, where alone it is computed with.
    return weight if isinstance(weight, DTensor) else rounding.fake(weight)


# Derived classes --------------------------------------------------------------------------------


def _derive(layer: Layer, values: Callable[[nn.Module, str, Rounding], Tensor]) -> None:
    """Give the module of ``layer`` a class in which ``values`` gives its weights."""
    own = type(layer.module)
    attributes: dict[str, Any] = {"__module__": own.__module__, OWN: own}
    if layer.projects:
        attributes |= _attention_methods(own, layer.roundings, values, plain=has_form(layer.module))
    else:
        for name, rounding in layer.roundings.items():
            attributes[name] = _computed(name, rounding, values)
        if values is _stored_values and _is_experts(layer.module):
            from apt_plugins.quant.experts import decoding_of_stored

            attributes["decoding"] = decoding_of_stored
    layer.module.__class__ = type(own.__name__, (own,), attributes)


def _computed(
    name: str, rounding: Rounding, values: Callable[[nn.Module, str, Rounding], Tensor]
) -> property:
    return property(lambda module: values(module, name, rounding))


def _attention_methods(
    own: type[Any],
    roundings: dict[str, Rounding],
    values: Callable[[nn.Module, str, Rounding], Tensor],
    *,
    plain: bool,
) -> dict[str, Any]:
    """What an attention derived from ``own`` overrides."""

    def projections(self: Any) -> tuple[Tensor, Tensor]:
        if values is _stored_values:
            found = [values(self, name, roundings[name]) for name in PROJECTIONS]
        else:
            given = zip(PROJECTIONS, own.projections(self), strict=True)
            found = [roundings[name].fake(weight) for name, weight in given]
        return found[0], found[1]

    def plain_form(self: Any) -> PlainAttention:
        return cast(PlainAttention, self.plain_attention(*self.projections()))

    methods: dict[str, Any] = {"projections": projections}
    return {**methods, "plain": plain_form} if plain else methods


def _is_experts(module: nn.Module) -> bool:
    from apt_plugins.moe.experts import Experts

    return isinstance(module, Experts) and takes_part(module, "decoding")


def stored_weights(model: nn.Module) -> Iterator[str]:
    """The names of the weights of ``model`` that are kept as integers."""
    for name, _ in model.named_parameters():
        if name.endswith(SCALES):
            yield name.removesuffix(SCALES)
