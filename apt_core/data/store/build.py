"""Builds the token store of a source, or opens the one that is there."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from apt_core.cache import cache_dir
from apt_core.data.pipeline.prepare import PipelineSettings
from apt_core.data.pipeline.split import SplitRule
from apt_core.data.store.assemble import Assembled, Assembly, Engine, ProgressCallback
from apt_core.data.store.chunks import ChunkEncoder, name_of
from apt_core.data.store.format import (
    FORMAT,
    Begun,
    DamagedStoreError,
    PartName,
    PartRow,
    StoreError,
    StoreManifest,
    note_checked,
    write_manifest,
)
from apt_core.data.store.input import SourceReader, naming, settings_row
from apt_core.data.store.local import available_cores
from apt_core.data.store.lock import FileLock, StopCheck, is_locked, never_stop, waiting_for
from apt_core.data.store.reader import TokenStore
from apt_core.data.store.writer import PartWriter, link_shard
from apt_core.errors import ConfigError
from apt_core.files import flush
from apt_core.log import get_logger
from apt_core.providers.dataset import DataSection, DatasetProvider
from apt_core.providers.tokenizer import TokenizerProvider

log = get_logger("apt.data")

ENGINES = {"local": "apt_core.data.store.local:run_local", "ray": "apt_core.data.store.ray:run_ray"}

BUILDING, EARLY = ".building-", ".early"
PRIVATE = "private-"


def growing_store(
    source: DatasetProvider, tokenizer: TokenizerProvider, settings: DataSection
) -> GrowingStore | None:
    """The store that :func:`build_store` makes, as far as it is there. None where it is not shared,
    so that no other process can be building it: without a cache, or without a fingerprint of the
    source or of the tokenizer. Raises ProviderError, ConfigError."""
    build = Build(source, _encoder(tokenizer, settings), _engine("local"), 1, None)
    with naming("tokenizer", tokenizer, "fingerprint()"):
        of_tokenizer = tokenizer.fingerprint()
    with naming("dataset", source, "fingerprint()"):
        of_source = source.fingerprint()
    base = stores_folder()
    if base is None or of_tokenizer is None or of_source is None:
        return None
    return GrowingStore(build, base, build.key(of_source, of_tokenizer))


def built_store(
    source: DatasetProvider, tokenizer: TokenizerProvider, settings: DataSection
) -> TokenStore | None:
    """The store that :func:`build_store` makes, if it is there and shared; nothing is built. Raises
    what :func:`growing_store` does."""
    found = growing_store(source, tokenizer, settings)
    return None if found is None else found.build.opened(found.base / found.key)


def build_store(
    source: DatasetProvider,
    tokenizer: TokenizerProvider,
    settings: DataSection,
    *,
    engine: str = "local",
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    check_stop: StopCheck = never_stop,
) -> TokenStore:
    """The token store of what ``source`` yields under ``settings``, the profile's ``data``.

    It is kept in the cache under a hash of all that decides its content, and opened there from then
    on; while another process builds it, this one waits. One that is damaged is built anew. Without
    a fingerprint of the tokenizer it ends with the last object that uses it; without one of the
    source everything is read to know whether it has changed. ``workers`` processes encode, by
    default ``build_workers``, or one a core. What ``check_stop`` raises ends the build or the wait.

    Raises ConfigError for bad input, ProviderError for a source or tokenizer that fails, StoreError
    where the store cannot be written, ConfigError if there is nothing to learn from.
    """
    build = Build(
        source=source,
        encoder=_encoder(tokenizer, settings),
        engine=_engine(engine),
        workers=workers or settings.build_workers or available_cores(),
        progress=progress,
        check_stop=check_stop,
    )
    with naming("tokenizer", tokenizer, "fingerprint()"):
        fingerprint = tokenizer.fingerprint()
    base = stores_folder()
    try:
        if base is None:
            return build.temporary()
        if fingerprint is None:
            return build.private(base)
        return build.shared(base, fingerprint)
    except OSError as error:
        raise StoreError(
            f"the token store cannot be written in {base}: {error.strerror or error} (make room "
            "there, or name another folder with APT_CACHE)"
        ) from error


def _encoder(tokenizer: TokenizerProvider, settings: DataSection) -> ChunkEncoder:
    rule = SplitRule.of_fraction(settings.val_fraction, settings.max_val_chars)
    return ChunkEncoder(tokenizer, PipelineSettings.of(settings), rule)


def stores_folder() -> Path | None:
    """The folder of token stores in the cache. None, which the log says, where there is none and
    none can be made. Raises StoreError on a full disk."""
    try:
        folder = cache_dir() / "stores"
        folder.mkdir(parents=True, exist_ok=True)
        os.listdir(folder)
        return folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"the cache has no room for token stores: {error}") from error
        log.warning("the token store is not kept: %s", error)
        return None


@dataclass(frozen=True)
class Build:
    """A source and all that makes a store of it."""

    source: DatasetProvider
    encoder: ChunkEncoder
    engine: Engine
    workers: int
    progress: ProgressCallback | None
    check_stop: StopCheck = never_stop

    def shared(self, base: Path, fingerprint: str) -> TokenStore:
        """The store in ``base``, which processes and runs share. Raises OSError."""
        with naming("dataset", self.source, "fingerprint()"):
            of_source = self.source.fingerprint()
        hashing = of_source is None
        if hashing:
            name = name_of("dataset", self.source)
            log.info("%s has no fingerprint: all of it is read", name)
            reader = SourceReader(self.source, hashing=True, check_stop=self.check_stop)
            of_source = reader.fingerprint_of_all()
        key = self.key(cast("str", of_source), fingerprint)
        found = self.opened(base / key)
        if found is not None:
            return found
        if not os.access(base, os.W_OK):
            log.warning("the token store is not kept: %s cannot be written", base)
            return self.temporary()
        with waiting_for(base / f"{key}.lock", "the token store", self.check_stop) as lock:
            found = self.opened(base / key, log_damage=True)
            if found is not None:
                return found
            if lock.works:
                remove_leftovers(base, key)
            self._into(base, key, of_source if hashing else None)
        return TokenStore.open(base / key)

    def private(self, base: Path) -> TokenStore:
        """A store that ends with the last object that uses it. Raises OSError."""
        key = f"{PRIVATE}{os.getpid()}-{secrets.token_hex(8)}"
        lock = FileLock(base / f"{key}.lock")
        lock.acquire()
        owner = PrivateFolder(base / key, lock)
        if lock.works:
            remove_leftovers(base, key)
        return self._owned(base, key, owner)

    def temporary(self) -> TokenStore:
        """The same, outside of the cache."""
        base = Path(tempfile.mkdtemp(prefix="apt-store-"))
        return self._owned(base, PRIVATE, PrivateFolder(base))

    def _owned(self, base: Path, key: str, owner: PrivateFolder) -> TokenStore:
        try:
            self._into(base, key)
            return TokenStore.open(base / key, owner)
        except BaseException:
            owner.end()
            raise

    def opened(self, folder: Path, *, log_damage: bool = False) -> TokenStore | None:
        """The store in ``folder``, if it is there and right."""
        if not folder.exists():
            return None
        try:
            store = TokenStore.open(folder)
            if store.manifest.sample_sha256 == self._sample_sha256(store.manifest.sample):
                return store
            name = name_of("tokenizer", self.encoder.tokenizer)
            reason = (
                f"{name} makes other ids under the same fingerprint, which leaves something out"
            )
        except DamagedStoreError as error:
            reason = str(error)
        if log_damage:
            log.warning("the token store %s is built anew: %s", folder, reason)
        return None

    def _sample_sha256(self, sample: str) -> str:
        with naming("tokenizer", self.encoder.tokenizer, "encode()"):
            ids = self.encoder.tokenizer.encode(sample)
            return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()

    def key(self, of_source: str, of_tokenizer: str) -> str:
        """A hash of all that decides what the store holds."""
        facts = {
            "format": FORMAT,
            "source": [_class_name(self.source), of_source],
            "settings": settings_row(getattr(self.source.data_section, "columns", None)),
            "tokenizer": [_class_name(self.encoder.tokenizer), of_tokenizer],
            "pipeline": self.encoder.settings.facts(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _into(self, base: Path, key: str, expected: str | None = None) -> None:
        """Build the store ``key``, of documents whose hash is as ``expected``, if it is given."""
        began = time.monotonic()
        made = base / f"{key}{BUILDING}{os.getpid()}-{secrets.token_hex(4)}"
        made.mkdir()
        try:
            published = None if key.startswith(PRIVATE) or expected else base
            built, reader = self._assembled(made, key, published, hashing=expected is not None)
            if reader.sha256 != expected:
                raise StoreError(f"{name_of('dataset', self.source)} changed while it was read")
            description = self.description()
            _require_learnable(built, self.source.data_key, description)
            manifest = self.manifest(
                key, built.parts, built.counts, reader.sample, built.begun, description
            )
            write_manifest(made, manifest)
            note_checked(made)
            flush(made)
            _replace(base / key, made)
            flush(base)
            remove_early(base / f"{key}{EARLY}")
        finally:
            shutil.rmtree(made, ignore_errors=True)
        counts = ", ".join(f"{count:,} {name}" for name, count in built.counts.items() if count)
        log.info(
            "built the token store in %.1f s: %s tokens to train on, %s to evaluate on; "
            "documents: %s",
            time.monotonic() - began,
            f"{built.parts['train'].tokens:,}",
            f"{built.parts['val'].tokens:,}",
            counts,
        )

    def _assembled(
        self, folder: Path, key: str, base: Path | None, *, hashing: bool
    ) -> tuple[Assembled, SourceReader]:
        """Make the parts in ``folder``; if the split turns out not to serve, once more. With
        ``base``, whole shards are published there meanwhile."""
        encoder = self.encoder
        while True:
            work = folder / f"work-{secrets.token_hex(4)}"
            work.mkdir()
            reader = SourceReader(self.source, hashing=hashing, check_stop=self.check_stop)
            early = None if base is None else EarlyStore(base, key, self, reader)
            publish = None if early is None else early.publish
            assembly = Assembly(work, reader, encoder, publish)
            built = assembly.run(self.engine, self.workers, self.progress)
            _require_documents(built, self.source)
            rule = None if reader.holds_out else encoder.rule.corrected(built.seen)
            if rule is None:
                for path in list(work.iterdir()):
                    if path.is_file():
                        path.rename(folder / path.name)
                shutil.rmtree(work)
                return built, reader
            shutil.rmtree(work)
            encoder = replace_rule(encoder, rule)

    def description(self) -> str:
        """One line about the source. Raises ProviderError."""
        with naming("dataset", self.source, "describe()"):
            return str(self.source.describe())

    def manifest(
        self,
        key: str,
        parts: dict[PartName, PartRow],
        counts: dict[str, int],
        sample: str,
        begun: Begun | None,
        description: str,
    ) -> StoreManifest:
        """What a store of these parts says of itself."""
        return StoreManifest(
            format=FORMAT,
            key=key,
            source=description,
            tokenizer=self.encoder.tokenizer.get_name(),
            vocab_size=self.encoder.tokenizer.vocab_size,
            dtype=cast("Any", self.encoder.dtype.name),
            settings=self.encoder.settings.row(),
            sample=sample,
            sample_sha256=self._sample_sha256(sample),
            counts=counts,
            parts=parts,
            begun=begun,
        )


def replace_rule(encoder: ChunkEncoder, rule: SplitRule) -> ChunkEncoder:
    """The same encoder with another split."""
    return ChunkEncoder(encoder.tokenizer, encoder.settings, rule)


class Known(NamedTuple):
    """A store as far as it is there: all of it, if it is ``whole``, or some of its first shards and
    what is evaluated on from the start."""

    store: TokenStore
    whole: bool


@dataclass(frozen=True)
class GrowingStore:
    """The store ``key`` in ``base``, which some process may still be building."""

    build: Build
    base: Path
    key: str

    def newest(self) -> Known | None:
        """What is there of it now."""
        whole = self.build.opened(self.base / self.key)
        if whole is not None:
            return Known(whole, True)
        folder = self.base / f"{self.key}{EARLY}"
        try:
            return Known(TokenStore.open(folder, ReadFolder(folder)), False)
        except (DamagedStoreError, OSError):
            return None

    def is_being_built(self) -> bool:
        """Whether a process builds it now."""
        return is_locked(self.base / f"{self.key}.lock")


class ReadFolder:
    """Keeps a folder of an early store from being deleted while this object lives. Raises
    OSError."""

    def __init__(self, folder: Path) -> None:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def remove_early(folder: Path) -> None:
    """Delete the folder of an early store, unless a run reads it."""
    import fcntl

    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


class EarlyStore:
    """What of a store is whole while the rest is being built, as a store of its own: all whole
    shards to train on, and what was held out when the first of them was whole."""

    def __init__(self, base: Path, key: str, build: Build, reader: SourceReader) -> None:
        self._folder, self._key = base / f"{key}{EARLY}", key
        self._build, self._reader = build, reader
        self._held_out: PartRow | None = None
        self._linked = 0

    def publish(self, work: Path, writers: Mapping[PartName, PartWriter], begun: Begun) -> None:
        """Add the shards that are whole now. Raises OSError."""
        folder, train = self._folder, writers["train"].at_border
        # That of a builder that has ended may be read: the same files take the place of its own.
        folder.mkdir(exist_ok=True)
        if self._held_out is None:
            made = work / "held_out"
            made.mkdir()
            self._held_out = writers["val"].copy_into(made)
            for path in made.iterdir():
                path.replace(folder / path.name)
            made.rmdir()
        for number in range(self._linked, len(train.shards)):
            link_shard(work, folder, "train", number, train.shards[number])
        self._linked = len(train.shards)
        parts: dict[PartName, PartRow] = {"train": train, "val": self._held_out}
        sample, source = self._reader.sample, self._build.description()
        manifest = self._build.manifest(self._key, parts, {}, sample, begun, source)
        write_manifest(folder, manifest)
        note_checked(folder)
        log.debug("%d shards of the token store can be trained on", self._linked)


class PrivateFolder:
    """A store's folder that is deleted with this object, or at the end of the process."""

    def __init__(self, folder: Path, lock: FileLock | None = None) -> None:
        self._finalizer = weakref.finalize(self, _end_private, folder, lock, os.getpid())

    def end(self) -> None:
        """Delete it now."""
        self._finalizer()


