"""The state of linear attention for decoding: its size does not depend on the text's length.

Shapes as in :mod:`apt_plugins.linear_attn.layer`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from apt_plugins.linear_attn.delta_rule import wide


class LinearCache:
    """The state of a layer after ``length`` tokens of B texts that grow together, and the last
    W - 1 inputs of its convolution. It cannot be cut back."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0
        self._before: Tensor | None = None
        self._state: Tensor | None = None

    def held(self, layer: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before the ``inputs`` [B, T, F] of ``layer``: inputs [B, W - 1, F] and the
        state [B, H, K, V], at first zeros.

        Raises ValueError if there is no room, or for a cache of other sizes.
        """
        end = self.length + inputs.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"a cache for {self.max_length} tokens cannot hold {end}: create a longer one"
            )
        before = len(inputs), layer.conv_size - 1, inputs.shape[2]
        state = (len(inputs), *layer.sizes)
        if self._before is None or self._state is None:
            self._before = inputs.new_zeros(before)
            self._state = inputs.new_zeros(state, dtype=wide(inputs.dtype))
        elif self._before.shape != before or self._state.shape != state:
            raise ValueError(
                f"a cache of {len(self._state)} texts with states {list(self._state.shape[1:])} "
                f"cannot take {len(inputs)} with {list(state[1:])}: create another one"
            )
        return self._before, self._state

    def append(self, inputs: Tensor, state: Tensor, documents: Tensor | None) -> None:
        """Keep the ``state`` after the ``inputs`` [B, T, F], which :meth:`held` was asked for.
        ``documents`` [B, T] count those that have begun: of others than the last nothing is kept.
        """
        assert self._before is not None
        reach = self._before.shape[1]
        last = inputs[:, max(0, inputs.shape[1] - reach) :] if reach else inputs[:, :0]
        if documents is not None:
            ended = documents[:, inputs.shape[1] - last.shape[1] :] != documents[:, -1:]
            last = last.masked_fill(ended[..., None], 0)
        kept = self._before[:, last.shape[1] :]
        if documents is not None:
            kept = kept.masked_fill((documents[:, -1] != 0)[:, None, None], 0)
        self._before = torch.cat([kept, last.to(kept.dtype)], 1)
        self._state = state
        self.length += inputs.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache: 0 before the first ``append``, then the same for any length."""
        return sum(part.nbytes for part in (self._before, self._state) if part is not None)

    def fork(self) -> LinearCache:
        """A cache of its own that holds the same, to continue the text in another way."""
        return copy.copy(self)  # what it holds is replaced, never written to
