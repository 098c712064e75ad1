"""Makes a tokenizer again in another process, from JSON and the files that it saves."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from apt_core.error_text import one_line
from apt_core.providers.tokenizer import TokenizerProvider

MAIN = "__main__"


class NotTransferableError(Exception):
    """A tokenizer cannot be made in another process; says why."""


def class_path(cls: type) -> str:
    """``module:name`` of a class that another process can import. Raises NotTransferableError."""
    module, name = cls.__module__, cls.__qualname__
    if module == MAIN or "<locals>" in name:
        raise NotTransferableError(f"no other process can import {module}.{name}")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not cls:
        raise NotTransferableError(f"{module}.{name} is another class by now")
    return f"{module}:{name}"


def plain_config(config: Any) -> dict[str, Any]:
    """The settings of a provider as JSON. Raises NotTransferableError."""
    if config is None:
        return {}
    if isinstance(config, BaseModel):
        return {"model": class_path(type(config)), "json": config.model_dump_json()}
    try:
        text = json.dumps(config)
        if isinstance(config, Mapping) and json.loads(text) == config:
            return {"mapping": text}
    except (TypeError, ValueError):
        pass
    raise NotTransferableError(f"its settings are a {type(config).__name__} that is no JSON")


def describe_tokenizer(tokenizer: TokenizerProvider, folder: Path) -> dict[str, Any]:
    """What :func:`make_tokenizer` needs, as JSON; files are saved in ``folder``. Raises
    NotTransferableError."""
    row = {"class": class_path(type(tokenizer)), "config": plain_config(tokenizer.config)}
    try:
        folder.mkdir()
        tokenizer.save(folder)
        facts = facts_of(tokenizer)
    except OSError:
        raise
    except Exception as error:
        raise NotTransferableError(f"it cannot be saved: {one_line(error)}") from error
    return {**row, "folder": str(folder), "facts": facts}


def make_tokenizer(row: dict[str, Any]) -> TokenizerProvider:
    """The tokenizer that :func:`describe_tokenizer` has described. Raises NotTransferableError
    where it says other things of itself, and what making it raises."""
    config: Any = None
    if "model" in row["config"]:
        model = _imported(row["config"]["model"])
        config = model.model_validate_json(row["config"]["json"])
    elif "mapping" in row["config"]:
        config = json.loads(row["config"]["mapping"])
    tokenizer: TokenizerProvider = _imported(row["class"])(config)
    tokenizer.load(Path(row["folder"]))
    if facts_of(tokenizer) != row["facts"]:
        raise NotTransferableError("what it saves does not make the same tokenizer")
    return tokenizer


def facts_of(tokenizer: TokenizerProvider) -> list[Any]:
    """What is compared of two tokenizers that have to be the same."""
    return [tokenizer.vocab_size, tokenizer.fingerprint()]


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
