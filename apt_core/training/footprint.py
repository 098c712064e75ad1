"""What training a model takes of memory, measured without allocating any.

The model is built without values, and one micro-batch goes forward and backward through it on fake
tensors, which know their size and nothing else, while every allocation is counted. Of a deep model
two shallow ones are measured: its memory is affine in the number of layers. Both give what the
whole model takes in real memory, to the byte.

Not counted: what the allocator loses between blocks, the workspace of single kernels, the libraries
themselves (some hundred MiB), what plugins keep, and what torch.compile saves by fusing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apt_core.config import Config
from apt_core.data.batches import Batch
from apt_core.device import autocast, autocast_dtype, resolve_device
from apt_core.failures import one_line
from apt_core.kernel import Kernel
from apt_core.modeling.compose import ModelBuilder
from apt_core.plugin_manager import PluginManager
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.training.loss import cross_entropy_sum
from apt_core.training.parameter_groups import parameter_groups

CPU = torch.device("cpu")


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
        """The layers are those that World.shard makes groups of."""
        parameters = count_bytes(model.parameters())
        stack = next((m for m in model.children() if isinstance(m, nn.ModuleList)), ())
        layers = [count_bytes(layer.parameters()) for layer in stack]
        return cls(
            parameters=parameters,
            trainable=count_bytes(p for p in model.parameters() if p.requires_grad),
            tables=count_bytes(model.buffers()),
            largest_layer=max(layers, default=0),
            outside=parameters - sum(layers),
        )


class Footprint:
    """What training the profile's whole model takes on ``device`` (by default the one that the
    profile names), each figure measured when it is first needed.

    ``notes`` say what could not be measured, and why.
    """

    def __init__(self, kernel: Kernel, device: torch.device | None = None) -> None:
        self.config, self._registry = kernel.config, kernel.registry
        asked = self.config.hardware.device
        default = resolve_device(asked)[0] if asked == "auto" else torch.device(asked)
        self.device = device or default
        self.notes: list[str] = []
        self._activations: dict[int, int | None] = {}

    @cached_property
    def weights(self) -> Weights:
        """The bytes of the model itself."""
        return Weights.of(self._build(self.config.model.num_layers))

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

    def activations(self, batch_size: int) -> int | None:
        """The most that a forward and backward of ``batch_size`` sequences hold beside parameters
        and gradients, in bytes; None where the model does not run on fake tensors."""
        if batch_size not in self._activations:
            try:
                (peak,) = self._extrapolated(lambda model: self._run(model, batch_size))
                self._activations[batch_size] = peak
            except Exception as error:
                self.notes.append(f"memory: the activations are unknown: {one_line(error)}")
                self._activations[batch_size] = None
        return self._activations[batch_size]

    def _extrapolated(self, measure: Callable[[nn.Module], tuple[int, ...]]) -> list[int]:
        """What ``measure`` finds in the whole model."""
        layers = self.config.model.num_layers
        depths = measured_depths(layers, len(self.config.model.attention_pattern or "1"))
        found = []
        for depth in depths:
            with FakeTensorMode():
                found.append(measure(self._fake(depth)))
        first, last = depths[0], depths[-1]
        times = 0 if first == last else (layers - first) // (last - first)
        return [a + (b - a) * times for a, b in zip(found[0], found[-1], strict=True)]

    def _build(self, num_layers: int) -> nn.Module:
        with torch.device("meta"):
            return ModelBuilder(with_layers(self.config, num_layers), self._registry).build_model()

    def _fake(self, num_layers: int) -> nn.Module:
        """The model in fake memory, inside a FakeTensorMode, with gradients that are there already,
        as in every micro-batch but the first."""
        # The CPU, for fake tensors of a GPU need one; its kernels keep what those of a GPU keep.
        model = self._build(num_layers).train()
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    fake = made.setdefault(id(tensor), _fake_like(tensor))
                    setattr(module, name, fake)
        return model

    def _run(self, model: nn.Module, batch_size: int) -> tuple[int]:
        config = self.config
        dtype = autocast_dtype(config.training.mixed_precision, self.device, config.model.d_model)
        with CountedAllocations() as counted:
            ids = torch.zeros(batch_size, config.seq_len, dtype=torch.int64)
            with autocast(CPU, dtype):
                output = model(ids)
                loss = cross_entropy_sum(output, Batch(ids, ids, ids.numel())) / ids.numel()
            loss.backward()
        return (counted.peak,)

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


def measured_depths(num_layers: int, period: int) -> tuple[int, ...]:
    """The numbers of layers to measure for a model of ``num_layers`` whose layers repeat after
    ``period``: its own, or two that end like it and are a period apart.

    >>> measured_depths(24, 1), measured_depths(3, 1), measured_depths(25, 4)
    ((2, 3), (3,), (9, 13))
    """
    first = 2 * period + num_layers % period
    return (first, first + period) if num_layers > first + period else (num_layers,)


def with_layers(config: Config, num_layers: int) -> Config:
    """The profile with another depth."""
    model = config.model.model_copy(update={"num_layers": num_layers})
    return config.model_copy(update={"model": model})


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of ``tensors``, a repeated one once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
