"""Providers of expert routers (kind ``router``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch import nn


class RouterProvider(Provider, ABC):
    """Builds routers, called as ``router(x) -> (indices, weights)`` with x [N, D].

    There are E experts in each of G groups, and K of each group are chosen for a token: ``indices``
    is int64 [N, G*K], group by group, where g*E + e is expert e of group g; ``weights`` [N, G*K]
    sum to one in each group, so that identical experts give what one of them gives.

    The router's ``plain()``, if it has one, is a :class:`~apt_core.providers.plain.PlainRouter`.

    A forward in training leaves ``router.logits`` and ``router.probabilities`` [N, G*E], both with
    their gradients, for losses and figures; one in evaluation leaves them as they are.
    """

    @abstractmethod
    def create_router(
        self, d_model: int, num_experts: int, top_k: int, *, groups: int = 1
    ) -> nn.Module:
        """A new router. Raises ValueError where ``top_k`` exceeds ``num_experts``."""
