"""The two states of one run: what is set at the start of a step, and the terms of a micro-batch."""

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
    """``weight`` and ``momentum`` are those of the step at hand. The stable state is either the
    plugin's average of the weights, the teacher, or a second pass of the model (mode: rdrop)."""

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
        """Found modules by model: searching all modules in every step would slow small models
        down."""

    def begin_step(self, step: int, trainer: Any) -> None:
        """Take the values of this step; in the first one the teacher begins as the model is."""
        self.weight = trainer.param(WEIGHT, self.settings.weight)
        if self.has_teacher:
            if NAME not in trainer.averages and step > self._first_step:
                log.warning(
                    "there is no teacher of before: it begins as the model of step %d", step
                )
            self.momentum = self.settings.momentum(max(0, step - self._first_step))
            average = trainer.average(NAME, self.settings.momentum_start)
            average.decay = self.momentum
        self.vein = self._vein_of(trainer.model) if self.weight else None

    def terms(self, trainer: Any, batch: Any, output: ModelOutput) -> Mapping[str, Tensor]:
        """The objective's terms times ``weight``; without a weight, nothing is computed."""
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
    having = [layer for layer in model.modules() if hasattr(layer, "orthonormal_basis")]
    return having[-1] if having else None


@torch.no_grad()
def vein_of(layer: Any) -> Tensor:
    """The main directions [D, m] of a layer, whole where it is sharded."""
    basis = layer.orthonormal_basis()
    return basis.full_tensor() if isinstance(basis, DTensor) else basis
