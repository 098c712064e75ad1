"""Providers of alignment objectives (kind ``align``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch import Tensor

    from apt_core.types import ModelOutput


class AlignProvider(Provider, ABC):
    """Pulls the live model towards a stable state of itself."""

    @abstractmethod
    def loss(self, live: ModelOutput, stable: ModelOutput, targets: Tensor) -> Tensor:
        """The 0-d loss in nats per target token between two outputs for the same batch.

        ``targets`` is int64 [B, T], -100 where nothing counts. No gradient reaches ``stable``.
        """
