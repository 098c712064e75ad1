"""What a plan says of the data: the tokens of small data and of a store that is there, an estimate
for the rest."""

from __future__ import annotations

import os
import time
from typing import Any

from apt_core.data.loading import (
    RunData,
    are_built,
    batch_plan,
    load_data,
    named_sources,
    source_of,
)
from apt_core.data.sources.base import FileSource
from apt_core.data.store.input import SourceReader, naming
from apt_core.data.store.local import available_cores
from apt_core.error_text import one_line
from apt_core.errors import AptError, ConfigError
from apt_core.kernel import Kernel
from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.tokenizer import TokenizerProvider

READ_UP_TO = 64 * 2**20
"""The most bytes of data that a plan tokenizes to find the steps of an epoch, or hashes to find a
store that is there."""

SAMPLE_CHARS = 4 << 20
SAMPLE_SECONDS = 2.0
"""Of more data so much is tokenized, to estimate the rest; a source that does not tell its size and
takes longer to read is large."""

MAX_TOLD = 20


def planned_data(kernel: Kernel) -> tuple[RunData | None, list[dict[str, Any]]]:
    """The data of the run, None if it cannot be read, or is large and its store not there; and a
    row about each source.

    A row has ``name`` (empty but in a mixture), ``description``, ``train_tokens``, ``val_tokens``
    and ``windows``, null where the data is None: then ``estimated_tokens`` are those of all
    documents, and ``build_seconds`` the time that all cores take to tokenize them, null where
    nothing tells. What is wrong with the data is added to the kernel's notices.
    """
    try:
        sources = [(name, source_of(kernel, section)) for name, section in named_sources(kernel)]
        large = [source for _, source in sources if not _is_small(source)]
        if not large or are_built(kernel, large, most_read=READ_UP_TO):
            data = load_data(kernel)
            _note_order(kernel, data)
            return data, [_row(s.row() | {"name": s.name}) for s in data.sources]
        tokenizer = kernel.registry.get("tokenizer", kernel.config.data.tokenizer_name)
        return None, [_estimate(name, source, tokenizer) for name, source in sources]
    except ConfigError as error:
        kernel.notices.extend(f"data: {problem}" for problem in error.problems[:MAX_TOLD])
    except (AptError, OSError, ValueError) as error:
        kernel.notices.append(f"data: {one_line(error)}")
    return None, []


def _note_order(kernel: Kernel, data: RunData) -> None:
    """Add to the kernel's notices what keeps the windows of ``data`` from being drawn: too few, or
    weights of a mixture that come to be negative or all 0."""
    try:
        batch_plan(kernel, data)
    except ConfigError as error:
        kernel.notices.extend(f"data: {problem}" for problem in error.problems)


def _is_small(source: DatasetProvider) -> bool:
    if isinstance(source, FileSource):
        size = source.num_bytes()
        return size is not None and size <= READ_UP_TO
    # Of other sources a path may be anything; only a file tells its size, and only reading what
    # is no file.
    section = source.data_section
    for paths in (section.train_path, section.val_path):
        for path in [paths] if isinstance(paths, str) else paths or ():
            if not os.path.isfile(path) or os.path.getsize(path) > READ_UP_TO:
                return False
    began, chars = time.perf_counter(), 0
    for _, document in SourceReader(source).documents():
        chars += document.num_chars
        if chars > READ_UP_TO or time.perf_counter() - began > SAMPLE_SECONDS:
            return False
    return True


def _row(known: dict[str, Any]) -> dict[str, Any]:
    return {key: known.get(key) for key in _KEYS}


_KEYS = (
    *("name", "description", "train_tokens", "val_tokens", "windows"),
    *("estimated_tokens", "build_seconds"),
)


def _estimate(name: str, source: DatasetProvider, tokenizer: TokenizerProvider) -> dict[str, Any]:
    row = _row({"name": name, "description": source.describe()})
    if tokenizer.trainable:
        return row
    began = time.perf_counter()
    chars = tokens = 0
    records = SourceReader(source).documents()  # kept: a file that is closed tells no position
    for _, document in records:
        tokens += len(tokenizer.encode_document(document).ids)
        chars += document.num_chars
        if chars >= SAMPLE_CHARS or time.perf_counter() - began >= SAMPLE_SECONDS:
            break
    seconds = time.perf_counter() - began
    with naming("dataset", source, "share_read()"):
        share = source.share_read()
    if share is not None and share > 0:
        row["estimated_tokens"] = round(tokens / share)
        row["build_seconds"] = seconds / share / available_cores()
    return row
