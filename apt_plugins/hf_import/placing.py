"""The folder of an imported run, which is made within it and put in its place as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.errors import ConfigError
from apt_core.files import flush, write_atomically
from apt_core.held_folders import holding
from apt_core.json_files import read_json, without_nan
from apt_core.runs.layout import CHECKPOINTS, TOKENIZER

RECORD = "import.json"
STAGING = ".importing"


def require_free(output: Path) -> None:
    """Raise ConfigError where there is something at ``output`` already; what a killed import has
    left there is deleted."""
    staging = output / STAGING
    if staging.is_dir():
        with holding(staging) as free:
            if not free or {path.name for path in output.iterdir()} - {STAGING, TOKENIZER}:
                raise _in_use(output)
            shutil.rmtree(output / TOKENIZER, ignore_errors=True)
            shutil.rmtree(staging)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("is in use", "--output", str(output), "name a folder that is not there")


@contextmanager
def staged(output: Path, tokenizer: HFTokenizer) -> Iterator[Path]:
    """Where the run is made: a folder in ``output``, which has the tokenizer meanwhile and is
    empty, or gone, after an error. Raises ConfigError where it cannot be written."""
    existed = output.exists()
    staging = output / STAGING
    try:
        staging.mkdir(parents=True)
    except FileExistsError:
        raise _in_use(output) from None
    except OSError as error:
        raise _unwritable(error, output) from error
    try:
        with holding(staging):
            (output / TOKENIZER).mkdir()
            tokenizer.save(output / TOKENIZER)
            yield staging / "run"
            shutil.rmtree(staging)
    except BaseException as error:
        shutil.rmtree(output, ignore_errors=True)
        if existed:
            output.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(error, output) from error
        raise


def _in_use(output: Path) -> ConfigError:
    message = "an import into it is going on, or was killed"
    return ConfigError(message, "--output", str(output), "delete it if none is")


def _unwritable(error: OSError, output: Path) -> ConfigError:
    message = f"the run cannot be written: {error.strerror or error}"
    return ConfigError(message, "--output", str(error.filename or output))


def settle(run: Path, output: Path, record: Mapping[str, Any]) -> None:
    """Put the run where it belongs. Its checkpoints come first: with them it is a run, whatever
    else is there."""
    path = run / "manifest.json"
    manifest = read_json(path)
    manifest["checkpoint_dir"] = os.path.join(os.path.realpath(output), CHECKPOINTS)
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    record_import(run, record)
    shutil.rmtree(output / TOKENIZER)
    (run / TOKENIZER).rename(output / TOKENIZER)
    (run / CHECKPOINTS).rename(output / CHECKPOINTS)
    for each in sorted(run.iterdir()):
        each.rename(output / each.name)
    flush(output)


def record_import(run: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(without_nan(record), indent=2, ensure_ascii=False)
    write_atomically(run / RECORD, text + "\n")
