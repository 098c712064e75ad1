"""Converts the objects of a run to the tensors and JSON of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import inf, isclose
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.error_text import one_line
from apt_core.errors import CheckpointError
from apt_core.log import get_logger
from apt_core.optim.build import PLAN
from apt_core.parallel.world import local_part
from apt_core.plugin_manager import PluginManager
from apt_core.runs.checkpoint import join_tensors, split_tensors
from apt_core.runs.run_state import RATES, Group
from apt_core.runs.tensor_files import SavedTensors

log = get_logger("apt.checkpoint")

ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
"""State that torch's fused optimizers keep for each element of a parameter."""

SEPARATOR = "//"
"""Separates a parameter's name from that of its optimizer state (``exp_avg``)."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one under its first name only."""
    unique: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        unique.setdefault(id(tensor), name)
    return {name: tensors[name] for name in unique.values()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>//<state>`` tensors.

    Raises CheckpointError for state that is neither a tensor nor a number.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor | int | float):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as state {key!r} "
                    f"of {name}: only tensors and numbers can be saved"
                )
            tensors[f"{name}{SEPARATOR}{key}"] = torch.as_tensor(value)
    return tensors


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[Group]:
    """What an optimizer keeps of each group, as far as it is JSON: ``parameters``, their names,
    ``settings`` but for the rate, which is a function of the plan and the position, and the
    ``plan``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        Group.model_construct(
            parameters=[names[id(parameter)] for parameter in group["params"]],
            settings={
                key: value
                for key, value in group.items()
                if key not in RATES and isinstance(value, bool | int | float | str)
            },
            plan=group.get(PLAN, {}),
        )
        for group in optimizer.param_groups
    ]


def load_optimizer_groups(
    model: nn.Module,
    optimizer: Optimizer,
    saved: Sequence[Group],
    *,
    factors: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Restore the groups. Raises CheckpointError for groups of other parameters, or made with other
    settings. ``factors`` are allowed changes of the rates: the second for hidden matrices, the
    first for all others."""
    own = optimizer_groups(model, optimizer)
    if [group.parameters for group in own] != [group.parameters for group in saved]:
        raise CheckpointError(
            "the checkpoint has other parameter groups: a plugin that chooses groups came, went or "
            "changed its mind"
        )
    changed = [
        f"{key} of {_first(now.parameters)} is {now.plan.get(key)!r} and was {was.get(key)!r}"
        for now, before in zip(own, saved, strict=True)
        # Checkpoints of earlier versions have no plan.
        for was in [before.plan or now.plan]
        for key in {**was, **now.plan}
        if was.get(key) != now.plan.get(key)
        and not (key == "lr" and _rate_as_allowed(was, now, factors))
    ]
    if changed:
        raise CheckpointError(
            f"parameter groups are made with other settings than in the checkpoint: "
            f"{'; '.join(changed[:MOST_TOLD])}{' …' if len(changed) > MOST_TOLD else ''}"
        )
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update(values.settings)


def _rate_as_allowed(was: Mapping[str, Any], now: Group, factors: tuple[float, float]) -> bool:
    """Whether the rate of the group has changed exactly by the allowed factor."""
    factor = factors[bool(was.get("hidden_matrices"))]
    before, after = was.get("lr"), now.plan.get("lr")
    if not (isinstance(before, int | float) and isinstance(after, int | float)):
        return False
    return isclose(after, before * factor, rel_tol=1e-9)


MOST_TOLD = 3


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    saved: SavedTensors,
    states: Collection[frozenset[str]] = (),
) -> None:
    """Put the state back, sharded as the parameters are. ``states`` are those that the optimizer's
    provider knows of a parameter.

    Raises CheckpointError for state of a parameter that is not there, for other state than these,
    and for one of another shape or type than a fused step takes it to have.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    by_parameter: dict[str, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for key, (shape, dtype) in saved.shapes.items():
        name, _, state = key.rpartition(SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None or name not in ordered:
            raise CheckpointError(f"the checkpoint has optimizer state of the unknown {name!r}")
        if states or "fused" in optimizer.defaults:
            _require_form(key, state, parameter, shape, dtype)
        if parameter.shape == shape:
            tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        targets[key] = by_parameter.setdefault(name, {})[state] = tensor
    for name, own in by_parameter.items():
        _require_states(name, own, states)
    saved.read_into(targets, "optimizer")
    packed = optimizer.state_dict()
    packed["state"] = {
        index: by_parameter[name] for index, name in enumerate(ordered) if name in by_parameter
    }
    try:
        optimizer.load_state_dict(packed)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not type(optimizer).__module__.startswith("torch."):
            raise  # it may have an author
        raise CheckpointError(
            f"{type(optimizer).__name__} does not take the state that the checkpoint holds of it: "
            f"{one_line(error)}"
        ) from error


def _require_form(
    key: str, state: str, parameter: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raises CheckpointError for state that a fused step, which looks at no size, would read or
    write beyond its end, or that would be cast."""
    expected = {
        **dict.fromkeys(ELEMENTWISE, (parameter.shape, parameter.dtype)),
        "step": (torch.Size(), torch.float32),
    }.get(state)
    if expected is not None and (shape, dtype) != expected:
        raise CheckpointError(
            f"the checkpoint's optimizer state {key} is {dtype} {list(shape)}, not "
            f"{expected[1]} {list(expected[0])}"
        )


def _require_states(name: str, state: Collection[str], states: Collection[frozenset[str]]) -> None:
    """Raises CheckpointError where a parameter's state is none of ``states``, as far as any are
    known."""
    if not states:
        return
    if frozenset(state) not in states:
        known = " or ".join(", ".join(sorted(names)) for names in states)
        raise CheckpointError(
            f"the checkpoint's optimizer state of {name} is {', '.join(sorted(state))}, not {known}"
        )


def split_states(
    states: Iterable[tuple[str, Any]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON values of the states of plugins, by plugin, and the tensors that they refer to."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for plugin, state in states:
        own: dict[str, Tensor] = {}
        values[plugin] = split_tensors(state, plugin, own)
        tensors.update(own)
    return values, tensors


def joined_states(
    manager: PluginManager, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Any]]:
    """The saved states of the plugins that are active and can load them."""
    for plugin, state in values.items():
        if not manager.has_plugin(plugin):
            log.warning("the checkpoint holds state of plugin %s, which is not active", plugin)
        elif not manager.implements(plugin, "apt_load_state_dict"):
            log.warning("plugin %s saved state but does not implement apt_load_state_dict", plugin)
        else:
            yield plugin, join_tensors(state, tensors)


MOST_NAMED = 4
"""The number of tensors that a message names."""


@torch.no_grad()
def names_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a NaN or an infinity in this process's part; waits for the device
    once."""
    parts = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
    parts = {n: part for n, part in parts.items() if part.is_floating_point() and part.numel()}
    if not parts:
        return []
    largest = [norm.float() for norm in torch._foreach_norm([*parts.values()], ord=inf)]
    finite = torch.isfinite(torch.stack(largest)).tolist()
    return [name for name, good in zip(parts, finite, strict=True) if not good]


def listed(names: list[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
