"""The value that a plugin returns to change the structure of a model in mid-run.

The kernel builds the new structure, carries weights, optimizer state and averages into it by the
rules that are declared here, compares the loss of a fixed batch before and after, and only then
lets the run go on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Size, Tensor, nn

from apt_core.plain_values import number, within

SHOWN = 5
"""The number of problems that a message lists."""

Rule = Callable[..., Tensor]
"""Makes the unsharded value of a new parameter from that of an old one, and for some from those of
others after it."""


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Carried:
    """The rules that make a parameter of the new structure from one of the old.

    ``source`` names the old parameter. ``value`` maps its value, and its moving averages, to the
    new ones. ``first_moment`` and ``second_moment`` map the optimizer's state of the gradient
    (``exp_avg``, ``momentum_buffer``) and of its square (``exp_avg_sq``): if the new gradient is c
    times the old one, they multiply by c and by c². No rule may change its argument.

    Where ``others`` name further old parameters, ``value`` is called with theirs after that of
    ``source``.
    """

    source: str
    value: Rule = unchanged
    first_moment: Rule = unchanged
    second_moment: Rule = unchanged
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelTransform:
    """A new structure of a model, and the rules that make its parameters from the old ones.

    ``model`` is on the meta device. ``origins`` maps names of new parameters to rules; a name that
    both structures have is carried over unchanged, and a new name without a rule is initialised as
    in a new model, with fresh optimizer state. ``dropped`` names old parameters that are not used.
    ``moved`` maps names of new modules to those of old ones, whose parameters, buffers and modes
    they take over: for modules that are elsewhere than before, and for copies.

    The switch is undone if the loss of a fixed batch changes by more than ``tolerance`` (nats per
    token, in fp32). Where the new model has more ids, both losses are those over the first
    ``compared_ids``.

    ``model_settings`` are the settings of the profile's section ``model`` that the new structure
    has, where they are others: transforms that follow find them in their ``config``, rates by width
    and plans follow them.

    For plans: ``active_share`` maps names of new parameters to the share that one token uses (by
    default 1); ``added_flops`` are those that the forward of one token has more than with the old
    structure (a multiply-add counts as two).
    """

    model: nn.Module
    origins: Mapping[str, Carried] = field(default_factory=dict)
    dropped: Collection[str] = ()
    tolerance: float = 1e-5
    active_share: Mapping[str, float] = field(default_factory=dict)
    added_flops: int = 0
    moved: Mapping[str, str] = field(default_factory=dict)
    compared_ids: int | None = None
    model_settings: Mapping[str, Any] = field(default_factory=dict)

    def origin(self, name: str, old: Collection[str]) -> Carried | None:
        """The rule for the new parameter ``name``, given the ``old`` names; None if it is
        initialised anew."""
        if name in self.origins:
            return self.origins[name]
        source = self.old_name(name)
        return Carried(source) if source in old else None

    def old_name(self, name: str) -> str:
        """The name in the old model of what the new one has as ``name``: a module, a parameter or a
        buffer, which need not be there."""
        head, rest = name, ""
        while head:
            if head in self.moved:
                return self.moved[head] + rest
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
        return name

    def check(self, before: Mapping[str, Size]) -> None:
        """Check this transform against the old shapes ``before``. Raises ValueError with all
        problems, and TypeError for a field of the wrong type."""
        self._check_types()
        after = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        problems = [f"{name} is not on the meta device" for name in _real_tensors(self.model)]
        for what, names, structure, known in (
            ("origins", self.origins, "new", after),
            ("active_share", self.active_share, "new", after),
            ("dropped", self.dropped, "old", before),
        ):
            problems += [f"{what}: the {structure} model has no {n}" for n in {*names} - {*known}]
        modules = {name for name, _ in self.model.named_modules()}
        problems += [f"moved: the new model has no module {n}" for n in {*self.moved} - modules]
        used = set(self.dropped)
        for name, shape in after.items():
            origin = self.origin(name, before)
            if origin is None:
                continue
            sources = (origin.source, *origin.others)
            used.update(sources)
            missing = [source for source in sources if source not in before]
            problems += [f"{name} comes from {n}, which the old model has not" for n in missing]
            if name not in self.origins and before[origin.source] != shape:
                problems.append(
                    f"{name} is {list(before[origin.source])} in the old model and "
                    f"{list(shape)} in the new one: say in origins how it is carried over"
                )
        problems += [
            f"nothing is made of the old {name}: carry it over, or name it in dropped"
            for name in before.keys() - used
        ]
        if problems:
            problems = sorted(problems)
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ValueError(
                "the transform does not fit the model: " + "; ".join(problems[:SHOWN]) + more
            )

    def _check_types(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"its model is a {type(self.model).__name__}, not a module")
        if isinstance(self.dropped, str):
            raise TypeError("dropped is text, not a list of names")
        for what, names in (("moved", self.moved), ("model_settings", self.model_settings)):
            if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"{what} is no mapping from names")
        if not all(isinstance(name, str) for name in self.moved.values()):
            raise TypeError("moved is no mapping to names")
        for name, carried in self.origins.items():
            if not isinstance(carried, Carried):
                raise TypeError(f"the origin of {name} is a {type(carried).__name__}, not Carried")
        if self.compared_ids is not None and not (
            type(self.compared_ids) is int and self.compared_ids > 0
        ):
            raise ValueError(f"compared_ids is {self.compared_ids!r}, not a number of ids")
        for name, share in self.active_share.items():
            within(share, f"the active_share of {name}", 1.0)
        within(self.tolerance, "tolerance")
        if not isfinite(number(self.added_flops, "added_flops")):
            raise ValueError(f"added_flops is {self.added_flops}")


def _real_tensors(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if not tensor.is_meta]
