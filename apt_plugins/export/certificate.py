"""``certificate.json``: what was measured between a run's model and its export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_core import ConfigError
from apt_core.files import open_file, write_atomically
from apt_core.json_files import read_json

CERTIFICATE = "certificate.json"
CARD = "README.md"

VERSION = 1


class _Row(BaseModel):
    """Takes the fields of later versions along."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Measured(_Row):
    """The largest difference, and that relative to the largest value of the run's model."""

    absolute: float
    relative: float


class Origin(_Row):
    """The run's folder, relative to that of the certificate, and what of it was exported: how
    ``open_run`` was called."""

    run: str
    checkpoint: str = ""
    profile: str = ""
    step: int = 0
    weights: str = "last"
    plugins: list[str] = Field(default_factory=list)


class Dropped(_Row):
    """What was left out of the model, each with the number of places, and bits per byte of ``text``
    (held-out, or our own where the run's is not there) before and after."""

    parts: dict[str, int]
    bits_per_byte_before: float
    bits_per_byte_after: float
    text: str


class Rounding(_Row):
    """What rounding the weights costs: the largest difference of logits from the run's model, and
    at ``tokens`` of texts the mean divergence of Kullback and Leibler and the mean loss before and
    after, in nats."""

    logits: Measured
    tokens: int
    divergence: float
    loss_before: float
    loss_after: float


class Certificate(_Row):
    """The content of the file. ``options`` are those of the exporter, ``chat_format`` is what
    conversations become there, as of ``apt-chat --format``. Without ``proven`` nothing was run, and
    ``unproven`` says why; the figures are then None.

    The tolerance is one of relative differences, at ``share`` of the places. Where the export
    rounds the weights, it is compared with the rounded model, and ``rounding`` tells the rest.
    """

    version: int = VERSION
    target: str
    options: dict[str, Any] = Field(default_factory=dict)
    origin: Origin
    apt: str
    time: str
    proven: bool
    unproven: str = ""
    chat_format: str = "template"
    runtime: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    tolerance: float | None = None
    share: float = 1.0
    logits: Measured | None = None
    places: int = 0
    blocks: list[Measured] = Field(default_factory=list)
    prompts: int = 0
    prompts_of_held_out_text: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    ties: int = 0
    texts: int = 0
    equal_texts: int = 0
    ends_equal: bool | None = None
    rounding: Rounding | None = None
    dropped: Dropped | None = None
    files: dict[str, str] = Field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the file into the export's folder. Raises OSError."""
        text = json.dumps(self.model_dump(exclude_none=True), indent=2, ensure_ascii=False)
        write_atomically(folder / CERTIFICATE, text + "\n")

    def summary(self) -> str:
        """The figures in one line."""
        if not self.proven or self.logits is None:
            return f"unproven: {self.unproven}"
        ties = f" ({self.ties} ties)" if self.ties else ""
        kept = ""
        if self.rounding is not None:
            change = self.rounding.loss_after - self.rounding.loss_before
            kept = f" of the rounded model, whose loss is {change:+.2g} nats a token"
        texts = f", {self.equal_texts} of {self.texts} texts encoded alike" if self.texts else ""
        return (
            f"{self.runtime}: logits within {self.logits.absolute:.1e}{kept}, "
            f"{self.equal_tokens:,} of {self.tokens:,} greedy tokens equal{ties}{texts}"
        )


def read_certificate(folder: Path) -> Certificate:
    """The certificate in the folder of an export. Raises ConfigError where there is none."""
    path = folder / CERTIFICATE
    try:
        return Certificate.model_validate(read_json(path))
    except FileNotFoundError:
        hint = "give the folder that apt-export wrote"
        raise ConfigError(f"there is no {CERTIFICATE}", where=str(folder), hint=hint) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, ValidationError):
        raise ConfigError("is no certificate of an export", where=str(path)) from None


def hashes_of(folder: Path) -> dict[str, str]:
    """The sha256 of each file of an export, by its name below ``folder``; without the certificate
    and the card, which tell of them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (CERTIFICATE, CARD):
            with open_file(path) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """The files of an export that are not as ``recorded``: other content, missing, or new."""
    there = hashes_of(folder)
    names = there.keys() | recorded.keys()
    return sorted(name for name in names if there.get(name) != recorded.get(name))
