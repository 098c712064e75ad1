"""Providers of optimizers (kind ``optimizer``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.sections import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer


ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
"""Defaults of ``training.betas`` and ``training.eps``."""

BASE_WIDTH = 1536
"""The d_model for which ``training.learning_rate`` is meant (``training.scale_lr_by_width``)."""


class MuonSettings(Section):
    """``training.muon``: the optimizer of hidden matrices; AdamW takes the other parameters."""

    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = Field(
        default=0.02, description="Peak learning rate of hidden matrices."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, description="Momentum.")
    nesterov: bool = Field(default=True, description="Look ahead along the momentum.")
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.0, description="Decoupled weight decay of hidden matrices."
    )
    ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        default=5, description="Newton-Schulz iterations."
    )


class OptimizerProvider(Provider, ABC):
    """Builds the optimizer of a run.

    One that treats hidden matrices (those that map one hidden vector to another, not embeddings or
    the output head) in a way of its own sets ``separates_matrices``. ``moments`` says which state
    of a parameter, by name, is of the size of its gradient (1) or of the gradient's square (2): so
    that it can be carried over when a plugin changes the structure of the model. ``states`` are the
    names of all state that a parameter has once it has learned, one set for each way of treating
    it; a checkpoint is held to that. Without any, it is not. An optimizer that makes the state of a
    parameter at its first gradient, and not before, holds none of frozen parameters; it has to make
    it anew where it was dropped, as it is of what a stage of the trainable set freezes.
    """

    separates_matrices: ClassVar[bool] = False
    moments: ClassVar[Mapping[str, int]] = {
        "exp_avg": 1,
        "momentum_buffer": 1,
        "exp_avg_sq": 2,
        "max_exp_avg_sq": 2,
    }

    states: ClassVar[Collection[frozenset[str]]] = ()

    @abstractmethod
    def create(
        self, param_groups: Sequence[dict[str, Any]], *, learning_rate: float, weight_decay: float
    ) -> Optimizer:
        """An optimizer over ``param_groups`` (torch's form: ``{"params": [...], ...}``).

        ``learning_rate`` is the peak: the loop multiplies each group's own rate by the factor of
        the schedule. A group may hold its own ``lr`` and ``weight_decay``. Raises ValueError for
        parameters that the optimizer cannot take.

        With ``separates_matrices``, groups whose ``hidden_matrices`` is True hold the hidden
        matrices and no others do, each parameter ``stacked`` of equal size upon one another. They
        have no ``lr``: theirs is the provider's to choose, times their ``lr_scale``; and a
        ``weight_decay`` only where a plugin asks for one.
        """
