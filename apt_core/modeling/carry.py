"""Carries weights, their averages and optimizer state from one structure of a model to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.modeling.blocks import block_stack
from apt_core.modeling.init import initialize_parameters
from apt_core.modeling.transforms import ModelTransform, Rule, unchanged
from apt_core.parallel.world import ALONE, World, is_sharded, shard_like, whole_tensor

CPU = torch.device("cpu")


@torch.no_grad()
def materialize(
    transform: ModelTransform,
    old: nn.Module,
    *,
    carry: bool = True,
    faults: list[Exception] | None = None,
    seed: int,
    num_layers: int,
    device: torch.device = CPU,
    world: World = ALONE,
    gathered: Callable[[nn.Module], torch.dtype | None] = lambda _: None,
) -> nn.Module:
    """The new model on ``device``, sharded like the run's, with weights made from those of ``old``;
    other parameters are initialised by (``seed``, name). ``gathered`` returns the dtype in which
    its layers are gathered.

    ``old`` is not changed. Errors of rules are added to ``faults``, if given, so that a process
    with an error still takes part in the collectives. Without ``carry`` rules are not called, for
    weights that are loaded later. Raises ValueError for a new buffer that no module computes.
    """
    new = transform.model
    values = dict(old.named_parameters())
    # A model to be sharded is assembled on the CPU, as at the start of a run.
    _give_memory(new, CPU if world.sharding == "fsdp" else device)
    names = [name for name, _ in new.named_parameters()]
    origins = {name: transform.origin(name, values) if carry else None for name in names}
    anew = {name for name, origin in origins.items() if origin is None and carry}
    initialize_parameters(new, seed, num_layers=num_layers, only=anew)
    for name, parameter in new.named_parameters():
        origin = origins[name]
        if origin is not None:
            whole = whole_tensor(values[origin.source].detach())
            others = [whole_tensor(values[other].detach()) for other in origin.others]
            parameter.copy_(_by(origin.value, whole, parameter, name, faults, others))
    buffers = dict(old.named_buffers())
    for name, buffer in new.named_buffers():
        source = transform.old_name(name)
        if source in buffers and buffers[source].shape == buffer.shape:
            buffer.copy_(buffers[source])
        elif not _computes_buffers(new, name):
            raise ValueError(
                f"the new model has the buffer {name}, which the old one has not: its module needs "
                "a reset_buffers() that computes it"
            )
    call_buffers_loaded(new)
    with torch.enable_grad():
        dtype = gathered(new)
    world.shard(new, block_stack(new)[1], device, dtype)
    _carry_modes(transform, old, new)
    return new.to(device)


def _carry_modes(transform: ModelTransform, old: nn.Module, new: nn.Module) -> None:
    """Give modules of ``new`` the training mode of those in ``old`` whose place they take; a new
    module gets that of its parent, unless it was made in eval mode."""
    before = {name: module.training for name, module in old.named_modules()}
    modes: dict[str, bool] = {}
    for name, module in new.named_modules():
        source = transform.old_name(name)
        if source in before:
            modes[name] = before[source]
        else:
            modes[name] = module.training and modes[name.rpartition(".")[0]]
        module.training = modes[name]


def call_buffers_loaded(model: nn.Module) -> None:
    """Call ``buffers_loaded()`` of every module that has it, so that it can update Python values
    that it derives from buffers."""
    for module in model.modules():
        if hasattr(module, "buffers_loaded"):
            module.buffers_loaded()


@torch.no_grad()
def carry_average(
    transform: ModelTransform,
    averages: Mapping[str, Tensor],
    new: nn.Module,
    faults: list[Exception] | None = None,
) -> dict[str, Tensor]:
    """The averages of the weights of ``new``, made from the ``averages`` of the old weights by
    name; a parameter without one gets its weight. ``faults`` as in :func:`materialize`."""
    carried = {}
    for name, parameter in new.named_parameters():
        origin = transform.origin(name, averages)
        if origin is None:
            carried[name] = parameter.detach().clone()
        else:
            whole = whole_tensor(averages[origin.source])
            others = [whole_tensor(averages[other]) for other in origin.others]
            whole = _by(origin.value, whole, parameter, name, faults, others)
            carried[name] = shard_like(whole, parameter).clone()
    return carried


@torch.no_grad()
def carry_optimizer_state(
    transform: ModelTransform,
    old: nn.Module,
    old_optimizer: Optimizer,
    new: nn.Module,
    new_optimizer: Optimizer,
    moments: Mapping[str, int],
    faults: list[Exception] | None = None,
) -> None:
    """Give ``new_optimizer``, which has taken no step, the state of ``old_optimizer``. They share
    state that is carried unchanged, so only one of them may take another step.

    ``moments`` are those of the optimizer's provider; ``faults`` as in :func:`materialize`. Raises
    ValueError for state of its parameter's size that is not among the moments.
    """
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    names = {id(parameter): name for name, parameter in after.items()}
    packed, shared = new_optimizer.state_dict(), set[int]()
    ordered = [p for group in new_optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(ordered):
        name = names[id(parameter)]
        origin = transform.origin(name, before)
        if origin is None or before[origin.source] not in old_optimizer.state:
            continue
        source = before[origin.source]
        rules: dict[int, Rule] = {1: origin.first_moment, 2: origin.second_moment}
        state = packed["state"][index] = {}
        for key, value in old_optimizer.state[source].items():
            rule = rules[moments[key]] if key in moments else None
            # A copy has a state of its own.
            kept = rule is unchanged and id(value) not in shared
            if kept and value.shape == parameter.shape and not is_sharded(parameter):
                state[key] = value
                shared.add(id(value))
            elif rule is not None:
                whole, what = whole_tensor(value), f"{name}//{key}"
                whole = _by(rule, whole, parameter, what, faults)
                state[key] = shard_like(whole, parameter).clone()
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise ValueError(
                    f"{type(old_optimizer).__name__} keeps {key!r} of {origin.source}, and its "
                    "provider does not say in moments what that is: it cannot be carried over"
                )
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value
    new_optimizer.load_state_dict(packed)


def carry_frozen(transform: ModelTransform, old: nn.Module, new: nn.Module) -> None:
    """Freeze parameters of ``new`` that are made from frozen ones of ``old``."""
    before = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        origin = transform.origin(name, before)
        if origin is not None and not before[origin.source].requires_grad:
            parameter.requires_grad_(False)


def _by(
    rule: Rule,
    whole: Tensor,
    target: Tensor,
    name: str,
    faults: list[Exception] | None,
    others: Sequence[Tensor] = (),
) -> Tensor:
    """The result of ``rule`` for ``whole`` and ``others``; arbitrary values after one of the
    ``faults``."""
    if rule is unchanged and whole.shape == target.shape:
        return whole
    try:
        # A copy: a rule that writes to what it is given must not write to the run's model.
        made = rule(whole.clone(), *(other.clone() for other in others))
        if made.shape != target.shape:
            raise ValueError(
                f"the rule for {name} gives {list(made.shape)}, and {list(target.shape)} is wanted"
            )
    except Exception as error:
        if faults is None:
            raise
        faults.append(error)
        return whole.new_zeros(target.shape)
    return made


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Move a model from the meta device to ``device`` with undefined values; shared tensors stay
    shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = made.setdefault(id(tensor), _empty_like(tensor, device))


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    if not isinstance(tensor, nn.Parameter):
        return empty
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)


def _computes_buffers(model: nn.Module, name: str) -> bool:
    """Whether a module around the buffer has ``reset_buffers()``."""
    path = name.rpartition(".")[0]
    while path:
        if hasattr(model.get_submodule(path), "reset_buffers"):
            return True
        path = path.rpartition(".")[0]
    return hasattr(model, "reset_buffers")
