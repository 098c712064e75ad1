"""What foreign code hands over as plain values: builtin types, within bounds, or an error that says
what it is instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_ITEMS = 100_000
"""Entries that a list or a mapping may have. (A generator may have no end.)"""

MAX_TEXT = 1 << 26
"""Characters of a prompt, and of all the text in the state of one plugin."""

MAX_FACTOR = 1e4
"""The largest ``lr_scale``, ``weight_decay`` and factor of a learning-rate schedule: a larger one
destroys the weights in a step."""


def type_name(value: object) -> str:
    return type(value).__name__


def text(value: Any, what: str = "it") -> str:
    """``value`` as a plain ``str``. Raises TypeError, and UnicodeError for half a surrogate pair,
    which no file takes."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {type_name(value)}, not text")
    plain: str = str.__str__(value)
    plain.encode()
    return plain


def number(value: Any, what: str) -> float:
    """``value`` as a ``float``. Raises TypeError, and OverflowError for one that is too large."""
    if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):
        raise TypeError(f"{what} is a {type_name(value)}, not a number")
    # A tensor that requires a gradient would warn that its number has none, as it is to.
    detach = getattr(value, "detach", None)
    try:
        return float(detach() if callable(detach) else value)
    except OverflowError:
        raise OverflowError(f"{what} is larger than any float") from None


def within(value: Any, what: str, highest: float = math.inf) -> float:
    """``value`` as a finite ``float`` from 0 to ``highest``. Raises TypeError, ValueError."""
    checked = number(value, what)
    if not (math.isfinite(checked) and 0 <= checked <= highest):
        bound = "" if math.isinf(highest) else f" to {highest:g}"
        raise ValueError(f"{what} is {checked:g}, not a number from 0{bound}")
    return checked


def count_of(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is a {type_name(value)}, not an integer")
    if not 0 <= value <= MAX_ITEMS:
        raise ValueError(f"{what} is not a number from 0 to {MAX_ITEMS}")
    return int.__int__(value)


def items_of(value: Any, what: str) -> list[Any]:
    """``value``, a list, a tuple or another iterable, as a list."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"it returned {type_name(value)}, not a list of {what}")
    taken = list(islice(value, MAX_ITEMS + 1))
    if len(taken) > MAX_ITEMS:
        raise ValueError(f"it returned more than {MAX_ITEMS} {what}")
    return taken


def entries_of(value: Any, what: str, limit: int = MAX_ITEMS) -> list[tuple[str, Any]]:
    """The entries of a mapping, whose keys are text."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is a {type_name(value)}, not a mapping")
    taken = [(text(key, f"a key of {what}"), v) for key, v in islice(value.items(), limit + 1)]
    if len(taken) > limit:
        raise ValueError(f"{what} has more than {limit} entries")
    return taken


def plain_tensor(value: Any, what: str) -> Tensor:
    """``value`` as a ``torch.Tensor`` itself, which no code of a plugin computes with, still part
    of its graph. Raises TypeError for one that is not dense, or of a class with operations of its
    own."""
    from torch import Tensor, strided

    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type_name(value)}, not a tensor")
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        advice = ": give its full_tensor()" if hasattr(value, "full_tensor") else ""
        raise TypeError(f"{what} is a {type_name(value)}, not a plain tensor{advice}")
    if type(value) is not Tensor:
        value = value.as_subclass(Tensor)
    if value.layout is not strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{what} is a {kind} tensor: give its dense form")
    if value.is_meta:
        raise TypeError(f"{what} is on the meta device, where it has no values")
    return value


def texts_of(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(f"{what} is the text {value!r}, not a list: a comma is missing")
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise TypeError(f"{what} is a {type_name(value)}, not a list of text")
    return tuple(text(item, f"an item of {what}") for item in islice(value, MAX_ITEMS))
