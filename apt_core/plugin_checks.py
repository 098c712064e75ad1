"""Checks whether an object is a plugin that can be registered, and reports all problems at once.

Attributes are looked up statically: a property of a plugin is never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from apt_core import hookspecs
from apt_core.code_source import short_path, source_of
from apt_core.error_text import one_line
from apt_core.errors import Problem, did_you_mean
from apt_core.hookspecs import POLICIES
from apt_core.log import get_logger
from apt_core.plugin_objects import (
    CLASS,
    declared_info,
    function_in,
    has_hooks,
    implementation_options,
    options_of,
    plugin_info,
)
from apt_core.types import PluginInfo

log = get_logger("apt.plugins")

_NEVER_PASSED = {
    inspect.Parameter.VAR_POSITIONAL: "*{}",
    inspect.Parameter.VAR_KEYWORD: "**{}",
    inspect.Parameter.KEYWORD_ONLY: "keyword-only {}",
}


def check_plugin_object(plugin: Any, name: str, specs: Mapping[str, Any]) -> list[Problem]:
    """Every reason why ``plugin`` cannot be registered; warns of unmarked functions."""
    try:
        return _problems_of(plugin, name, specs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what an object has is told by code of its own
        message = f"what it has cannot be told: {one_line(error)}"
        return [Problem(message, key=f"plugin {name}")]


def _problems_of(plugin: Any, name: str, specs: Mapping[str, Any]) -> list[Problem]:
    problems = []
    info = declared_info(plugin)
    if info is not None and not isinstance(info, PluginInfo):
        problems.append(
            Problem(
                f"PLUGIN is a {type(info).__name__}",
                key=f"plugin {name}",
                hint="PLUGIN = apt_core.PluginInfo(summary=…, version=…)",
            )
        )
    for attribute in dir(plugin):
        value = inspect.getattr_static(plugin, attribute, None)
        function = function_in(value)
        if function is None:
            if options_of(value) is not None:
                problems.append(
                    Problem(
                        f"@hookimpl marks a {type(value).__name__}, not a function",
                        key=f"plugin {name}, {attribute}",
                        hint="define a function with def",
                    )
                )
            continue
        options = options_of(function)
        if options is not None:
            problems += _check_implementation(plugin, name, attribute, function, options, specs)
            policy = POLICIES.get(options.get("specname") or attribute)
            if plugin_info(plugin).observer and policy and policy.changes_weights:
                problems.append(
                    Problem(
                        "an observer cannot implement it: its result is part of the training",
                        key=f"plugin {name}, {attribute}",
                        hint="take observer=True out of PLUGIN",
                    )
                )
        elif attribute in specs and _defined_here(plugin, function):
            file, line = source_of(function)
            log.warning(
                "plugin %s: %s at %s:%d has the name of a hook but is not marked with @hookimpl; "
                "it will not be called",
                name,
                attribute,
                short_path(file),
                line,
            )
    return problems


def hooks_beside_class(plugin: Any, name: str) -> list[Problem]:
    """A problem for every hook of a module that names a class: nobody would call it."""
    hooks = [] if inspect.isclass(plugin) else dir(plugin)
    return [
        Problem(
            f"its module has hooks beside its class {CLASS}",
            key=f"plugin {name}, {hook}",
            where=_where(getattr(plugin, hook)),
            hint="put them all into the class, or all into the module",
        )
        for hook in hooks
        if implementation_options(plugin, hook)
    ]


def misplaced_hooks(plugin: Any) -> str:
    """Where the hooks of a module that has none may be instead: in a class of it."""
    for name, value in vars(plugin).items() if isinstance(plugin, ModuleType) else ():
        if inspect.isclass(value) and value.__module__ == plugin.__name__ and has_hooks(value):
            return f"its class {name} has hooks: call it {CLASS}, and each run has one of its own"
    return ""


def _defined_here(plugin: Any, function: Callable[..., Any]) -> bool:
    if isinstance(plugin, ModuleType):
        return getattr(function, "__module__", None) == plugin.__name__
    return True


def _check_implementation(
    plugin: Any,
    name: str,
    attribute: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    specs: Mapping[str, Any],
) -> list[Problem]:
    hook = options.get("specname") or attribute
    key, where = f"plugin {name}, {hook}", _where(function)

    def problem(message: str, hint: str) -> Problem:
        return Problem(message, key=key, where=where, hint=hint)

    if not isinstance(hook, str):
        return [problem(f"specname is a {type(hook).__name__}", "give the name of a hook")]
    if hook not in specs:
        hint = did_you_mean(hook, specs) or "'apt-hooks list --all' shows every hook"
        return [problem("there is no hook of this name", hint)]
    problems = []
    if options.get("tryfirst") or options.get("trylast") or options.get("hookwrapper"):
        problems.append(
            problem(
                "tryfirst, trylast and hookwrapper are not offered",
                "use apt_core.hookimpl with priority=… or wrapper=True",
            )
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        problems.append(problem("it is asynchronous", "hooks are plain functions: drop 'async'"))
    if options.get("wrapper") and not inspect.isgeneratorfunction(function):
        problems.append(problem("a wrapper must yield once", "result = yield; return result"))
    if options.get("wrapper") and POLICIES[hook].alone:
        problems.append(
            problem("it is called for one plugin at a time, so a wrapper is around nothing", "")
        )
    if options.get("background"):
        problems += [problem(*found) for found in _check_background(hook, function, options)]
    return problems + [
        problem(message, hint)
        for message, hint in _check_parameters(plugin, attribute, function, specs[hook].argnames)
    ]


def _check_background(
    hook: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Why the implementation cannot be called in the background, each with a hint."""
    allowed = POLICIES[hook].background
    drop = "leave out background=True"
    if not allowed:
        yield "it cannot run in the background: what it does is part of the loop", drop
        return
    for option in ("wrapper", "collective"):
        if options.get(option):
            yield f"it cannot be a {option} and run in the background", drop
    live = [name for name in _offered(hook) if name not in allowed]
    for name in inspect.signature(function).parameters:
        if name in live:
            yield (
                f"parameter {name!r} changes while the run goes on: there is none in the "
                "background",
                f"take {', '.join(allowed)}",
            )


