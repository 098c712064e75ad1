"""State that modules keep is found, whatever form it has, and nothing else is taken for it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from apt_core.testing.module_state import ModuleState

HEAD = """
import collections, contextvars, functools, itertools, logging, pathlib, random, re, types, weakref
import numpy, torch

def add(collection, value):
    collection.append(value)
"""

STATE = {
    "a rebound name": ("kept = None", "global kept; kept = object()"),
    "a new name": ("", "global kept; kept = 1"),
    "a number": ("kept = 0", "global kept; kept += 1"),
    "a list": ("kept = []", "kept.append(1)"),
    "a list that is replaced": ("kept = []", "global kept; kept = []"),
    "a dict": ("kept = {}", "kept['a'] = 1"),
    "what is in a tuple": ("kept = ([],)", "kept[0].append(1)"),
    "deep inside": ("kept = {'a': [{'b': set()}]}", "kept['a'][0]['b'].add(1)"),
    "a set": ("kept = set()", "kept.add(1)"),
    "a deque": ("kept = collections.deque()", "kept.append(1)"),
    "a counter": ("kept = collections.Counter()", "kept['a'] += 1"),
    "bytes": ("kept = bytearray(b'x')", "kept[0] = 1"),
    "a namespace": ("kept = types.SimpleNamespace(n=0)", "kept.n += 1"),
    "a weak mapping": ("kept = weakref.WeakKeyDictionary()", "kept[add] = 1"),
    "a weak reference": ("kept = None", "global kept; kept = weakref.ref(add)"),
    "a context": ("kept = contextvars.ContextVar('kept', default=0)", "kept.set(1)"),
    "an iterator": ("kept = itertools.count()", "next(kept)"),
    "random numbers": ("kept = random.Random(0)", "kept.random()"),
    "those of numpy": ("kept = numpy.random.default_rng(0)", "kept.random()"),
    "those of torch": ("kept = torch.Generator()", "torch.rand(1, generator=kept)"),
    "an array": ("kept = numpy.zeros(2)", "kept[0] = 1"),
    "a tensor": ("kept = torch.zeros(2)", "kept.add_(1)"),
    "weights": ("kept = torch.nn.Linear(2, 2)", "kept.weight.data = torch.zeros(2, 2)"),
    "a class": ("class kept:\n    n = 0", "kept.n += 1"),
    "what a class holds": ("class kept:\n    seen = []", "kept.seen.append(1)"),
    "an object": (
        "class Mine:\n    def __init__(self): self.n = 0\nkept = Mine()",
        "kept.n += 1",
    ),
    "slots": (
        "class Mine:\n    __slots__ = ('n',)\nkept = Mine()",
        "kept.n = 1",
    ),
    "a default value": ("def kept(seen=[]):\n    seen.append(1)", "kept()"),
    "a closure": ("kept = (lambda seen: lambda: seen.append(1))([])", "kept()"),
    "what is bound": ("kept = functools.partial(add, [])", "kept(1)"),
    "an attribute of a function": ("def kept(): kept.n = 1", "kept()"),
    "a method's default": (
        "class kept:\n    @staticmethod\n    def add(seen=[]): seen.append(1)",
        "kept.add()",
    ),
}

NO_STATE = {
    "an import": ("", "global kept; import json as kept"),
    "a class that is imported": (
        "kept = None",
        "global kept; from json import JSONDecoder as kept",
    ),
    "a cache": ("@functools.cache\ndef kept(n): return n", "kept(1)"),
    "a logger": ("kept = logging.getLogger('kept')", "kept.isEnabledFor(10)"),
    "a path": ("kept = pathlib.Path('a')", "str(kept), hash(kept), kept.parts"),
    "a pattern": ("kept = re.compile('a')", "kept.match('a')"),
    "an object of a class": ("class kept:\n    n = 0", "kept().n = 1"),
    "equal constants": ("kept = ('a', 1.0)", "global kept; kept = ('a', 1.0)"),
    "an object that has every attribute": (
        "from unittest.mock import MagicMock\nkept = MagicMock()",
        "kept.called",
    ),
    "an object that fails when asked": (
        "class Mine:\n    def __getattr__(self, name): raise RuntimeError(name)\n"
        "    def __repr__(self): raise RuntimeError\nkept = Mine()",
        "pass",
    ),
    "a loop": ("kept = []\nkept.append(kept)", "len(kept)"),
}


def names_changed(source: str, act: str) -> list[str]:
    module = ModuleType("module_of_a_plugin")
    sys.modules[module.__name__] = module
    try:
        exec(f"{HEAD}\n{source}\n\ndef act():\n    {act}\n", vars(module))
        state = ModuleState([module])
        assert state.changed() == []
        module.act()
        return state.changed()
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("form", STATE)
def test_state_is_found(form: str) -> None:
    assert names_changed(*STATE[form]) == ["module_of_a_plugin.kept"]


@pytest.mark.parametrize("form", NO_STATE)
def test_what_is_no_state_is_passed_over(form: str) -> None:
    assert names_changed(*NO_STATE[form]) == []
