"""What a token sees in a sliding window.

Shapes: B batch, T queries, S keys, of which the last T are those of the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from apt_core.modeling.masks import are_documents, document_mask

Made = TypeVar("Made")


@dataclass(frozen=True)
class Sight:
    """A token sees itself, the ``window - 1`` tokens before it, and the first ``prefix`` tokens of
    its text, or of its document; all that came before if ``window`` is None."""

    window: int | None
    prefix: int

    def holds(self, total: int) -> bool:
        """Whether the window holds a whole text of ``total`` tokens."""
        return self.window is None or total <= self.window

    def first(self, query: int) -> int:
        """The first key in the window of the token at ``query``."""
        return 0 if self.window is None else max(0, query + 1 - self.window)

    def near(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys the window holds, later ones excluded: places [..., T] and [S] to boolean
        [..., T, S]."""
        distance = queries[..., None] - keys
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)

    def dense(self, mask: Tensor | None, length: int, total: int, device: torch.device) -> Tensor:
        """What the last ``length`` of ``total`` tokens see, boolean, broadcastable to [B, H, T, S].

        Of a boolean ``mask``, which narrows it, the prefix is the first tokens that it shows.
        """
        places = torch.arange(total, device=device)
        queries = places[total - length :]
        allowed = queries[:, None] >= places
        if mask is not None:
            allowed = allowed & (document_mask(mask, length) if are_documents(mask) else mask)
        if self.window is None:
            return allowed
        near = self.near(queries, places)
        if self.prefix:
            near = near | (allowed.cumsum(-1) <= self.prefix)
        return allowed & near


class LastMade:
    """Keeps what was made last of some document ids, so that the layers of a model make it once."""

    def __init__(self) -> None:
        # In one piece, since threads may share it.
        self._last: tuple[Tensor | None, Any, Any] = (None, None, None)

    def of(self, documents: Tensor | None, key: Any, make: Callable[[], Made]) -> Made:
        """What ``make`` gives for ``documents`` and ``key``."""
        # A graph would keep what was made outside of it.
        if torch.compiler.is_compiling():
            return make()
        if documents is not None and not documents.is_inference():
            key = key, documents._version
        known, known_key, made = self._last
        if documents is known and key == known_key:
            found: Made = made
            return found
        # Tensors made in inference mode could not be used in autograd later.
        with torch.inference_mode(False), torch.no_grad():
            fresh = make()
        self._last = documents, key, fresh
        return fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> LastMade:
        return LastMade()

    def __getstate__(self) -> dict[str, Any]:
        return vars(LastMade())
