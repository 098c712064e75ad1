"""Resets the modules of plugins to their state in a new process, without that of earlier runs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from apt_core.discovery import entry_for, file_module, installed_plugins
from apt_core.plugin_names import is_file_reference, name_of

NO_STATE = (ModuleType, type, FunctionType, BuiltinFunctionType)


@contextmanager
def own_modules(references: Iterable[str], *, anew: bool) -> Iterator[None]:
    """Give a run its own modules of the plugins behind ``references``, and restore them afterwards.

    A plugin that was not imported before is imported separately by each run. With ``anew`` the
    modules of imported ones are reset to their values after import too, with the other modules of
    their package or, without a package, those beside them. Classes and functions stay the same
    objects, so that a test can use isinstance. A module that cannot be run twice keeps its values,
    with a warning.
    """
    references = list(references)
    plugins = dict.fromkeys(name for r in references if (name := _module_behind(r)))
    kept: dict[str, ModuleType] = {}
    changed: list[tuple[ModuleType, dict[str, Any]]] = []
    if anew:
        homes = [home for r in references if (home := _home(r))]
        for name, module in list(sys.modules.items()):
            if name not in plugins and _belongs(name, module, plugins, homes):
                changed.append((module, _reset(name, module)))
        kept = {name: sys.modules.pop(name) for name in plugins if name in sys.modules}
    unknown = [name for name in plugins if name not in sys.modules and name not in kept]
    try:
        yield
    finally:
        for name in unknown:
            sys.modules.pop(name, None)
        for module, values in changed:
            vars(module).update(values)
        sys.modules.update(kept)
        for name, module in kept.items():
            package, _, attribute = name.rpartition(".")
            if package in sys.modules:
                setattr(sys.modules[package], attribute, module)


def modules_of(reference: str) -> list[ModuleType]:
    """The imported modules of the plugin behind a reference: its own and the others of its package
    or, without a package, those beside it."""
    own = _module_behind(reference) or file_module(name_of(reference))
    home = _home(reference)
    return [
        module
        for name, module in list(sys.modules.items())
        if name == own or _belongs(name, module, [own], [home] if home else [])
    ]


def _module_behind(reference: str) -> str:
    """The name of the plugin's module; empty for a file, which is always loaded anew."""
    if is_file_reference(reference):
        return ""
    entry = entry_for(reference, installed_plugins())
    return entry.offers[0].point.module if entry else reference


def _home(reference: str) -> Path | None:
    """The folder of a plugin without a package; None for a folder of installed packages."""
    if is_file_reference(reference):
        return Path(reference).resolve().parent
    name = _module_behind(reference)
    spec = importlib.util.find_spec(name) if "." not in name else None
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).resolve().parent
    shared = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib", "stdlib")}
    return None if home in shared else home


def _belongs(
    name: str, module: ModuleType, plugins: Collection[str], homes: Collection[Path]
) -> bool:
    """Whether the module is in the package of a plugin, or beside one without a package."""
    packages = [plugin.rpartition(".")[0] for plugin in plugins if "." in plugin]
    if any(f"{name}.".startswith(f"{package}.") for package in packages):
        return True
    file = getattr(module, "__file__", None)
    tests = name.startswith((file_module(""), "test_", "conftest", "__main__"))
    return not tests and bool(homes) and isinstance(file, str) and _folder(file) in homes


@lru_cache(maxsize=10_000)
def _folder(file: str) -> Path:
    """The folder of a module's file; there are thousands of modules, asked for in each run."""
    return Path(file).resolve().parent


def _reset(name: str, module: ModuleType) -> dict[str, Any]:
    """Reset a module to the values of a new import; returns its previous values."""
    spec = module.__spec__
    if spec is None or spec.loader is None or not str(spec.origin).endswith(".py"):
        return {}
    again = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(again)
    except Exception as error:
        warnings.warn(
            f"{name} cannot be run a second time ({error}): what it keeps is shared by all runs of "
            "this process",
            stacklevel=5,
        )
        return {}
    had = {key: value for key, value in vars(module).items() if _is_state(key, value)}
    vars(module).update({key: value for key, value in vars(again).items() if key in had})
    return had


def _is_state(name: str, value: Any) -> bool:
    return not name.startswith("__") and not isinstance(value, NO_STATE)
