"""Providers of optimizers (kind ``optimizer``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch.optim import Optimizer


class OptimizerProvider(Provider, ABC):
    """Builds the optimizer of a run.

    One that treats hidden matrices (those that map one hidden vector to another, not embeddings or
    the output head) in a way of its own sets ``separates_matrices``.
    """

    separates_matrices: ClassVar[bool] = False

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
