"""Makes plugin objects: a plugin is a module of functions, an object, or a class with an object per
run.

Attributes are looked up statically: a property of a plugin is never run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from apt_core.code_source import source_of
from apt_core.error_text import one_line, where_raised
from apt_core.errors import ConfigError
from apt_core.markers import PROJECT
from apt_core.plugin_names import short_name
from apt_core.types import PluginInfo

_MARK = f"{PROJECT}_impl"

CLASS = "Plugin"
"""The name by which a module names its class, of which every manager makes an object of its own."""


def static_function(plugin: Any, name: str) -> Callable[..., Any] | None:
    """The function behind an attribute, without running descriptors; None for anything else."""
    return function_in(inspect.getattr_static(plugin, name, None))


def implementation_options(plugin: Any, name: str) -> dict[str, Any] | None:
    """The options that ``@hookimpl`` left on a function of the plugin, or None."""
    function = static_function(plugin, name)
    return None if function is None else options_of(function)


def function_in(attribute: Any) -> Callable[..., Any] | None:
    """The function that an attribute is, or that a method of either kind wraps; else None."""
    # By its type: an object may say of itself that it is of another, or fail when asked.
    if issubclass(type(attribute), _WRAPPERS):
        attribute = attribute.__func__
    return attribute if issubclass(type(attribute), _FUNCTIONS) else None


_WRAPPERS, _FUNCTIONS = (staticmethod, classmethod), (FunctionType, MethodType)


def options_of(attribute: Any) -> dict[str, Any] | None:
    """The options that ``@hookimpl`` left on a function or method, or None."""
    attribute = attribute.__func__ if isinstance(attribute, MethodType) else attribute
    if type(attribute) is FunctionType:  # as most are, and looking at its type takes longer
        options = vars(attribute).get(_MARK)
    else:
        options = inspect.getattr_static(attribute, _MARK, None)
    return options if isinstance(options, dict) else None


def plugin_info(plugin: Any) -> PluginInfo:
    """The plugin's ``PLUGIN``, or an empty PluginInfo."""
    info = declared_info(plugin)
    return info if isinstance(info, PluginInfo) else PluginInfo()


def declared_info(plugin: Any) -> Any:
    """What stands as ``PLUGIN`` in the plugin; for a module's class, in either of the two."""
    missing = object()
    for place in (plugin_class(plugin), plugin, _module_of_class(plugin)):
        info = inspect.getattr_static(place, "PLUGIN", missing)
        if info is not missing:
            return info
    return None


def _module_of_class(plugin: Any) -> ModuleType | None:
    """The module that names the class of ``plugin``, or ``plugin`` as its class."""
    cls = plugin if inspect.isclass(plugin) else type(plugin)
    module = sys.modules.get(cls.__module__)
    return module if inspect.getattr_static(module, CLASS, None) is cls else None


def plugin_class(plugin: Any) -> type[Any] | None:
    """The class of which each run is given an object of its own: ``plugin`` as one, or what a
    module calls ``Plugin``. None for an object and for a module of functions, whose ``Plugin``, if
    there is one, is something else: a class without hooks."""
    if inspect.isclass(plugin):
        return plugin
    cls = vars(plugin).get(CLASS) if isinstance(plugin, ModuleType) else None
    if not inspect.isclass(cls):
        return None
    own = cls.__module__ == plugin.__name__ and not has_hooks(plugin)
    return cls if own or has_hooks(cls) else None


def has_hooks(plugin: Any) -> bool:
    """Whether any attribute is marked with ``@hookimpl``."""
    return any(implementation_options(plugin, attribute) for attribute in dir(plugin))


def canonical_name(plugin: Any) -> str:
    """The short name of a module, or of the one that names the plugin's class as its own; else
    that class in lower case."""
    module = plugin if isinstance(plugin, ModuleType) else _module_of_class(plugin)
    if module is not None:
        return short_name(module.__name__)
    return (plugin if inspect.isclass(plugin) else type(plugin)).__name__.lower()


def make(cls: type[Any], name: str) -> Any:
    """A plugin's object, for one run."""
    try:
        return cls()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(
            f"its class {cls.__name__} cannot be made: {one_line(error)}",
            key=f"plugin {name}",
            where=where_raised(error, *source_of(cls)),
            hint="it is called without arguments: apt_configure gets the profile"
            if isinstance(error, TypeError)
            else "",
        ) from error