def _end_private(folder: Path, lock: FileLock | None, process: int) -> None:
    # A forked process has a copy of the object, but not the folder.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()


def remove_leftovers(base: Path, key: str) -> None:
    """Delete what builders have left that ended before they were done: of ``key``, whose lock this
    process holds, and of all others that nobody holds."""
    _remove_unfinished(base, key)
    for path in base.glob(f"*{EARLY}"):
        if not (base / f"{path.stem}.lock").exists():
            remove_early(path)
    for path in base.glob("*.lock"):
        lock = FileLock(path)
        try:
            if path.stem == key or not lock.acquire():
                continue
        except OSError:
            continue
        try:
            if lock.works:
                _remove_unfinished(base, path.stem)
        finally:
            lock.release()


def _remove_unfinished(base: Path, key: str) -> None:
    remove_early(base / f"{key}{EARLY}")
    found = list(base.glob(f"{key}{BUILDING}*"))
    if key.startswith(PRIVATE):
        found += [base / key]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            log.info("%s is deleted: its builder ended before it was done", path)
            shutil.rmtree(path, ignore_errors=True)


def _replace(folder: Path, made: Path) -> None:
    """Put ``made`` in the place of ``folder``: of a damaged store, or of a file or link, if
    something is there."""
    if not os.path.lexists(folder):
        made.rename(folder)
        return
    old = made.with_name(f"{made.name}-old")
    folder.rename(old)
    made.rename(folder)
    if old.is_symlink() or not old.is_dir():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def _require_documents(built: Assembled, source: DatasetProvider) -> None:
    if built.num_kept:
        return
    name, counts = name_of("dataset", source), built.counts
    if not counts["read"]:
        raise ConfigError(
            f"{name} yields no document", key=source.data_key, hint="give it text to read"
        )
    left_out = ", ".join(
        f"{count:,} {what.replace('_', ' ')}"
        for what, count in counts.items()
        if count and what not in ("read", "replaced")
    )
    raise ConfigError(
        f"none of the {counts['read']:,} documents of {name} is left: {left_out}",
        key=source.data_key,
        hint="give it more text, or change data.min_chars and data.max_chars",
    )


def _require_learnable(built: Assembled, key: str, description: str) -> None:
    part = built.parts["train"]
    text = f"the training text of {description}"
    if part.tokens < 2:
        raise ConfigError(
            f"{text} has {part.tokens} tokens: nothing can be learned from it",
            key=f"{key}.train_path",
            hint="give a longer text",
        )
    if not part.learned:
        raise ConfigError(
            f"{text} has {part.tokens:,} tokens, none of which is to be learned",
            key=f"{key}.train_path",
            hint="give responses, or conversations in which the assistant speaks; a chat template "
            "has to write what it says",
        )


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise ConfigError(f"there is no engine {name!r}", hint=f"one of {', '.join(ENGINES)}")
    module, _, function = ENGINES[name].partition(":")
    return cast("Engine", getattr(importlib.import_module(module), function))


def _class_name(provider: object) -> str:
    return f"{type(provider).__module__}.{type(provider).__qualname__}"