def _offered(hook: str) -> list[str]:
    return list(inspect.signature(getattr(hookspecs, hook)).parameters)


def _where(function: Callable[..., Any]) -> str:
    file, line = source_of(function)
    return f"{short_path(file)}:{line}" if file else ""


def _check_parameters(
    plugin: Any, attribute: str, function: Callable[..., Any], offered: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    parameters = list(inspect.signature(function).parameters.values())
    if _is_method(plugin, attribute):
        if not parameters:
            yield "it is a method without a first parameter", "add 'self'"
        elif parameters[0].kind not in _NEVER_PASSED:
            parameters = parameters[1:]
    for parameter in parameters:
        if parameter.kind in _NEVER_PASSED:
            shown = _NEVER_PASSED[parameter.kind].format(parameter.name)
            yield f"parameter {shown} would never be passed", "name the parameters that you want"
        elif parameter.default is not parameter.empty:
            yield (
                f"parameter {parameter.name!r} has a default and would never be passed",
                "remove the default",
            )
        elif parameter.name not in offered:
            yield (
                f"the hook has no parameter {parameter.name!r}",
                did_you_mean(parameter.name, offered)
                or f"it offers {', '.join(offered) or 'none'}",
            )


def _is_method(plugin: Any, attribute: str) -> bool:
    """Whether the attribute is found on the plugin's class, so that its first parameter is
    bound."""
    found = inspect.getattr_static(plugin, attribute)
    on_class = inspect.getattr_static(type(plugin), attribute, None)
    return found is on_class and not isinstance(found, staticmethod)
