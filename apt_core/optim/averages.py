"""Exponential moving averages of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from apt_core.data.batches import Batch
from apt_core.log import get_logger
from apt_core.modeling.calling import forward_batch, forward_with
from apt_core.modeling.modes import eval_mode
from apt_core.parallel.world import local_part
from apt_core.plain_values import within
from apt_core.types import ModelOutput

log = get_logger("apt.training")

WARMUP = 10
"""The decay of an average with a warm-up is at most (1 + step) / (WARMUP + step), so that it is
short while there are few steps to average."""


PIECE_BYTES = 2**26
"""Bytes of weights whose distance to their averages is held in memory at once, where only the
device knows whether a step counts."""


class WeightAverage:
    """An exponential moving average of the parameters of ``model``, by name in ``values``.

    It starts with a copy of the weights, or takes over ``values``. Sharded parameters are averaged
    shard by shard. ``decay`` may be set before any step.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        warmup: bool = True,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self._model = model
        parameters = dict(model.named_parameters())
        self.values: Mapping[str, Tensor] = (
            {name: p.detach().clone() for name, p in parameters.items()}
            if values is None
            else values
        )
        self._live = [local_part(p.detach()) for p in parameters.values()]
        self._averages = [local_part(self.values[name]) for name in parameters]
        self._pieces = [*_pieces(self._live, self._averages)]
        self._exchanged, self._exchanging = 0, False
        self.compute: Callable[[Mapping[str, Tensor], Batch], ModelOutput] | None = None
        """What :meth:`output` computes with, given weights by name and a batch: by default the
        model as it is, which the loop may have compiled."""

    @property
    def decay(self) -> float:
        """The share of the average that a step keeps, from 0 to 1. Setting an invalid value raises
        TypeError or ValueError."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay = within(value, "the decay of an average", 1.0)

    @torch.no_grad()
    def update(self, step: int, void: bool | Tensor = False) -> None:
        """Add the weights after ``step`` to the average, unless the step was ``void``: a bool, or a
        0-d tensor of 1.0 or 0.0 where it is known on the device only."""
        decay = min(self.decay, (1 + step) / (WARMUP + step)) if self.warmup else self.decay
        share = 1 - decay
        if isinstance(void, Tensor):
            taken = share * (1 - void)
            for live, averages in self._pieces:
                ahead = torch._foreach_sub(live, averages)
                torch._foreach_mul_(ahead, taken)
                torch._foreach_add_(averages, ahead)
                del ahead  # free it before the next piece
        elif not void:
            torch._foreach_lerp_(self._averages, self._live, share)

    @torch.no_grad()
    def output(self, batch: Batch) -> ModelOutput:
        """What the model gives for ``batch`` with the averaged weights, in eval mode; the weights
        themselves and what a backward of theirs needs are left alone. Raises TypeError for the ids
        alone, which do not say what of them is padding."""
        if not isinstance(batch, Batch):
            raise TypeError(
                f"output() takes the batch, not a {type(batch).__name__}: pass the batch itself in "
                "place of batch.input_ids, and Batch.of_ids(ids) for ids of your own"
            )
        model = self._model
        with eval_mode(model):
            if not isinstance(model, FSDPModule):
                if self.compute is not None:
                    return self.compute(self.values, batch)
                return forward_with(self.values, model, batch)
            # Its forward gathers what lies in the shards.
            model.reshard()
            with self.in_place():
                try:
                    return forward_batch(model, model, batch)
                finally:
                    model.reshard()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the model's weights for the averages while the context lasts."""
        try:
            while self._exchanged < len(self._live):
                self._exchange(self._exchanged)
                self._exchanged += 1
            yield
        finally:
            while self._exchanged:
                self._exchange(self._exchanged - 1)
                self._exchanged -= 1

    @property
    def is_apart(self) -> bool:
        """Whether the model holds its own weights: False inside :meth:`in_place` and after an
        interrupted exchange."""
        return not self._exchanged and not self._exchanging

    @torch.no_grad()
    def _exchange(self, index: int) -> None:
        live, average = self._live[index], self._averages[index]
        kept = live.clone()  # first, since it may run out of memory
        self._exchanging = True
        live.copy_(average)
        average.copy_(kept)
        self._exchanging = False


class Averages:
    """The averages of a run's weights: ``ema``, asked for by the profile, and those that plugins
    have asked for, ``by_plugin``."""

    def __init__(self, ema: WeightAverage | None = None) -> None:
        self.ema = ema
        self.by_plugin: dict[str, WeightAverage] = {}
        self.asked: dict[str, float] = {}
        self._restored: dict[str, float] = {}

    @property
    def all(self) -> list[WeightAverage]:
        """All averages, the profile's first."""
        own = [] if self.ema is None else [self.ema]
        return [*own, *self.by_plugin.values()]

    @property
    def named(self) -> dict[str, Mapping[str, Tensor]]:
        """The values of each average, by the name of its file in a checkpoint."""
        own = {} if self.ema is None else {"ema": self.ema.values}
        kept = enumerate(self.by_plugin.values())
        return own | {f"average-{index}": average.values for index, average in kept}

    def of_plugin(self, plugin: str, decay: float, model: nn.Module) -> WeightAverage:
        """The average of ``plugin``. The first call makes it from the weights of ``model``; later
        calls return the same one. A ``decay`` that differs from the previous call's replaces it."""
        asked = self._restored.pop(plugin, decay)
        if plugin not in self.by_plugin:
            self.by_plugin[plugin] = WeightAverage(model, decay, warmup=False)
            self.asked[plugin] = decay
        elif asked != decay:
            log.info(
                "the average of plugin %s goes on with decay %g, asked was %g before",
                plugin,
                decay,
                asked,
            )
            self.by_plugin[plugin].decay = self.asked[plugin] = decay
        return self.by_plugin[plugin]

    def restore(
        self, plugin: str, decay: float, asked: float | None, model: nn.Module
    ) -> WeightAverage:
        """The average that a checkpoint holds, for its values to be read into: it had come to
        ``decay``, and the plugin had asked for ``asked`` when it was made (None where the
        checkpoint does not say). Asking for another one first is a change of mind."""
        average = self.of_plugin(plugin, decay if asked is None else asked, model)
        average.decay = decay
        if asked is not None:
            self._restored[plugin] = asked
        return average

    def moved(self, move: Callable[[WeightAverage], WeightAverage]) -> Averages:
        """The same averages of another model, each made by ``move``."""
        new = Averages(None if self.ema is None else move(self.ema))
        new.by_plugin = {plugin: move(average) for plugin, average in self.by_plugin.items()}
        new.asked, new._restored = self.asked, self._restored
        return new


def _pieces(
    live: Sequence[Tensor], averages: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Both lists of tensors, cut at the same places into pieces of about PIECE_BYTES."""
    first = size = 0
    for index, tensor in enumerate(live, start=1):
        size += tensor.nbytes
        if size >= PIECE_BYTES or index == len(live):
            yield list(live[first:index]), list(averages[first:index])
            first, size = index, 0
