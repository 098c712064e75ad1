"""The cache of keys and values for decoding, so that each token is computed once."""

from __future__ import annotations

import copy

from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer, for up to ``max_length`` positions, filled from left to right.

    The first ``append`` allocates room for all of them, so that none is copied later. Since it
    writes in place, gradients do not flow through it.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``key`` and ``value`` [B, K, T, R]; return all that is held [B, K, S, R], as views.

        The first call fixes batch, heads, widths and dtypes. Raises ValueError if there is no room,
        or if batch, number of heads or widths differ from the first call's.
        """
        start, end = self.length, self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"a cache for {self.max_length} tokens cannot hold {end}: create a longer one"
            )
        if self._keys is None or self._values is None:
            batch, heads, _, width = key.shape
            self._keys = key.new_empty(batch, heads, self.max_length, width)
            self._values = value.new_empty(batch, heads, self.max_length, value.shape[-1])
        elif _sizes(key, value) != _sizes(self._keys, self._values):
            raise ValueError(
                f"a cache for texts, heads and widths {_sizes(self._keys, self._values)} cannot "
                f"take {_sizes(key, value)}: create another one"
            )
        self._keys[:, :, start:end] = key
        self._values[:, :, start:end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache: 0 before the first ``append``, then room for ``max_length``."""
        held = [part for part in (self._keys, self._values) if part is not None]
        return sum(part.numel() * part.element_size() for part in held)

    def truncate(self, length: int) -> None:
        """Forget what is held from position ``length`` on. Raises ValueError above ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be cut to {length}")
        self.length = length

    def fork(self) -> KeyValueCache:
        """A cache of its own that holds the same, to continue the text in another way."""
        other = copy.copy(self)
        if self._keys is not None and self._values is not None:
            other._keys, other._values = self._keys.clone(), self._values.clone()
        return other


def _sizes(key: Tensor, value: Tensor) -> list[int]:
    return [*key.shape[:2], key.shape[-1], value.shape[-1]]
