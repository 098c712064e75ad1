"""What training a model takes of memory, measured without allocating any.

The model is built without values, and one micro-batch goes forward and backward through it on fake
tensors, which know their size and nothing else, while every allocation is counted. Of a deep model
a few of its layers are measured, with one more of each kind in turn: its memory is affine in the
number of each. That gives what the whole model takes in real memory, to the byte.

For a GPU the operators are those that it has (:mod:`apt_core.planning.gpu_operators`), here or not.

Not counted: what the allocator loses between blocks, the workspace of single kernels, the libraries
themselves (some hundred MiB), what plugins keep beyond what ``apt_costs`` says, what their terms of
the loss compute, and what torch.compile saves by fusing.
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
from apt_core.optim.build import decides_on_device
from apt_core.optim.parameter_groups import parameter_groups
from apt_core.planning.gpu_operators import GPUOperators
from apt_core.plugin_manager import PluginManager
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.types import PluginCosts

CPU = torch.device("cpu")
NO_COSTS = PluginCosts()


@dataclass(frozen=True)
class Weights:
    """Bytes of a model whatever the batch: of all parameters, of those that are trained, of its
    buffers, and of the parameters in its largest layer and outside the layers."""

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
    """What training a model takes on ``device`` (by default the one that the profile names), each
    figure measured when it is first needed.

    ``structure`` is the model on the meta device, by default that with which the run starts, and
    ``costs`` what plugins take beside it. ``notes`` say what could not be measured, and why.
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
        """The bytes of the model itself."""
        return Weights.of(self.structure)

    @cached_property
    def optimizer(self) -> tuple[int, int]:
        """The bytes of the optimizer's state, and the most that a step takes beside it (an upper
        bound: some take the matrices of so many layers at once)."""
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
        """The most that a forward and backward of ``batch_size`` sequences hold beside parameters
        and gradients, in bytes; None where the model does not run on fake tensors. With layers that
        are ``gathered`` in the type of autocast there are no casts of their weights."""
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
        """The most that the loss of ``batch_size`` sequences in fp32, by which a switch is judged,
        holds beside parameters, in bytes; 0, with a note, where that cannot be measured."""
        try:
            (peak,) = self._extrapolated(lambda model: self._try(model, batch_size))
            return peak
        except Exception as error:
            self.notes.append(
                f"memory: the loss by which a switch is judged is not counted: {one_line(error)}"
            )
            return 0

    def _extrapolated(self, measure: Callable[[nn.Module], tuple[int, ...]]) -> list[int]:
        """What ``measure`` finds in the whole model."""
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
                # What the forwards give is there until the backward is done.
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
        """A context in which layers take the operators that they have for the device."""
        return nullcontext() if self._capability is None else GPUOperators(self._capability)

    def _step_optimizer(self, model: nn.Module) -> tuple[int, int]:
        training = self.config.training
        rate, decay = training.learning_rate, training.weight_decay
        provider: OptimizerProvider = self._registry.get("optimizer", training.optimizer_name)
        # Without plugins' groups, which set rates and not what is kept.
        groups = parameter_groups(
            model,
            PluginManager(),
            learning_rate=rate,
            weight_decay=decay,
            separate_matrices=provider.separates_matrices,
        )
        optimizer = provider.create(groups, learning_rate=rate, weight_decay=decay)
        if decides_on_device(optimizer, self.device):
            optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        with CountedAllocations() as counted:
            optimizer.step()
        state = (v for kept in optimizer.state.values() for v in kept.values())
        return count_bytes(v for v in state if isinstance(v, Tensor)), counted.peak


class CountedAllocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it: ``live`` now, ``peak`` at most."""

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
    """Make the parameters of ``layer`` what it finds when they are gathered in ``dtype``."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            cast = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            cast.grad = None if parameter.grad is None else torch.empty_like(cast)
            module.register_parameter(name, cast)


def layer_kinds(model: nn.Module, attention_names: Sequence[str]) -> list[Hashable]:
    """What tells the layers of ``model`` apart; the names are those of the profile, by layer."""
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
    """Which layers to measure of a model whose layers are of ``kinds``: the last two of each kind,
    and these with one more, which stands for so many.

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
    """``model`` in fake memory, inside a FakeTensorMode, with gradients that are there already, as
    in every micro-batch but the first."""
    # On the CPU: a backward of fake tensors of a GPU needs its driver.
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                setattr(module, name, made.setdefault(id(tensor), _fake_like(tensor)))
    return model


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of ``tensors``, a repeated one once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
