"""The reference of every command as Markdown: arguments and options, as its functions declare
them."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    import typer

HEADER = """# Commands

Generated from the commands themselves by `apt-hooks docs commands`. Each has `--help` and
`--version` too, and `python -m apt_core VERB` is the same as `apt-VERB`. Exit codes: 0 success,
1 the run failed, 2 bad input; 129, 130 and 143 a signal stopped a run after a checkpoint.
"""

TABLE = "| option | value | default | meaning |\n|---|---|---|---|\n"
SHOWN_BOUND = 1e6
"""Bounds beyond it only keep sizes within what a machine can count."""
VALUES: Mapping[Any, str] = {str: "text", int: "whole number", float: "number", Path: "path"}


def command_reference(apps: Mapping[str, typer.Typer]) -> str:
    """One section a command, and a part for each of its verbs; ``apps`` by their commands."""
    return "\n".join([HEADER, *(part for name, app in apps.items() for part in _app(name, app))])


def _app(name: str, app: typer.Typer) -> Iterator[str]:
    commands = app.registered_commands
    if len(commands) == 1 and app.registered_callback is None:
        yield _section(f"## {name}", name, commands[0])
        return
    own = app.registered_callback
    if own is not None and own.invoke_without_command is True:
        yield _section(f"## {name}", name, own)
    else:
        yield _told_of(name, app)
    for command in commands:
        if not command.hidden:
            verb = command.name or command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
            yield _section(f"### {name} {verb}", f"{name} {verb}", command)


def _told_of(name: str, app: typer.Typer) -> str:
    """The section of a command that does nothing without a verb."""
    told = _prose(app.info.help) if isinstance(app.info.help, str) else ""
    return "\n".join(line for line in (f"## {name}\n", f"{told}\n" if told else "") if line)


def _section(heading: str, name: str, command: Any) -> str:
    parameters = list(_parameters(command.callback))
    words = [name]
    if any(each.is_option for each in parameters):
        words.append("[OPTIONS]")
    words += [each.usage for each in parameters if not each.is_option]
    if (command.context_settings or {}).get("allow_extra_args"):
        words.append("…")
    lines = [heading, "", f"`{' '.join(words)}`", ""]
    if told := _prose(command.help or inspect.getdoc(command.callback) or ""):
        lines += [told, ""]
    if parameters:
        lines += [TABLE + "".join(each.row for each in parameters)]
    return "\n".join(lines)


class _Parameter:
    """One argument or option of a command's function."""

    def __init__(self, name: str, annotation: Any, info: Any, default: Any) -> None:
        self._annotation, self._info, self._default = annotation, info, default
        self.is_option = type(info).__name__ == "OptionInfo"
        self._several, self._type = _inner(annotation)
        # In an Annotated type the first name stands where the default was once given.
        first = (info.default,) if isinstance(info.default, str) else ()
        self.names: tuple[str, ...] = (*first, *(info.param_decls or ()))
        if not self.is_option:
            self.names = (info.metavar or name.rstrip("_").upper(),)
        elif not self.names:
            word = name.strip("_").replace("_", "-")
            self.names = (f"--{word}", f"--no-{word}") if self._type is bool else (f"--{word}",)
        self.names = tuple(part for each in self.names for part in each.split("/"))

    @property
    def usage(self) -> str:
        word = self.names[0]
        if self._info.metavar or self._needed:
            return word
        return f"[{word}{'…' * self._several}]"

    @property
    def row(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.names)
        told = _prose(self._info.help or "")
        if self._info.envvar:
            told += f" Also by the environment variable `{self._info.envvar}`."
        cells = (names, self._value, self._shown_default, told)
        return "| {} |\n".format(" | ".join(cell.replace("|", "\\|") for cell in cells))

    @property
    def _needed(self) -> bool:
        return self._default in (inspect.Parameter.empty, ...)

    @property
    def _value(self) -> str:
        """What may be given, in words; nothing for a flag."""
        if self._type is bool:
            return ""
        if choices := _choices(self._type):
            words = ", ".join(f"`{choice}`" for choice in choices)
        else:
            bounds = (("≥", self._info.min), ("≤", self._info.max))
            shown = ", ".join(
                f"{sign} {bound:g}"
                for sign, bound in bounds
                if bound is not None and abs(bound) < SHOWN_BOUND
            )
            words = f"{VALUES.get(self._type, 'text')} {shown}".rstrip()
        return f"{words}, several" if self._several else words

    @property
    def _shown_default(self) -> str:
        if self._needed:
            return "needed"
        value = getattr(self._default, "value", self._default)
        if value is True:
            return "on"
        return "–" if value is False or value in (None, "", []) else f"`{value}`"


def _parameters(function: Any) -> Iterator[_Parameter]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation, info = hints.get(name, str), None
        if get_origin(annotation) is Annotated:
            annotation, *notes = get_args(annotation)
            info = next(
                (n for n in notes if type(n).__name__ in ("OptionInfo", "ArgumentInfo")), None
            )
        if info is not None and not info.hidden:
            yield _Parameter(name, annotation, info, parameter.default)


def _inner(annotation: Any) -> tuple[bool, Any]:
    """Whether an option takes several values, and the type of one; None is no value."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) in (list, tuple, Sequence):
        return True, get_args(annotation)[0]
    return False, annotation


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(choice.value) for choice in kind]
    return []


def _prose(text: str) -> str:
    """A help text as Markdown, one line a paragraph; what looks like markup in it is none."""
    paragraphs = inspect.cleandoc(text).replace("\b", "").split("\n\n")
    joined = "\n\n".join(re.sub(r"\s+", " ", part).strip() for part in paragraphs)
    return re.sub(r"([<*_\[\]`])", r"\\\1", joined)
