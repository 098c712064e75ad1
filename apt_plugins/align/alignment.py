"""Alignment in one run: the values of a step, and the loss terms of a micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt_core import ModelOutput
from apt_core.providers import AlignProvider
from apt_plugins.align.settings import SECTION, WEIGHT, BistateSettings

NAME = "align"

log = logging.getLogger("apt.align")


class Alignment:
    """Computes the alignment terms of one run.

    ``weight`` and ``momentum`` have the values of the current step. The stable state is either
    the teacher, an average of the weights that the plugin keeps (mode: ema), or a second pass of
    the model (mode: rdrop).
    """

    def __init__(self, trainer: Any) -> None:
        settings = trainer.config.section(SECTION)
        assert isinstance(settings, BistateSettings)
        self.settings = settings
        self.objective: AlignProvider = trainer.registry.get("align", settings.align)
        self.weight, self.momentum = 0.0, settings.momentum_start
        self.has_teacher = settings.mode == "ema"
        self.vein: Tensor | None = None
        self._first_step = trainer.schedule.first_step_of(NAME)
        self._last_with_vein: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        """The layer by model: searching all modules in every step would slow small models down."""

    def begin_step(self, step: int, trainer: Any) -> None:
        """Set the values of this step; the first step starts the teacher as a copy of the model."""
        self.weight = trainer.param(WEIGHT, self.settings.weight)
        if self.has_teacher:
            if NAME not in trainer.averages and step > self._first_step:
                log.warning(
                    "no teacher was saved: it starts as a copy of the model at step %d", step
                )
            self.momentum = self.settings.momentum(max(0, step - self._first_step))
            average = trainer.average(NAME, self.settings.momentum_start)
            average.decay = self.momentum
        self.vein = self._vein_of(trainer.model) if self.weight else None

    def terms(self, trainer: Any, batch: Any, output: ModelOutput) -> Mapping[str, Tensor]:
        """The objective's terms times ``weight``, each 0-d; empty where ``weight`` is 0."""
        if not self.weight:
            return {}
        with trainer.autocast():
            if self.has_teacher:
                stable = trainer.average(NAME, self.momentum).output(batch)
            else:
                stable = trainer.forward(batch)
        terms = self.objective.terms(
            output, stable, batch.targets, vein=self.vein, mutual=not self.has_teacher
        )
        return {name: self.weight * term for name, term in terms.items()}

    def _vein_of(self, model: nn.Module) -> Tensor | None:
        if model not in self._last_with_vein:
            self._last_with_vein[model] = last_with_vein(model)
        layer = self._last_with_vein[model]
        return None if layer is None else vein_of(layer)


def last_with_vein(model: nn.Module) -> Any:
    """The last layer of the model that has a vein, or None."""
    layers = [layer for layer in model.modules() if hasattr(layer, "orthonormal_basis")]
    return layers[-1] if layers else None


@torch.no_grad()
def vein_of(layer: Any) -> Tensor:
    """The main directions of ``layer`` [D, m], gathered where they are sharded."""
    basis = layer.orthonormal_basis()
    return basis.full_tensor() if isinstance(basis, DTensor) else basis
