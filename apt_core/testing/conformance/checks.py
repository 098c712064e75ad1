"""The class of a check, and the comparisons that checks use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

from torch import Tensor


class LeftOut(SkipTest):
    """Raised by a check that does not apply to this provider, with the reason; pytest shows it as
    skipped."""


@dataclass(frozen=True)
class Check:
    """One promise that a provider must keep.

    ``run()`` raises AssertionError, or the error of the provider's code, if it is broken, and
    :class:`LeftOut` if the provider does not claim to keep it.
    """

    name: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return self.name


DEVICE: ContextVar[str] = ContextVar("device", default="cpu")
"""The device on which the present check runs."""


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """A context in which checks run on ``device``."""
    before = DEVICE.set(device)
    try:
        yield
    finally:
        DEVICE.reset(before)


def here(tensor: Tensor) -> Tensor:
    """``tensor`` on the device that the check runs on."""
    return tensor.to(DEVICE.get())


TOLERANCE = 1e-4
"""Tolerance of fp32 results, relative to the largest value."""


def require_equal(
    given: Tensor, expected: Tensor, what: str, tolerance: float | None = None
) -> None:
    """AssertionError unless ``given`` is within ``tolerance``, by default TOLERANCE, of the largest
    value expected."""
    tolerance = TOLERANCE if tolerance is None else tolerance
    assert given.shape == expected.shape, (
        f"{what}: the shape {list(given.shape)} should be {list(expected.shape)}"
    )
    largest = expected.abs().max().item()
    difference = (given.to(expected.dtype) - expected).abs().max().item()
    assert difference <= tolerance * largest, (
        f"{what}: off by {difference:.2g}, where the largest value is {largest:.2g}"
    )


def require_finite(given: Tensor, what: str) -> None:
    assert given.isfinite().all(), f"{what} is not finite"


@contextmanager
def refusing(what: str, *names: str) -> Iterator[None]:
    """AssertionError unless the block raises a ValueError that says one of ``names``."""
    try:
        yield
    except ValueError as error:
        _names_one(error, what, names)
    else:
        raise AssertionError(f"{what} is taken; raise a ValueError{_naming(names)}")


def built_or_refused(create: Callable[[], Any], what: str, *names: str) -> Any:
    """The result of ``create``, or None if it raises a ValueError that mentions one of
    ``names``."""
    try:
        return create()
    except ValueError as error:
        _names_one(error, what, names)
        return None


def _names_one(error: ValueError, what: str, names: tuple[str, ...]) -> None:
    assert not names or any(name in str(error) for name in names), (
        f"{what} is refused with a message{_naming(names, 'does not name')}: {error}"
    )


def _naming(names: tuple[str, ...], verb: str = "names") -> str:
    return f" that {verb} {' or '.join(names)}" if names else ""
