"""Providers of normalisation layers (kind ``norm``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch import nn


class NormProvider(Provider, ABC):
    """Builds layers that normalise over the last dimension: ``layer(x)`` has the shape of x."""

    @abstractmethod
    def create_layer(self, d_model: int) -> nn.Module:
        """A new layer for inputs [..., ``d_model``].

        Raises ValueError, naming the setting and the remedy, for a width that cannot be built.
        """
