"""Chooses text lengths for checks: longer than any window that a layer's settings may mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

LONG = 31
"""Tokens of the longer text, unless a setting asks for more."""

LARGEST = 512
"""The largest setting for which a longer text is used; a larger one must be lowered for the
check."""


def integers(provider: Any, *creates: Callable[[], nn.Module]) -> dict[str, int]:
    """Integers that may be numbers of tokens: settings of the provider, and values that layers of
    different shapes, built by ``creates``, have in common."""
    found = dict(_of("", getattr(provider, "__dict__", {})))
    settings = getattr(provider, "config", None)
    found |= _of("", settings if isinstance(settings, Mapping) else _fields(settings))
    with suppress(Exception):  # another check reports a layer that cannot be built
        layers = [create() for create in creates]
        each = [dict(_of_layer(layer)) for layer in layers]
        if each:
            found |= dict(set(each[0].items()).intersection(*(one.items() for one in each)))
    return found


def longer(found: Mapping[str, int]) -> int:
    """A number of tokens above twice the largest integer, and not a round one."""
    return max(LONG, *(2 * n + 3 for n in found.values() if n <= LARGEST), 0)


def too_large(found: Mapping[str, int]) -> str:
    """The settings that are too large for the longest text, as a text."""
    return ", ".join(f"{name} {n:,}" for name, n in sorted(found.items()) if n > LARGEST)


def cuts(length: int, found: Mapping[str, int]) -> list[list[int]]:
    """Ways to feed a text of ``length`` tokens in pieces: one by one, by odd sizes, as one, almost
    all of it first, and in pieces of about each of the integers."""
    sizes = {7, *(n + d for n in found.values() for d in (-1, 0, 1) if 1 < n + d < length)}
    pieces = [[1] * length, [3, 1, length - 4], [length], [length - 1, 1], [1, length - 1]]
    pieces += [_in_pieces(length, size) for size in sorted(sizes)[-9:] if size < length]
    half = length // 2
    return [*pieces, [half, *[1] * (length - half)]]


def _in_pieces(length: int, size: int) -> list[int]:
    whole, rest = divmod(length, size)
    return [size] * whole + [rest] * bool(rest)


def _of(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if type(value) is int and value > 0:
            yield f"{prefix}{name}", value


def _of_layer(layer: nn.Module) -> Iterator[tuple[str, int]]:
    for path, module in layer.named_modules():
        if not type(module).__module__.startswith("torch."):
            yield from _of(f"{path}.", vars(module))


def _fields(settings: Any) -> Mapping[str, Any]:
    return getattr(settings, "__dict__", {})
