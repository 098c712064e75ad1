"""Measures the memory of training a model without allocating it.

One micro-batch goes forward and backward through a model of fake tensors, which have sizes but no
values, while every allocation is counted. Of a deep model only some layers are measured, and again
with one more layer of each kind: memory is affine in the number of layers of a kind, so the result
for the whole model is exact to the byte.

For a GPU its operators are emulated (:mod:`apt_core.planning.gpu_operators`).

Not counted: fragmentation of the allocator, workspaces of kernels, libraries (some hundred MiB),
memory of plugins beyond what ``apt_costs`` says, the computation of their loss terms, and what
torch.compile saves by fusing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apt_core.data.batches import Batch
from apt_core.device import autocast, autocast_dtype, planned_capability, resolve_device
from apt_core.error_text import one_line
from apt_core.kernel import Kernel
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.calling import forward_batch, losses_in_fp32
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.costs import layers_of
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.modeling.modes import eval_mode
from apt_core.modeling.structure import base_structure
from apt_core.optim.build import decides_on_device, measured_optimizer
from apt_core.planning.gpu_operators import GPUOperators
from apt_core.types import PluginCosts

CPU = torch.device("cpu")
NO_COSTS = PluginCosts()


@dataclass(frozen=True)
class Weights:
    """Bytes of a model that do not depend on the batch: of all parameters, of the trained ones, of
    buffers, and of the parameters in the largest layer and outside the layers."""

    parameters: int
    trainable: int
    tables: int
    largest_layer: int
    outside: int

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        parameters = count_bytes(model.parameters())
        layers = [count_bytes(layer.parameters()) for layer in layers_of(model)]
        return cls(
            parameters=parameters,
            trainable=count_bytes(p for p in model.parameters() if p.requires_grad),
            tables=count_bytes(model.buffers()),
            largest_layer=max(layers, default=0),
            outside=parameters - sum(layers),
        )


class Footprint:
    """The memory of training a model on ``device`` (by default the profile's); each figure is
    measured when it is first needed.

    ``structure`` is the model on the meta device, by default the one at the start of the run;
    ``costs`` are those of plugins. ``notes`` explain failed measurements.
    """

    def __init__(
        self,
        kernel: Kernel,
        device: torch.device | None = None,
        structure: nn.Module | None = None,
        costs: PluginCosts = NO_COSTS,
    ) -> None:
        self.config, self.costs = kernel.config, costs
        self._registry = kernel.registry
        self._attention_names = ModelBuilder(self.config, self._registry).attention_names()
        asked = self.config.hardware.device
        default = resolve_device(asked)[0] if asked == "auto" else torch.device(asked)
        self.device = device or default
        self.structure = base_structure(kernel) if structure is None else structure
        self.notes: list[str] = []
        self._capability = planned_capability() if self.device.type == "cuda" else None
        if self._capability and not torch.cuda.is_available():
            version = ".".join(str(number) for number in self._capability)
            self.notes.append(
                f"memory: there is no GPU here: counted for one of compute capability {version}"
            )
        self.dtype = autocast_dtype(
            self.config.training.mixed_precision, self.device, self.config.model.d_model
        )
        self._activations: dict[tuple[int, bool], int | None] = {}

    @cached_property
    def weights(self) -> Weights:
        """The bytes of parameters and buffers."""
        return Weights.of(self.structure)

    @cached_property
    def optimizer(self) -> tuple[int, int]:
        """The bytes of the optimizer's state, and an upper bound of the temporary memory of its
        step (some optimizers process the matrices of several layers at once)."""
        try:
            state, workspace = self._extrapolated(self._step_optimizer)
            return state, workspace
        except Exception as error:
            self.notes.append(
                f"memory: optimizer:{self.config.training.optimizer_name} could not be measured "
                f"({one_line(error)}): counted as two values a parameter"
            )
            return 2 * self.weights.trainable, 0

    def activations(self, batch_size: int, *, gathered: bool = False) -> int | None:
        """Peak bytes of a forward and backward of ``batch_size`` sequences, beside parameters and
        gradients; None if the model does not run on fake tensors. Layers ``gathered`` in the dtype
        of autocast have no casts of their weights."""
        key = batch_size, gathered and self.dtype is not None
        if key not in self._activations:
            try:
                (peak,) = self._extrapolated(lambda model: self._run(model, *key))
                self._activations[key] = peak
            except Exception as error:
                self.notes.append(f"memory: the activations are unknown: {one_line(error)}")
                self._activations[key] = None
        return self._activations[key]

    def trial(self, batch_size: int) -> int:
        """Peak bytes, beside parameters, of the fp32 loss of ``batch_size`` sequences that a switch
        compares; 0, with a note, if it cannot be measured."""
        try:
            (peak,) = self._extrapolated(lambda model: self._try(model, batch_size))
            return peak
        except Exception as error:
            self.notes.append(
                f"memory: the loss by which a switch is judged is not counted: {one_line(error)}"
            )
            return 0

    def _extrapolated(self, measure: Callable[[nn.Module], tuple[int, ...]]) -> list[int]:
        """The result of ``measure`` for the whole model, extrapolated from some layers."""
        first, more = measured_layers(layer_kinds(self.structure, self._attention_names))
        found = self._measured(measure, first)
        total = [*found]
        for layers, times in more:
            for index, (one, other) in enumerate(
                zip(found, self._measured(measure, layers), strict=True)
            ):
                total[index] += (other - one) * times
        return total

    def _measured(
        self, measure: Callable[[nn.Module], tuple[int, ...]], layers: Sequence[int]
    ) -> tuple[int, ...]:
        model = with_layers(self.structure, layers)
        with FakeTensorMode():
            return measure(_faked(model))

    def _run(self, model: nn.Module, batch_size: int, gathered: bool) -> tuple[int]:
        config, dtype = self.config, self.dtype
        for layer in layers_of(model) if gathered else ():
            cast_parameters(layer, dtype)
        with self._operators(), CountedAllocations() as counted:
            batch = Batch.of_ids(torch.zeros(batch_size, config.seq_len, dtype=torch.int64))
            with autocast(CPU, dtype):
                # Outputs are alive until the backward is done.
                outputs = [forward_batch(model, model, batch)]
                loss = cross_entropy_sum(outputs[0], batch.targets)
                with torch.no_grad(), eval_mode(model):
                    for _ in range(self.costs.forwards):
                        outputs.append(forward_batch(model, model, batch))
                for _ in range(self.costs.passes):
                    outputs.append(forward_batch(model, model, batch))
                    loss = loss + cross_entropy_sum(outputs[-1], batch.targets)
                loss = loss / batch.num_targets
            loss.backward()
        return (counted.peak,)

    def _try(self, model: nn.Module, batch_size: int) -> tuple[int]:
        with self._operators(), CountedAllocations() as counted:
            ids = torch.zeros(batch_size, self.config.seq_len, dtype=torch.int64)
            losses_in_fp32(model, Batch.of_ids(ids))
        return (counted.peak,)

    def _operators(self) -> AbstractContextManager[object]:
        """A context in which layers use the device's operators."""
        return nullcontext() if self._capability is None else GPUOperators(self._capability)

    def _step_optimizer(self, model: nn.Module) -> tuple[int, int]:
        optimizer = measured_optimizer(self.config, self._registry, model)
        if decides_on_device(optimizer, self.device):
            optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        with CountedAllocations() as counted:
            optimizer.step()
        state = (v for kept in optimizer.state.values() for v in kept.values())
        return count_bytes(v for v in state if isinstance(v, Tensor)), counted.peak


class CountedAllocations(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: ``live`` at present, ``peak`` at
    most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in given and storage not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU)
    if not isinstance(tensor, nn.Parameter):
        return fake
    parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    if tensor.requires_grad:
        parameter.grad = torch.empty_like(fake)
    return parameter


def cast_parameters(layer: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of ``layer`` to ``dtype``, as FSDP2 does when it gathers them."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            cast = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            cast.grad = None if parameter.grad is None else torch.empty_like(cast)
            module.register_parameter(name, cast)


def layer_kinds(model: nn.Module, attention_names: Sequence[str]) -> list[Hashable]:
    """A key for each layer of ``model``, equal for layers of the same kind. ``attention_names`` are
    the profile's, by layer."""
    layers = layers_of(model)
    named = len(attention_names) == len(layers)
    return [
        (
            attention_names[index] if named else "",
            tuple(type(module) for module in layer.modules()),
            tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters()),
        )
        for index, layer in enumerate(layers)
    ]


def measured_layers(
    kinds: Sequence[Hashable],
) -> tuple[list[int], list[tuple[list[int], int]]]:
    """The layers to measure of a model with layers of ``kinds``: the last two of each kind, and a
    list of these plus one more layer of a kind, with the number of layers that it stands for.

    >>> measured_layers("aaaaa")
    ([3, 4], [([2, 3, 4], 3)])
    >>> measured_layers("ababab")
    ([2, 3, 4, 5], [([0, 2, 3, 4, 5], 1), ([1, 2, 3, 4, 5], 1)])
    """
    places: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        places.setdefault(kind, []).append(index)
    first = sorted(index for found in places.values() for index in found[-2:])
    more = [(sorted([*first, found[-3]]), len(found) - 2) for found in places.values() if found[2:]]
    return first, more


def with_layers(structure: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy of ``structure`` with some of its layers."""
    _, stack = block_stack(structure)
    copied: dict[int, Any] = {}
    copied[id(stack)] = nn.ModuleList([copy.deepcopy(stack[index], copied) for index in layers])
    return copy.deepcopy(structure, copied)


def _faked(model: nn.Module) -> nn.Module:
    """``model`` with fake tensors, inside a FakeTensorMode, with allocated gradients, as in every
    micro-batch but the first."""
    # On the CPU: the backward of fake GPU tensors needs a driver.
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                setattr(module, name, made.setdefault(id(tensor), _fake_like(tensor)))
    return model


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of ``tensors``; repeated tensors count once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
