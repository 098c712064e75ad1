"""What a plugin returns that changes the structure of a model in mid-run.

The kernel builds the new structure, carries weights, optimizer state and averages into it by the
rules that are declared here, compares the loss of a fixed batch before and after, and only then
lets the run go on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite

from torch import Size, Tensor, nn

from apt_core.plain_values import number, within

SHOWN = 5
"""Of so many problems a message tells."""

Rule = Callable[[Tensor], Tensor]
"""From the whole tensor that belongs to an old parameter to that of a new one."""


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Carried:
    """Where a parameter of the new structure comes from.

    ``source`` is the name of a parameter of the old structure. ``value`` makes the new value of its
    value, and a new average of its average. ``first_moment`` and ``second_moment`` do so for what
    the optimizer keeps of the parameter's gradient (``exp_avg``, ``momentum_buffer``) and of the
    gradient's square (``exp_avg_sq``): where the new gradient is c times the old one, they multiply
    by c and by c². No rule may change the tensor that it is given.
    """

    source: str
    value: Rule = unchanged
    first_moment: Rule = unchanged
    second_moment: Rule = unchanged


@dataclass(frozen=True)
class ModelTransform:
    """A new structure for a model and how its parameters come from those of the old one.

    ``model`` is on the meta device. ``origins`` has the rules by the name of a new parameter: names
    that both structures have are carried over by themselves, and a new one without a rule is
    initialised as in a new model, with a fresh state of the optimizer. ``dropped`` names the old
    parameters that nothing is made of. The switch is taken back if the loss of a fixed batch
    changes by more than ``tolerance`` (nats per token, in fp32).

    For the plan of a run: ``active_share`` is the share of a new parameter, by name, that one token
    passes through (1 where it is not named), ``added_flops`` what the forward of one token computes
    beyond that of the old structure (a multiply-add as two).
    """

    model: nn.Module
    origins: Mapping[str, Carried] = field(default_factory=dict)
    dropped: Collection[str] = ()
    tolerance: float = 1e-5
    active_share: Mapping[str, float] = field(default_factory=dict)
    added_flops: int = 0

    def origin(self, name: str, old: Collection[str]) -> Carried | None:
        """Where the new parameter ``name`` comes from, given the names of the old ones; None for
        one that starts anew."""
        return self.origins.get(name) or (Carried(name) if name in old else None)

    def check(self, before: Mapping[str, Size]) -> None:
        """Raise ValueError, with every problem, where this does not fit a structure whose
        parameters have the shapes ``before``; TypeError where a field is not what it says."""
        self._check_types()
        after = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        problems = [f"{name} is not on the meta device" for name in _real_tensors(self.model)]
        for what, names, structure, known in (
            ("origins", self.origins, "new", after),
            ("active_share", self.active_share, "new", after),
            ("dropped", self.dropped, "old", before),
        ):
            problems += [f"{what}: the {structure} model has no {n}" for n in {*names} - {*known}]
        used = set(self.dropped)
        for name, shape in after.items():
            origin = self.origin(name, before)
            if origin is None:
                continue
            used.add(origin.source)
            if origin.source not in before:
                problems.append(f"{name} comes from {origin.source}, which the old model has not")
            elif name not in self.origins and before[name] != shape:
                problems.append(
                    f"{name} is {list(before[name])} in the old model and {list(shape)} in the "
                    "new one: say in origins how it is carried over"
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
        for name, carried in self.origins.items():
            if not isinstance(carried, Carried):
                raise TypeError(f"the origin of {name} is a {type(carried).__name__}, not Carried")
        for name, share in self.active_share.items():
            within(share, f"the active_share of {name}", 1.0)
        within(self.tolerance, "tolerance")
        if not isfinite(number(self.added_flops, "added_flops")):
            raise ValueError(f"added_flops is {self.added_flops}")


def _real_tensors(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if not tensor.is_meta]
