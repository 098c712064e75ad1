"""``dataset:hlbd``: hierarchical language bootstrapping data (HLBD), which is concepts at several
levels, and the tasks of turning one level into another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.jsonl import object_of
from apt_core.data.sources.reading import Reading
from apt_core.json_files import whole_number
from apt_core.providers.dataset import SourceSection
from apt_core.providers.documents import Document

SHIPPED = Path(__file__).with_name("hlbd_concepts.json")
"""The samples that are read where ``train_path`` names none."""

FORM = '{"concept": …, "level_1": {…}, "level_2": {…}, …}'

_LEVEL = re.compile(r"level_([1-9][0-9]{0,3})")
_TASK = re.compile(r"([1-9][0-9]*)>([1-9][0-9]*) ")


class HLBDDataset(FileSource):
    """Reads JSON files of ``{"metadata": …, "samples": […]}``, or the list of samples alone.

    A sample has a ``concept`` and levels ``level_1``, ``level_2``, …, each a text or a mapping of
    texts, which are joined by spaces. Of each two levels it makes a prompt, which names them as
    :func:`prompt_of` does, and the response. All documents of a concept stand on one side of the
    split. Each file is held in memory as a whole.
    """

    name = "hlbd"
    suffixes = (".json",)

    @property
    def section(self) -> SourceSection:
        section = super().section
        if section.train_path is not None:
            return section
        return section.model_copy(update={"train_path": str(SHIPPED)})

    def describe(self) -> str:
        """The paths, with how many files there are and their size; or that it is what comes with
        APT."""
        told = super().describe()
        if super().section.train_path is not None:
            return told
        return told.replace(self.found("train_path").files[0].where, "the words shipped with APT")

    def reader(self, suffix: str) -> Reader:
        return read_hlbd


def prompt_of(source: int, target: int, text: str) -> str:
    """The prompt that asks for level ``target`` of what has ``text`` at level ``source``.

    >>> prompt_of(2, 5, "高高的山")
    '2>5 高高的山'
    """
    return f"{source}>{target} {text}"


def task_of(prompt: str) -> tuple[int, int] | None:
    """The levels that a prompt names, from and to; None for any other prompt.

    >>> task_of("2>5 高高的山")
    (2, 5)
    """
    found = _TASK.match(prompt)
    return None if found is None else (int(found[1]), int(found[2]))


def read_hlbd(reading: Reading) -> Iterator[Document]:
    """The documents of each sample, for each level in turn those that ask for another one."""
    for number, sample in enumerate(_samples(reading), 1):
        where = f"{reading.where}: sample {number}"
        try:
            concept, levels = _parts_of(sample)
        except ValueError as error:
            named = sample.get("concept") if isinstance(sample, dict) else None
            shown = f" ({named[:40]})" if isinstance(named, str) and named else ""
            reading.fault(f"sample {number}{shown} {error}")
            continue
        for source, text in levels.items():
            for target, response in levels.items():
                if source != target:
                    prompt = prompt_of(source, target, text)
                    yield Document(prompt=prompt, response=response, where=where, key=concept)


def _samples(reading: Reading) -> list[Any]:
    """The samples of the file. Raises ConfigError where there are none."""
    try:
        found = json.loads(
            "".join(reading.text()), object_pairs_hook=object_of, parse_int=whole_number
        )
    except json.JSONDecodeError as error:
        reading.fail(f"is not JSON: {error.msg} at column {error.colno:,}", error.lineno)
    except RecursionError:
        reading.fail("is nested too deep")
    except ValueError as error:
        reading.fail(str(error))
    if isinstance(found, dict):
        found = found.get("samples")
    if not isinstance(found, list):
        hint = f'give {{"metadata": …, "samples": [{FORM}, …]}}, or the list alone'
        reading.fail("has no list of samples", hint=hint)
    return found


def _parts_of(sample: Any) -> tuple[str, dict[int, str]]:
    """The concept and the text of each level, in order. Raises ValueError saying what is wrong."""
    if not isinstance(sample, dict):
        raise ValueError(f"is not {FORM}")
    concept = _text(sample.get("concept"), "'concept'")
    levels = {}
    for name, value in sample.items():
        level = _LEVEL.fullmatch(name)
        if level is not None:
            values = list(value.values()) if isinstance(value, Mapping) else [value]
            levels[int(level[1])] = " ".join(_text(each, f"{name!r}") for each in values or [None])
        elif name.startswith("level"):
            raise ValueError(f"has the unknown key {name!r}; levels are level_1, level_2, …")
    if len(levels) < 2:
        raise ValueError("has fewer than two levels, so that it makes no task")
    return concept, dict(sorted(levels.items()))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has no text at {name}")
    # The tokenizer refuses lone surrogates, which JSON may hold, without saying where they stand.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"has a lone surrogate at {name}, which is no text")
    return value
