"""Prompts from arguments, from files and from standard input, and which argument is the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from apt_core.errors import ConfigError, Problem
from apt_core.files import read_at_most, read_file
from apt_core.json_files import parse_json
from apt_core.profile_paths import RUNS, user_path
from apt_core.types import Message

Prompt = str | tuple[Message, ...]

STDIN = "-"
MAX_FILE = 256 << 20
"""The most bytes of a file of prompts, or of standard input."""

EXAMPLE = 'apt-generate "Once upon a time"'


def split_run(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The run that the first argument names, and the rest, which are prompts.

    The first argument is the run if there is a file or folder of this name, also below ``runs/``,
    or if it has the form of a path: a ``/`` in it and no white space. Everything else is a prompt.
    """
    if not arguments:
        return None, []
    first, *rest = arguments
    if names_run(first):
        return first, rest
    return None, [*arguments]


def names_run(text: str) -> bool:
    """Whether ``text`` names a run, by the rule of :func:`split_run`."""
    if not text or text == STDIN or "\0" in text:
        return False
    has_form = os.sep in text and not any(character.isspace() for character in text)
    return has_form or is_there(text)


def is_there(run: str) -> bool:
    """Whether there is a file or folder of this name, also below ``runs/``."""
    path = user_path(run)
    try:
        return path.exists() or (RUNS / path).exists()
    except OSError:  # a name that is too long
        return False


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[Prompt]:
    """The prompts in ``texts``, of which ``-`` is all of standard input, and those in ``files``;
    without any, standard input if it is no terminal.

    Raises ConfigError with what is wrong in the files, and if there is no prompt at all.
    """
    if not texts and not files:
        if sys.stdin.isatty():
            hint = f'{EXAMPLE}; "" begins a new document'
            raise ConfigError("no prompt was given", hint=hint)
        text = _standard_input()
        if not text.strip():
            message = "no prompt was given, and standard input is empty"
            raise ConfigError(message, hint=f'{EXAMPLE}; "" begins a new document')
        return [text]
    found: list[Prompt] = [_standard_input() if text == STDIN else text for text in texts]
    problems: list[Problem] = []
    for path in files:
        try:
            there = list(_prompts_in(path))
        except ConfigError as error:
            problems += error.problems
        else:
            found += there
            if not there:
                problems.append(Problem("holds no prompt", where=str(path)))
    if problems:
        raise ConfigError(problems)
    return found


def _standard_input() -> str:
    """All of it, without its last line feed."""
    where = "standard input"
    stream = getattr(sys.stdin, "buffer", None)
    data = None if stream is None else read_at_most(stream, MAX_FILE + 1)
    if data is None:
        return sys.stdin.read().removesuffix("\n")
    if len(data) > MAX_FILE:
        raise ConfigError(f"is larger than {MAX_FILE / 1e6:g} MB", where=where)
    return decoded(data, where).removesuffix("\n")


def _prompts_in(path: Path) -> Iterator[Prompt]:
    """The prompts of a file: a line each; of a ``.jsonl`` file that of the object in each line.
    Empty lines are none."""
    where = str(path)
    try:
        if where == STDIN:
            data = read_at_most(sys.stdin.buffer, MAX_FILE + 1)
        else:
            data = read_file(path, MAX_FILE)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", "--file", where) from error
    problems: list[Problem] = []
    for number, line in enumerate(decoded(data, where).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".ndjson"):
            yield line
            continue
        try:
            yield _prompt_of(parse_json(line))
        except ValueError as error:
            problems.append(Problem(f"is no prompt: {error}", where=f"{where}:{number}"))
    if problems:
        raise ConfigError(problems)


def _prompt_of(value: object) -> Prompt:
    """The prompt in the value of a line. Raises ValueError."""
    from apt_core.providers.documents import Document

    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError("it is neither a text nor an object with either 'prompt' or 'messages'")
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise ValueError("its 'prompt' is no text")
        return value["prompt"]
    return Document.of({"messages": value["messages"]}).messages


def decoded(data: bytes, where: str) -> str:
    """The text of a file. Raises ConfigError for what is no UTF-8 or no text."""
    begin = data[:2]
    if begin in (b"\xff\xfe", b"\xfe\xff"):
        hint = f"iconv -f UTF-16 -t UTF-8 {where}"
        raise ConfigError("is UTF-16, not UTF-8", where=where, hint=hint)
    if b"\0" in data:
        raise ConfigError("holds NUL bytes: it is no text", where=where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"is not UTF-8: byte 0x{data[error.start]:02x}",
            where=f"{where}:{line}",
            hint="iconv -f LATIN1 -t UTF-8, if that is its encoding",
        ) from None
