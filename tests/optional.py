"""Libraries that tests need and a machine may lack. None is imported before a test uses it: what is
imported while tests are collected is in every test process, and in each of its forks."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class Library:
    """A library by its ``name``, imported when an attribute is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # pytest asks whether it is a test
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def optional(name: str, reason: str) -> Any:
    """The library ``name``. The tests of the calling module are skipped where it is not installed,
    for ``reason``."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name}: {reason}", allow_module_level=True)
    return Library(name)
