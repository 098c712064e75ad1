"""Measures how fast a model trains on this machine, and estimates the time of a step from it.

The largest subject that fits into a bounded amount of memory is trained briefly on synthetic input:
the whole model, one layer of each kind, or a narrower layer. The estimate takes its FLOP/s, counted
by :mod:`apt_core.modeling.costs`, and its optimizer's time per parameter for the whole model. It
leaves out communication between processes, loading of data, evaluation, checkpoints, hooks, and the
effect of torch.compile.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.config.schema import ModelSection
from apt_core.data.batches import Batch
from apt_core.device import (
    autocast,
    autocast_dtype,
    available_memory,
    cpu_threads,
    is_out_of_memory,
    synchronize,
)
from apt_core.error_text import one_line
from apt_core.kernel import Kernel
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.costs import ModelCost, layer_flops, layers_of, model_cost
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.modeling.placement import num_threads
from apt_core.modeling.seeds import fp32_products
from apt_core.optim.build import measured_optimizer
from apt_core.planning.footprint import layer_kinds
from apt_core.planning.stages import Structure

CPU_BYTES = 2**28
"""The most bytes of weights, gradients and optimizer state in a calibration on a CPU. On an
accelerator the limit is a quarter of the free memory."""

BYTES_PER_PARAMETER = 16
FIRST_TOKENS = 32
SECONDS = 0.15
"""The approximate length of a measurement in seconds. It follows one with few tokens, which finds
the size, and a warm-up."""

TRIES, MOST_TRIES = 3, 100


@dataclass(frozen=True)
class Speed:
    """``flops_per_s`` of the forward and backward, ``optimizer_s``, the seconds of an optimizer
    step per parameter, and a description of what was measured."""

    flops_per_s: float
    optimizer_s: float
    measured: str

    def step_seconds(self, flops: float, params: int) -> float:
        """Estimated seconds of a step with ``flops`` and ``params`` updated parameters."""
        return flops / self.flops_per_s + params * self.optimizer_s


@dataclass(frozen=True)
class _Subject:
    """What is timed: ``model`` on the meta device, ``train``, which computes a scalar to
    differentiate from a batch, and ``flops``, the training FLOPs per token as a function of the
    sequence length."""

    model: nn.Module
    train: Callable[[nn.Module, Tensor], Tensor]
    flops: Callable[[int], float]
    words: str


class Calibration:
    """Measures structures of the model on ``device``; ``notes`` explain failed measurements."""

    def __init__(self, kernel: Kernel, device: torch.device, cost: ModelCost) -> None:
        self.kernel, self.device, self.cost = kernel, device, cost
        self.notes: list[str] = []
        self._costs: dict[int, ModelCost] = {}
        config = kernel.config
        self.threads = num_threads(config) or torch.get_num_threads()
        self._dtype = autocast_dtype(config.training.mixed_precision, device, config.model.d_model)
        free = CPU_BYTES if device.type == "cpu" else available_memory(device) // 4
        self._most_params = free // BYTES_PER_PARAMETER

    def speed(self, structure: Structure) -> Speed | None:
        """The speed of training ``structure``; None if it cannot be measured."""
        if self.cost.flops_per_token is None:
            return None
        try:
            tf32 = self.kernel.config.hardware.tf32
            with cpu_threads(self.threads), fp32_products(self.device, tf32=tf32):
                return self._timed(self._subject(structure))
        except Exception as error:
            if self.kernel.manager.failures.lets_through(error):
                raise
            note = f"time: could not be measured: {one_line(error)}"
            if note not in self.notes:
                self.notes.append(note)
            return None

    def cost_of(self, structure: Structure) -> ModelCost:
        """The cost of a model of the sizes of ``structure``."""
        config = structure.config
        if config is self.kernel.config:
            return self.cost
        if id(config) not in self._costs:
            self._costs[id(config)] = model_cost(self.kernel, config)
        return self._costs[id(config)]

    def row(self) -> dict[str, Any]:
        """The row of the plan."""
        asked = self.kernel.config.hardware.device
        alike = asked in ("auto", str(self.device), self.device.type)
        return {"device": str(self.device), "threads": self.threads, "is_the_runs_device": alike}

    def slowdown(self, processes: int) -> float:
        """The factor by which each of ``processes`` is slower than one alone: they share the cores
        of a CPU, while each has its own accelerator."""
        if self.device.type != "cpu":
            return 1.0
        return max(1.0, processes * self.threads / len(os.sched_getaffinity(0)))

    # What is measured ------------------------------------------------------------------------

    def _subject(self, structure: Structure) -> _Subject:
        model, config = structure.model, structure.config
        layers = layers_of(model)
        if self._fits([model]):
            whole = copy.deepcopy(model)
            return _Subject(whole, _train_model, self._model_flops(structure), "the whole model")
        names = ModelBuilder(config, self.kernel.registry).attention_names()
        kinds = layer_kinds(model, names)
        chosen = sorted({kind: index for index, kind in enumerate(kinds)}.values())
        if chosen and self._fits([layers[index] for index in chosen]):
            some = nn.ModuleList([copy.deepcopy(layers[index]) for index in chosen])

            def flops(seq_len: int) -> float:
                by_layer = structure.layer_flops(self.kernel, seq_len)
                assert by_layer is not None
                return sum(by_layer[index] for index in chosen)

            words = f"{len(chosen)} of {len(layers)} layers"
            return _Subject(some, _training_layers(config.model.d_model), flops, words)
        return self._narrow_layer()

    def _fits(self, modules: Sequence[nn.Module]) -> bool:
        count = sum(p.numel() for module in modules for p in module.parameters())
        return count <= self._most_params

    def _model_flops(self, structure: Structure) -> Callable[[int], float]:
        kernel = self.kernel
        model, own = structure.config.model, kernel.config.seq_len
        total = structure.flops_per_token(self.cost_of(structure))
        assert total is not None

        def flops(seq_len: int) -> float:
            here, there = (layer_flops(kernel, model, n) for n in (seq_len, own))
            assert here is not None and there is not None
            return total + sum(here) - sum(there)

        return flops

    def _narrow_layer(self) -> _Subject:
        """The last layer of the model at the start, made narrower until it fits. The FLOP/s of wide
        matrices hardly depend on their width."""
        config, divisor = self.kernel.config, 1
        last = config.model.num_layers - 1
        while True:
            model = _narrower(config.model, divisor)
            builder = ModelBuilder(config.model_copy(update={"model": model}), self.kernel.registry)
            with torch.device("meta"):
                layer = builder.build_block(last)
            if self._fits([layer]) or model.num_heads == 1:
                break
            divisor *= 2

        def flops(seq_len: int) -> float:
            by_layer = layer_flops(self.kernel, model, seq_len)
            assert by_layer is not None
            return by_layer[last]

        width = f", at 1/{divisor} of its width" if divisor > 1 else ""
        words = f"a layer of the model at the start{width}"
        return _Subject(nn.ModuleList([layer]), _training_layers(model.d_model), flops, words)

    # Measuring -------------------------------------------------------------------------------

    def _timed(self, subject: _Subject) -> Speed:
        model = _with_memory(subject.model, self.device)
        training = self.kernel.config.training
        optimizer = measured_optimizer(self.kernel.config, self.kernel.registry, model)

        def micro_batch(sequences: int, length: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            ids = torch.zeros(sequences, length, dtype=torch.int64, device=self.device)
            with autocast(self.device, self._dtype):
                result = subject.train(model, ids)
            result.backward()

        def seconds(sequences: int, length: int, tries: int) -> float:
            if tries > 2:
                micro_batch(sequences, length)
            return min(self._seconds(lambda: micro_batch(sequences, length), tries))

        most = training.batch_size, self.kernel.config.seq_len
        again = self.device.type != "cpu"
        sequences, length, taken = measured_size(seconds, subject.flops, most, again=again)
        if again:
            micro_batch(sequences, length)  # one that ran out of memory has left no gradients
        optimizer.step()
        stepping = min(self._seconds(optimizer.step, TRIES))
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        flops_per_s = sequences * length * subject.flops(length) / taken
        # All of it may be frozen.
        return Speed(flops_per_s, stepping / max(1, params), subject.words)

    def _seconds(self, work: Callable[[], object], tries: int) -> list[float]:
        """Time ``work`` at least ``tries`` times, and for SECONDS if it is short.
        The least of them is what other programs have disturbed the least."""
        times: list[float] = []
        while len(times) < tries or (len(times) < MOST_TRIES and sum(times) < SECONDS):
            synchronize(self.device)
            start = perf_counter()
            work()
            synchronize(self.device)
            times.append(perf_counter() - start)
        return times


def measured_size(
    seconds: Callable[[int, int, int], float],
    flops: Callable[[int], float],
    most: tuple[int, int],
    *,
    again: bool,
) -> tuple[int, int, float]:
    """The number and length of sequences in a micro-batch that takes about SECONDS, and its
    seconds.

    ``seconds`` measures a micro-batch (sequences, length, tries); ``flops`` are those per token by
    sequence length; ``most`` is the size of the run's own micro-batch. ``again`` is for devices on
    which a few tokens take as long as many: the size is estimated anew from each measurement until
    it stops growing or memory runs out.
    """
    most_sequences, seq_len = most
    sequences, length = 1, min(FIRST_TOKENS, seq_len)
    first = length
    taken, measured = seconds(sequences, length, 2), False
    while True:
        before = sequences * length
        tokens = int(SECONDS * before * flops(length) / taken / flops(seq_len))
        wider = min(seq_len, max(first, tokens))
        more = min(most_sequences, max(1, tokens // wider))
        if measured and more * wider <= before:
            return sequences, length, taken
        try:
            there = seconds(more, wider, TRIES)
        except Exception as error:
            if not (measured and is_out_of_memory(error)):
                raise
            return sequences, length, taken
        sequences, length, taken, measured = more, wider, there, True
        if not again:
            return sequences, length, taken


def _train_model(model: nn.Module, ids: Tensor) -> Tensor:
    batch = Batch.of_ids(ids)
    return cross_entropy_sum(forward_batch(model, model, batch), ids) / ids.numel()


def _training_layers(d_model: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def train(layers: nn.Module, ids: Tensor) -> Tensor:
        x = torch.randn(*ids.shape, d_model, device=ids.device, requires_grad=True)
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x)
        return x.float().mean()

    return train


def _narrower(model: ModelSection, divisor: int) -> ModelSection:
    """The sizes of ``model`` divided by ``divisor``, with fewer heads of the same width."""
    heads = max(1, model.num_heads // divisor)
    kv_heads = model.num_kv_heads and max(1, model.num_kv_heads // divisor)
    sizes = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "d_model": model.d_model * heads // model.num_heads,
        "d_ff": max(1, model.d_ff // divisor),
    }
    return model.model_copy(update=sizes)


@torch.no_grad()
def _with_memory(model: nn.Module, device: torch.device) -> nn.Module:
    """Move ``model`` from the meta device to ``device`` with arbitrary values."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    return model
