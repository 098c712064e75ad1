"""Trains the tokenizer of a run on a bounded sample of its own documents, once for all runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from apt_core.cache import cache_dir
from apt_core.data.store.input import SourceReader
from apt_core.data.store.lock import StopCheck, never_stop, waiting_for
from apt_core.data.tokenizers.chat import MAX_TEMPLATE
from apt_core.errors import ConfigError
from apt_core.files import read_file
from apt_core.log import get_logger
from apt_core.providers.dataset import DataSection, DatasetProvider
from apt_core.providers.tokenizer import TokenizerProvider

log = get_logger("apt.data")


def train_tokenizer(
    tokenizer: TokenizerProvider,
    sources: Sequence[DatasetProvider],
    data: DataSection,
    check_stop: StopCheck = never_stop,
) -> None:
    """Let ``tokenizer``, a trainable one, learn its vocabulary from ``sources``, or take what it
    has learned from them before.

    Each source gives an equal share of ``data.tokenizer.sample_chars``: its first documents, of
    each the first ``sample_chars_per_document``. Where a source has no fingerprint the result is
    not kept. Raises what the sources raise, and what ``check_stop`` does while they
    are read or another process trains.
    """
    key = _key(tokenizer, sources, data)
    try:
        base = None if key is None else cache_dir() / "tokenizers"
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("the tokenizer is not kept: %s", error)
        base = None
    if base is None:
        _train(tokenizer, sources, data, check_stop)
        return
    folder = base / f"{key}"
    if _loaded(tokenizer, folder):
        return
    with waiting_for(base / f"{key}.lock", "the tokenizer", check_stop):
        if not _loaded(tokenizer, folder):
            _train(tokenizer, sources, data, check_stop)
            _keep(tokenizer, folder)


def take_trained(
    tokenizer: TokenizerProvider, sources: Sequence[DatasetProvider], data: DataSection
) -> bool:
    """Let ``tokenizer`` have what :func:`train_tokenizer` has kept for the same ``sources``;
    whether there is that. Nothing is trained."""
    key = _key(tokenizer, sources, data)
    return key is not None and _loaded(tokenizer, cache_dir() / "tokenizers" / key)


def _train(
    tokenizer: TokenizerProvider,
    sources: Sequence[DatasetProvider],
    data: DataSection,
    check_stop: StopCheck,
) -> None:
    began, sample = time.monotonic(), _Sample(sources, data, check_stop)
    name = tokenizer.get_name()
    log.info("the tokenizer %s is trained on the run's documents", name)
    tokenizer.train(sample)
    if not sample.num_chars:
        raise ConfigError(
            "there is no text to train the tokenizer on",
            key="data.tokenizer_name",
            hint="give the sources text to read",
        )
    log.info(
        "trained the tokenizer %s in %.1f s: %s ids from %s characters",
        name,
        time.monotonic() - began,
        f"{tokenizer.vocab_size:,}",
        f"{sample.num_chars:,}",
    )


class _Sample:
    """The texts to learn from; ``num_chars`` counts their characters."""

    def __init__(
        self, sources: Sequence[DatasetProvider], data: DataSection, check_stop: StopCheck
    ) -> None:
        self._sources, self._data, self._check_stop = sources, data, check_stop
        self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        settings, form = self._data.tokenizer, self._data.normalize
        for source in self._sources:
            room = -(-settings.sample_chars // len(self._sources))
            for _, document in SourceReader(source, check_stop=self._check_stop).documents():
                left = min(room, settings.sample_chars_per_document)
                for part in document.parts:
                    text = part[:left] if form == "none" else unicodedata.normalize(form, part)
                    text = text[:left]
                    if text:
                        self.num_chars += len(text)
                        yield text
                    left, room = left - len(text), room - len(text)
                if room <= 0:
                    break


def _key(
    tokenizer: TokenizerProvider, sources: Sequence[DatasetProvider], data: DataSection
) -> str | None:
    kind = type(tokenizer)
    facts: list[object] = [
        f"{kind.__module__}.{kind.__qualname__}",
        tokenizer.get_version(),
        getattr(tokenizer, "settings", data.tokenizer).model_dump(mode="json"),
        _content(data.tokenizer.chat_template),
        data.normalize,
        unicodedata.unidata_version if data.normalize != "none" else "",
    ]
    for source in sources:
        fingerprint = source.fingerprint()
        if fingerprint is None:
            return None
        columns = source.data_section.columns.model_dump(mode="json")
        facts.append([type(source).__qualname__, fingerprint, columns])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _content(path: str | None) -> str:
    """The hash of a file, empty where there is none: who needs it says so."""
    try:
        return "" if path is None else hashlib.sha256(read_file(path, MAX_TEMPLATE)).hexdigest()
    except OSError:
        return ""


def _loaded(tokenizer: TokenizerProvider, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        tokenizer.load(folder)
    except (OSError, ValueError) as error:
        log.warning("the tokenizer in %s is trained anew: %s", folder, error)
        return False
    return True


def _keep(tokenizer: TokenizerProvider, folder: Path) -> None:
    """Write it under another name first, so that a reader sees all of it or nothing."""
    try:
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.building-"))
        try:
            tokenizer.save(made)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            os.rename(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        log.warning("the tokenizer is not kept: %s", error)
