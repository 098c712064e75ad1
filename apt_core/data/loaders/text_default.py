"""``dataset:text_default``: text files, and JSON lines by their suffix."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from apt_core.code_source import short_path
from apt_core.data.preprocess import hold_out
from apt_core.device import available_memory
from apt_core.errors import ConfigError, Problem
from apt_core.files import read_file
from apt_core.providers.dataset import DatasetProvider, TextData

JSON_LINES = (".jsonl", ".ndjson")

MAX_UNREAD = 20
"""The most unreadable lines that are named; the others are counted."""


class TextDataset(DatasetProvider):
    """Reads ``train_path`` and ``val_path``; without the latter, the last tenth is held out.

    A ``.jsonl`` file holds one object a line, with ``text``, or ``prompt`` and ``response``;
    records are separated by a blank line. Any other file is read as UTF-8 text.
    """

    name = "text_default"

    def load(self) -> TextData:
        """Raises ConfigError with all problems of both files, each with its byte offset or line."""
        train_path, val_path = self.setting("train_path", None), self.setting("val_path", None)
        if train_path is None:
            raise ConfigError(
                Problem(
                    "no text to train on",
                    key="data.train_path",
                    hint="give a .txt or .jsonl file, or set data.source to pydoc",
                )
            )
        problems: list[Problem] = []
        train = read_text(Path(train_path), "data.train_path", problems)
        if val_path is None:
            train, val = hold_out(train)
            note = f"{len(val):,} held out from its end"
        elif Path(val_path) == Path(train_path):
            val, note = train, "validated on the same text, so not on unseen text"
        else:
            val = read_text(Path(val_path), "data.val_path", problems)
            note = f"{len(val):,} from {short_path(val_path)}"
        if problems:
            raise ConfigError(problems)
        data = TextData(train, val, "")
        return TextData(
            train,
            val,
            f"{short_path(train_path)}: {len(train):,} characters to train on, {note}, "
            f"sha256 {data.sha256[:12]}",
        )


def read_text(path: Path, key: str, problems: list[Problem]) -> str:
    """The text of ``path``; what is wrong with it is added to ``problems``, and "" returned.

    ``key`` is the profile's key that named the file. Line ends and everything else stay as they
    are; a byte order mark goes.
    """
    where = str(path)
    try:
        data = _bytes_of(path)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no memory is left"
        hint = "give the path of a .txt or .jsonl file"
        problems.append(Problem(f"cannot be read: {reason}", key=key, where=where, hint=hint))
        return ""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        hint = "convert the file to UTF-8, for instance with iconv"
        problems.append(Problem(message, key=key, where=where, hint=hint))
        return ""
    if path.suffix.lower() in JSON_LINES:
        before = len(problems)
        records = _records(text, path, key, problems)
        if len(problems) > before:
            return ""
        text = "\n\n".join(records)
    if not text.strip():
        problems.append(
            Problem("holds no text", key=key, where=where, hint="give a file with text in it")
        )
        return ""
    return text


def _bytes_of(path: Path) -> bytes:
    """The bytes of ``path``. Raises OSError if they do not fit into memory: the system would kill
    the run."""
    import torch  # not at the top: listing providers must not import torch

    size, available = os.stat(path).st_size, available_memory(torch.device("cpu"))
    if size > available:
        reason = (
            f"it has {size / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are left: "
            "a dataset plugin can read it piece by piece"
        )
        raise OSError(errno.EFBIG, reason, str(path))
    return read_file(path)


def _records(text: str, path: Path, key: str, problems: list[Problem]) -> list[str]:
    records: list[str] = []
    unread = 0
    # Only a line feed ends a line: splitlines() would also cut at U+2028 within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, RecursionError) as error:
            unread += 1
            if unread > MAX_UNREAD:
                continue
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problems.append(
                Problem(
                    reason,
                    key=key,
                    where=f"{path}:{number}",
                    hint='each line is {"text": "…"} or {"prompt": "…", "response": "…"}',
                )
            )
    if unread > MAX_UNREAD:
        more = f"{unread - MAX_UNREAD:,} more lines cannot be read"
        problems.append(Problem(more, key=key, where=str(path)))
    return records


def _record(record: Any) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"holds a JSON {type(record).__name__}, not an object")
    if "text" in record:
        parts = [record["text"]]
    elif "prompt" in record and "response" in record:
        parts = [record["prompt"], record["response"]]
    else:
        raise ValueError("has neither 'text' nor 'prompt' and 'response'")
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("holds a value that is not a string")
    text = "\n".join(parts)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds a lone surrogate (\\u{ord(text[error.start]):04x}), which is no text"
        ) from None
    return text
