"""Finds state that modules keep between calls, which all runs of a process share."""

from __future__ import annotations

import os
import random
import re
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextvars import ContextVar
from enum import Enum
from functools import partial
from logging import Logger
from types import CellType, FunctionType, ModuleType
from typing import Any
from weakref import ReferenceType, WeakSet

from apt_core.markers import Priority, hookimpl

DEPTH = 8
PARTS = 20_000
"""The most values that are compared per name: a container may hold a whole run."""

STDLIB = sys.stdlib_module_names

PLAINEST = frozenset({type(None), bool, int, str, bytes})
"""Types of most values. Equal values of one of them are the same."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, os.PathLike, re.Pattern)


class ModuleState:
    """A snapshot of the state of ``modules``: values of names, contents of containers and objects,
    attributes of classes, defaults and closures of functions.

    Caches of ``functools.cache``, loggers and late imports do not count. An object whose class is
    from another package is compared by identity, unless it is a tensor, a torch module or of a
    class of Python's own.
    """

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        self._modules = list(modules)
        self._before = self._contents()

    def changed(self) -> list[str]:
        """The names, as ``module.name``, whose values have changed since the snapshot."""
        return [
            name
            for name, content in self._contents().items()
            if name not in self._before or content.found != self._before[name].found
        ]

    def _contents(self) -> dict[str, _Content]:
        packages = {module.__name__.partition(".")[0] for module in self._modules}
        return {
            f"{module.__name__}.{name}": _Content(value, packages)
            for module in self._modules
            for name, value in list(vars(module).items())
            if not name.startswith("__") and not _is_imported(value, module)
        }


class KeptInModules:
    """A plugin that collects in ``names`` the state that a run changes in the modules returned by
    ``find``."""

    def __init__(self, find: Callable[[], Iterable[ModuleType]]) -> None:
        self._find = find
        self._state = ModuleState(())
        self.names: dict[str, None] = {}

    @hookimpl(priority=Priority.FIRST)
    def apt_configure(self) -> None:
        self._state = ModuleState(self._find())

    @hookimpl(priority=Priority.LAST)
    def on_step_end(self) -> None:
        self.look()

    @hookimpl(priority=Priority.LAST)
    def on_generation_end(self) -> None:
        self.look()

    @hookimpl(priority=Priority.LAST)
    def on_training_end(self) -> None:
        self.look()

    def look(self) -> None:
        self.names.update(dict.fromkeys(self._state.changed()))


def _is_imported(value: Any, module: ModuleType) -> bool:
    if isinstance(value, ModuleType):
        return True
    return isinstance(value, type | FunctionType) and value.__module__ != module.__name__


class _Content:
    """``found`` is a hashable description of a value. Objects described by identity are kept alive,
    so that no other object gets their identity."""

    def __init__(self, value: Any, packages: set[str]) -> None:
        self._packages = packages
        self._kept: list[Any] = []
        self._entered: set[int] = set()
        try:
            self.found = self._of(value, DEPTH)
        except Exception:  # an object of a plugin may fail when it is asked for anything
            self.found = id(value)

    def _of(self, value: Any, depth: int) -> Hashable:
        if type(value) in PLAINEST:
            return type(value), value
        if isinstance(value, PLAIN):
            return type(value), repr(value)
        if isinstance(value, tuple | frozenset):
            return type(value), *(self._of(part, depth - 1) for part in value)
        self._kept.append(value)
        known = depth <= 0 or len(self._kept) > PARTS or id(value) in self._entered
        self._entered.add(id(value))
        parts = () if known else self._parts(value)
        return id(value), *(self._of(part, depth - 1) for part in parts)

    def _parts(self, value: Any) -> Iterable[Any]:
        if (known := _EXACTLY.get(type(value))) is not None:
            return known(value)
        for kinds, parts in _PARTS.items():
            if isinstance(value, kinds):
                return parts(value)
        kind = value if isinstance(value, type) else type(value)
        package = kind.__module__.partition(".")[0]
        if kind is value:
            return _attributes(value) if package in self._packages else ()
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return _of_tensor(value)
        if torch is not None and isinstance(value, torch.Generator):
            return (bytes(value.get_state()),)
        if package == "numpy":
            return (repr(value.bit_generator.state if hasattr(value, "bit_generator") else value),)
        own = package in self._packages | STDLIB
        if own or (torch is not None and isinstance(value, torch.nn.Module)):
            return (*_attributes(value), *_slots(value)) or (repr(value),)
        return ()


def _attributes(value: Any) -> list[Any]:
    """Names and values of what is in the ``__dict__`` of an object or a class, if it has one."""
    own = vars(value).items() if hasattr(value, "__dict__") else ()
    return [pair for pair in list(own) if not pair[0].startswith("__")]


def _slots(value: Any) -> list[Any]:
    names = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
    return [getattr(value, name, None) for name in names if not name.startswith("__")]


def _of_tensor(tensor: Any) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        return version, tensor.shape, tensor.data_ptr()
    except RuntimeError:  # a tensor without storage
        return version, tensor.shape


def _of_function(function: FunctionType) -> tuple[Any, ...]:
    return (
        function.__defaults__,
        function.__kwdefaults__,
        function.__closure__,
        tuple(vars(function).items()),
    )


def _in_cell(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # empty
        return ()


_PARTS: dict[Any, Callable[[Any], Iterable[Any]]] = {
    (ModuleType, Logger): lambda value: (),
    FunctionType: _of_function,
    CellType: _in_cell,
    staticmethod | classmethod: lambda value: (value.__func__,),
    property: lambda value: (value.fget, value.fset),
    partial: lambda value: (value.func, value.args, value.keywords),
    Mapping: lambda value: list(value.items()),
    list | deque | set | WeakSet: lambda value: list(value),
    bytearray: lambda value: (bytes(value),),
    random.Random: lambda value: (value.getstate(),),
    ReferenceType: lambda value: (id(value()),),
    ContextVar: lambda value: (value.get(None),),
}
_EXACTLY: dict[type, Callable[[Any], Iterable[Any]]] = {
    FunctionType: _of_function,
    dict: _PARTS[Mapping],
    list: list,
    set: list,
}
"""The same for types of most of the values: to ask for each kind takes longer."""
