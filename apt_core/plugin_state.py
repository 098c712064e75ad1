"""What a checkpoint can keep of the state of one plugin: plain values, and tensors on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apt_core.plain_values import MAX_TEXT, entries_of, plain_tensor, text, type_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_DEPTH = 64
"""How deep the state of a plugin may be nested: JSON is read and written recursively."""

MAX_VALUES = 1_000_000
"""Values in the state of one plugin, all levels together."""

MAX_TENSORS = 10_000
"""Tensors in the state of one plugin: each has an entry in the header of a file."""

MAX_INT_BITS = 2048
"""The most bits of an integer in a state: Python converts only a few thousand digits to text."""

MAX_EXPANDED = 1 << 26
"""Bytes of a tensor in a state whose entries share their memory."""

TENSOR_KEY = "__tensor__"
"""Stands, in the JSON of a plugin's state, for one of its tensors."""


def plain_state(value: Any) -> dict[str, Any]:
    """A copy of ``value``: a mapping of JSON values and dense tensors, nested, within bounds.

    Its tensors are on the CPU, contiguous, of a type that safetensors takes. Raises TypeError,
    ValueError.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"it returned {type_name(value)}, not a mapping")
    plain: dict[str, Any] = _State().plain(value, ())
    return plain


class _State:
    """Takes over one plugin's state, and counts what it is of."""

    def __init__(self) -> None:
        self._values = self._tensors = self._characters = 0

    def plain(self, value: Any, path: tuple[Any, ...]) -> Any:
        """``value``, which stands at ``path``, in plain types. Raises TypeError, ValueError."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise ValueError(f"the state has more than {MAX_VALUES} values")
        if len(path) > MAX_DEPTH:
            raise ValueError(f"the state is nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, int):
            value = int.__int__(value)
            if value.bit_length() > MAX_INT_BITS:
                raise ValueError(f"{_place(path)} is an integer of {value.bit_length()} bits")
            return value
        if isinstance(value, str):
            return self._counted(text(value, _place(path)))
        if isinstance(value, list | tuple):
            return [self.plain(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, Mapping):
            pairs = entries_of(value, _place(path), MAX_VALUES - self._values)
            for key, _ in pairs:
                if self._counted(key) == TENSOR_KEY:
                    raise TypeError(f"{_place(path)} has a key that cannot be saved: {key!r}")
            return {key: self.plain(item, (*path, key)) for key, item in pairs}
        return self._tensor(value, _place(path))

    def _counted(self, value: str) -> str:
        self._characters += len(value)
        if self._characters > MAX_TEXT:
            raise ValueError(f"the state has more than {MAX_TEXT} characters of text")
        return value

    def _tensor(self, value: Any, what: str) -> Tensor:
        import torch

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{what} is a {type_name(value)}: neither JSON nor a tensor")
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise ValueError(f"the state has more than {MAX_TENSORS} tensors")
        tensor = plain_tensor(value, what).detach()
        if not _can_be_saved(tensor.dtype):
            raise TypeError(f"{what} is of type {tensor.dtype}, which no checkpoint takes")
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > max(held, MAX_EXPANDED):
            raise ValueError(f"{what} is expanded from {held} bytes: give what it is expanded from")
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _place(path: tuple[Any, ...]) -> str:
    """What a message calls the entry at ``path``: no more than a line."""
    shown = ".".join(map(str, path))
    return f"state {shown[:60]!r}" if path else "the state"


@functools.cache
def _can_be_saved(dtype: torch.dtype) -> bool:
    """Whether safetensors can write and read the tensor."""
    import torch
    from safetensors.torch import load, save

    try:
        load(save({"tensor": torch.empty(1, dtype=dtype, device="cpu")}))
    except (KeyError, TypeError, ValueError, RuntimeError):
        return False
    return True
