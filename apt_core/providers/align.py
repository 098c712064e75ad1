"""Providers of alignment objectives (kind ``align``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch import Tensor

    from apt_core.types import ModelOutput


class AlignProvider(Provider, ABC):
    """Pulls the live model towards a stable state of itself."""

    @abstractmethod
    def terms(
        self,
        live: ModelOutput,
        stable: ModelOutput,
        targets: Tensor,
        *,
        vein: Tensor | None = None,
        mutual: bool = False,
    ) -> Mapping[str, Tensor]:
        """The 0-d terms of the loss by name, between two outputs for the same batch.

        Each is a mean over the target tokens, multiplied by its coefficient. ``targets`` is int64
        [B, T], -100 where nothing counts. ``vein`` [D, m] has orthonormal columns: the directions
        that the model's normal compensator takes for the main ones, None where it has none.

        No gradient reaches ``stable``, unless the two are passes of one model that are pulled
        ``mutual``ly towards each other. No gradient reaches ``vein``. Raises ValueError for a
        ``vein`` that is needed and is None.
        """
