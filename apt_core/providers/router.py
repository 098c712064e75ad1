"""Providers of expert routers (kind ``router``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch import nn


class RouterProvider(Provider, ABC):
    """Builds routers, called as ``router(x) -> (indices, weights)`` with x [N, D].

    ``indices`` is int64 [N, K], the experts chosen for each token, ``weights`` [N, K], which sum
    to one over K, so that identical experts give what one of them gives. ``router.aux`` is a
    mapping of names to the 0-d tensors of its losses and figures.
    """

    @abstractmethod
    def create_router(
        self, d_model: int, num_experts: int, top_k: int, *, groups: int = 1
    ) -> nn.Module:
        """A new router. Raises ValueError where ``top_k`` exceeds ``num_experts``."""
