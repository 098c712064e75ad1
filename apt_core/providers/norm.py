"""Providers of normalisation layers (kind ``norm``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.sections import Section

if TYPE_CHECKING:
    from torch import nn


NORM_EPS = 1e-8
"""Small compared with the mean square of the residual stream, which starts below 1e-5."""

Epsilon = Annotated[float, Field(gt=0, le=1)]


class NormSettings(Section):
    """``model.norm``: the norms of the residual stream."""

    eps: Epsilon = Field(
        default=NORM_EPS, description="Added to the mean square, or the variance, before the root."
    )


class NormProvider(Provider, ABC):
    """Builds layers that normalise over the last dimension: ``layer(x)`` has the shape of x. A
    layer's ``plain()``, if it has one, is a :class:`~apt_core.providers.plain.PlainNorm`."""

    @abstractmethod
    def create_layer(self, d_model: int) -> nn.Module:
        """A new layer for inputs [..., ``d_model``].

        Raises ValueError, naming the setting and the remedy, for a width that cannot be built.
        """
