"""Loads the data that a profile names: its tokenizer, its sources, and the windows of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from apt_core.config import Config
from apt_core.data.batches import BatchPlan, EvaluationPlan
from apt_core.data.early import Found, GrowingData
from apt_core.data.growing import GrowingOrder
from apt_core.data.mixture import mixture_segments
from apt_core.data.order import Order, Segment, StepPlan
from apt_core.data.packing.choice import windows_of
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.rows import Windows
from apt_core.data.store.assemble import ProgressCallback
from apt_core.data.store.build import build_store, built_store, growing_store
from apt_core.data.store.format import PARTS, PartName
from apt_core.data.store.input import naming
from apt_core.data.store.lock import StopCheck, never_stop
from apt_core.data.store.reader import StoredPart, TokenStore
from apt_core.data.tokenizers.chat import TEMPLATE_FILE
from apt_core.data.tokenizers.corpus import take_trained, train_tokenizer
from apt_core.errors import CheckpointError, ConfigError, Problem, ProviderError
from apt_core.kernel import Kernel
from apt_core.log import get_logger
from apt_core.providers.dataset import DatasetProvider, SourceSection
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.registry import Registry
from apt_core.schedules import Horizon

log = get_logger("apt.data")

IN_MEMORY = 128 * 2**20
"""The most bytes of small stores that each process of a run holds in memory. Of several stores each
has a share of it."""

Progress = Callable[[str, DatasetProvider], ProgressCallback]
"""Asked once for each source, by its name: what is told how far its store is."""


@dataclass(frozen=True)
class SourceData:
    """A source of the run: one line about it, its store, and the windows to train on and, where
    there are any, to evaluate on. The name is empty but in a mixture."""

    name: str
    described: str
    store: TokenStore
    train: Windows
    val: Windows | None

    early: bool = False
    """Whether the run began, or might have begun, with the first shards of the store."""

    @property
    def held_out(self) -> StoredPart:
        """What is evaluated on."""
        return self.store.held_out if self.early else self.store.part("val")

    @property
    def sha256(self) -> str:
        """The hash of what is known from the start on, by which the data is recognised."""
        return self.store.begun_sha256 if self.early else self.store.sha256

    @property
    def tokens_sha256(self) -> dict[str, str]:
        """The hashes of the ids, by part; the same."""
        begun = self.store.manifest.begun if self.early else None
        if begun is None:
            return self.store.tokens_sha256
        return {"train": begun.train_sha256, "val": begun.tokens_sha256}

    @property
    def description(self) -> str:
        """One line: the source and its sizes."""
        so_far = " so far" if self.early and not self.store.manifest.counts else ""
        return (
            f"{f'{self.name}: ' if self.name else ''}{self.described}: "
            f"{self.store.part('train').num_tokens:,} tokens to train on{so_far}, "
            f"{self.held_out.num_tokens:,} held out, sha256 {self.sha256[:12]}"
        )

    def row(self) -> dict[str, Any]:
        """What the manifest and checkpoints record of it."""
        store = self.store
        return {
            **({"name": self.name} if self.name else {}),
            "description": self.described,
            "sha256": self.sha256,
            "tokens_sha256": self.tokens_sha256,
            "counts": {what: count for what, count in store.manifest.counts.items() if count},
            "train_tokens": store.part("train").num_tokens,
            "val_tokens": self.held_out.num_tokens,
            "windows": len(self.train),
        }


@dataclass(frozen=True)
class RunData:
    """The data of a run: its tokenizer and its sources, of which there is one but in a mixture."""

    tokenizer: TokenizerProvider
    sources: list[SourceData]
    growing: GrowingData | None = None

    def close(self) -> None:
        """Close the stores, which another call opens again, and end what builds the data in the
        background."""
        for source in self.sources:
            source.store.close()
        if self.growing is not None:
            self.growing.close()

    @property
    def description(self) -> str:
        """One line about each source."""
        return "; ".join(source.description for source in self.sources)

    @property
    def num_windows(self) -> int:
        """The windows of an epoch."""
        return sum(len(source.train) for source in self.sources)

    @cached_property
    def sha256(self) -> str:
        """The hash of the documents; figures measured on different ones are not comparable."""
        return _joined([source.sha256 for source in self.sources])

    @cached_property
    def tokens_sha256(self) -> dict[str, str]:
        """The hashes of the ids, by part."""
        return {
            part: _joined([source.tokens_sha256[part] for source in self.sources]) for part in PARTS
        }

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text by token that is to be learned."""
        parts = [source.held_out for source in self.sources if source.val is not None]
        num_bytes = sum(part.num_bytes for part in parts)
        return num_bytes / max(1, sum(part.num_learned for part in parts))

    def evaluation(self, batch_size: int) -> EvaluationPlan:
        """The batches of the held-out windows of all sources."""
        held_out = {source.name: source.val for source in self.sources if source.val is not None}
        return EvaluationPlan([*held_out.values()], batch_size=batch_size, names=[*held_out])

    def row(self) -> dict[str, Any]:
        """What the manifest and checkpoints record of the data."""
        if len(self.sources) == 1:
            return self.sources[0].row()
        return {
            "description": self.description,
            "sha256": self.sha256,
            "tokens_sha256": self.tokens_sha256,
            "windows": self.num_windows,
            "sources": [source.row() for source in self.sources],
        }


def load_tokenizer(kernel: Kernel, folder: Path | None = None) -> TokenizerProvider:
    """The profile's tokenizer, as it was kept in ``folder`` where there is one.

    Raises ConfigError if ``model.vocab_size`` is less than its ids, CheckpointError for what is
    damaged or missing in the folder.
    """
    name, tokenizer = kernel.config.data.tokenizer_name, _tokenizer(kernel, folder)
    if folder is not None and folder.is_dir():
        try:
            tokenizer.load(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
    elif tokenizer.trainable:
        raise CheckpointError(
            f"{folder}: the tokenizer {name!r}, which was trained, is not there "
            "(a copied checkpoint needs its run's folder tokenizer there, too)"
        )
    require_vocabulary(kernel, tokenizer)
    return tokenizer


def _tokenizer(kernel: Kernel, folder: Path | None = None) -> TokenizerProvider:
    """The profile's tokenizer, before it is trained; one that is makes as many ids as the model
    has, unless the profile says how many. The files of one that is made of some are read in
    ``folder``, where the run has kept them: where they were they may have changed, or be no longer.
    So is a chat template that is no longer there."""
    data, registry = kernel.config.data, kernel.registry
    own = registry.spec("tokenizer", data.tokenizer_name).section == "data.tokenizer"
    settings, kept = None, dict[str, str]()
    if own and folder is not None and folder.is_dir():
        template = data.tokenizer.chat_template
        if data.tokenizer.path:
            kept["path"] = str(folder)
        if template and not Path(template).exists() and (folder / TEMPLATE_FILE).is_file():
            kept["chat_template"] = str(folder / TEMPLATE_FILE)
        settings = data.tokenizer.model_copy(update=kept) if kept else None
    tokenizer: TokenizerProvider = registry.get("tokenizer", data.tokenizer_name, settings)
    if tokenizer.trainable and own and data.tokenizer.vocab_size is None:
        kept_or_named = settings or data.tokenizer
        settings = kept_or_named.model_copy(update={"vocab_size": kernel.config.model.vocab_size})
        tokenizer = registry.get("tokenizer", data.tokenizer_name, settings)
    return tokenizer


def require_vocabulary(kernel: Kernel, tokenizer: TokenizerProvider) -> None:
    """Raise ConfigError if ``model.vocab_size``, or what it grows to, is less than the ids of
    ``tokenizer``."""
    size, name = kernel.largest("model.vocab_size"), kernel.config.data.tokenizer_name
    if tokenizer.vocab_size > size:
        raise ConfigError(
            Problem(
                f"is {size}, but tokenizer {name!r} has {tokenizer.vocab_size} ids",
                key="model.vocab_size",
                hint=f"set it to {tokenizer.vocab_size} or more",
            )
        )


def load_data(
    kernel: Kernel,
    *,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
    check_stop: StopCheck = never_stop,
    begin_early: bool = False,
    kept_tokenizer: Path | None = None,
) -> RunData:
    """The data of the run, of which what is not in the cache is built by ``engine`` with
    ``workers`` processes. What ``check_stop`` raises ends the build, or the wait for another
    process that builds. With ``begin_early``, for a profile that asks for it, the data may be
    ``growing``: it is built by the kernel's ``builder`` or by another process, which this one then
    does not wait for. ``kept_tokenizer`` is where the run has kept the files of its tokenizer.

    Raises ConfigError for what cannot be read or is too little, ProviderError for a source or a
    tokenizer that fails, StoreError where a store cannot be written.
    """
    config = kernel.config
    named = [(name, source_of(kernel, section)) for name, section in named_sources(kernel)]
    tokenizer = _tokenizer(kernel, kept_tokenizer)
    if tokenizer.trainable:
        train_tokenizer(tokenizer, [source for _, source in named], config.data, check_stop)
    require_vocabulary(kernel, tokenizer)
    if begin_early:
        return _early_data(kernel, named[0][1], tokenizer, check_stop)
    found = []
    for name, source in named:
        store = build_store(
            source,
            tokenizer,
            config.data,
            engine=engine,
            workers=workers,
            progress=None if progress is None else progress(name, source),
            check_stop=check_stop,
        )
        store.hold_in_memory(IN_MEMORY // len(named))
        found.append(_source_data(name, _described(source), store, config, tokenizer))
    if all(source.val is None for source in found):
        raise ConfigError([_too_little(found[0], "val", config)])
    data = RunData(tokenizer, found)
    if config.data.pads and config.data.truncation:
        kernel.notices += [notice for source in found for notice in _cut(source, config)]
    return data


def are_built(kernel: Kernel, sources: Sequence[DatasetProvider], *, most_read: int) -> bool:
    """Whether the stores of ``sources``, some of the run's, are in the cache, so that
    :func:`load_data` does not build them. False too where more than ``most_read`` bytes would have
    to be read to tell. Raises ConfigError, ProviderError."""
    config, tokenizer = kernel.config, _tokenizer(kernel)
    needed = [source_of(kernel, section) for _, section in named_sources(kernel)]
    if not tokenizer.trainable:
        needed = [*sources]
    for source in needed:
        with naming("dataset", source, "bytes_to_hash()"):
            most_read -= source.bytes_to_hash()
    if most_read < 0:
        return False
    if tokenizer.trainable and not take_trained(tokenizer, needed, config.data):
        return False
    return all(built_store(source, tokenizer, config.data) is not None for source in sources)


def _cut(data: SourceData, config: Config) -> Iterator[str]:
    """What ``data.truncation`` leaves out."""
    for part, windows, what in (
        (data.store.part("train"), data.train, "to train on"),
        (data.store.part("val"), data.val, "to evaluate on"),
    ):
        if windows is None:
            continue
        # Of a document all tokens but the first are predicted.
        lost = part.num_tokens - part.num_documents - windows.num_tokens
        if lost <= 0:
            continue
        told = f"{f'{data.name}: ' if data.name else ''}data.truncation leaves out {lost:,} of "
        told += f"{part.num_tokens:,} tokens {what}"
        if documents := part.num_documents - len(windows):
            told += (
                f", with them {documents:,} of {part.num_documents:,} documents, of whose first "
                f"{config.seq_len:,} tokens nothing is learned"
            )
        yield told


def _early_data(
    kernel: Kernel, source: DatasetProvider, tokenizer: TokenizerProvider, check_stop: StopCheck
) -> RunData:
    """What is there of the data as soon as a shard is; all of it where no other process builds."""
    config, first = kernel.config, kernel.place.get("LOCAL_RANK", "0") == "0"
    store, growing, found = growing_store(source, tokenizer, config.data), None, None
    if store is not None:
        command, patient = kernel.builder if first else (), bool(kernel.builder) and not first
        growing = GrowingData(config.seq_len, store, command, patient)
        try:
            found = growing.wait(check_stop)
        except BaseException:
            growing.close()
            raise
    if growing is None or found is None:
        log.info("all data is built before the run begins: no other process builds it")
        whole = build_store(source, tokenizer, config.data, check_stop=check_stop)
        found = Found.of(whole, config.seq_len, whole=True)
        growing = GrowingData(config.seq_len, found=found)
    return RunData(tokenizer, [early_source(_described(source), found, config)], growing)


def early_source(described: str, found: Found, config: Config) -> SourceData:
    """The source of a run that began early, as far as it is there."""
    store = found.store
    store.hold_in_memory(IN_MEMORY)
    train = ConcatWindows(store.part("train"), config.seq_len)
    val = ConcatWindows(store.held_out, config.seq_len)
    return SourceData("", described, store, train, val, early=True)


def _described(source: DatasetProvider) -> str:
    # Not as the store has it: another profile may have built it from the same content.
    with naming("dataset", source, "describe()"):
        return str(source.describe())


def _source_data(
    name: str, described: str, store: TokenStore, config: Config, tokenizer: TokenizerProvider
) -> SourceData:
    folder, pad = store.folder / "packing", tokenizer.special.pad
    train = windows_of(store.part("train"), config, pad, folder / "train")
    val = windows_of(store.part("val"), config, pad, folder / "val")
    some = len(val) and store.part("val").num_learned
    found = SourceData(name, described, store, train, val if some else None)
    if not len(train):
        raise ConfigError([_too_little(found, "train", config)])
    return found


class Profiled(Protocol):
    """A profile with the providers that it names: a kernel, or a session."""

    @property
    def config(self) -> Config: ...

    @property
    def registry(self) -> Registry: ...


def stores_sha256(stores: Sequence[TokenStore], *, early: bool) -> str:
    """The hash of the documents of all ``stores``, as a run that begins ``early`` knows them, or
    another."""
    return _joined([store.begun_sha256 if early else store.sha256 for store in stores])


def named_sources(profiled: Profiled) -> list[tuple[str, SourceSection]]:
    """The sources of the profile by name, which is empty but in a mixture."""
    data = profiled.config.data
    if data.mixture is None:
        return [("", data)]
    return [(item.name, item) for item in data.mixture]


def source_of(profiled: Profiled, section: SourceSection) -> DatasetProvider:
    """The provider that reads what ``section`` names. Raises ConfigError, ProviderError."""
    registry, name = profiled.registry, section.dataset_name
    settings: Any = None
    if section is not profiled.config.data:
        own = registry.spec("dataset", name).section
        settings = section if own in ("", "data") else getattr(section, "settings", None)
    provider = registry.get("dataset", name, settings)
    if not isinstance(provider, DatasetProvider):
        plugin = registry.spec("dataset", name).plugin
        raise ProviderError(
            f"dataset:{name} (plugin {plugin}) is a {type(provider).__name__}, not a "
            "DatasetProvider"
        )
    provider.data_section = section
    sections = profiled.config.data.sections()
    provider.data_key = next(key for key, each in sections if each is section)
    return provider


def batch_plan(kernel: Kernel, data: RunData, rank: int = 0, world_size: int = 1) -> BatchPlan:
    """The division of ``data`` into the micro-batches of the run. Raises ConfigError if it does not
    fill the windows of one step."""
    training, config = kernel.config.training, kernel.config
    needed = training.batch_size * training.grad_accum_steps * world_size
    if data.num_windows < needed and data.growing is None:
        tokens = sum(source.store.part("train").num_tokens for source in data.sources)
        raise ConfigError(
            Problem(
                f"the training text has {tokens:,} tokens, which is {data.num_windows:,} windows "
                f"of {config.seq_len}; one optimizer step takes {needed}",
                key="data.train_path" if config.data.mixture is None else "data.mixture",
                hint="give more text, or lower training.batch_size, training.grad_accum_steps or "
                "data.max_length",
            )
        )
    steps = step_plan(config, data.num_windows, needed)
    segments: list[Segment] = []
    if config.data.mixture is not None:
        schedule = kernel.schedule.with_horizon(Horizon.of(config, steps))
        segments = mixture_segments(schedule, config.data.mixture)
    order: Order
    if data.growing is not None:
        order = GrowingOrder(steps, seed=training.seed)
    else:
        order = Order(
            [source.name for source in data.sources],
            [len(source.train) for source in data.sources],
            steps,
            seed=training.seed,
            segments=segments,
        )
    return BatchPlan(
        order,
        [source.train for source in data.sources],
        batch_size=training.batch_size,
        rank=rank,
        world_size=world_size,
        longest=config.data.padding in (True, "longest"),
        num_workers=config.data.num_workers,
    )


def step_plan(config: Config, num_windows: int, windows_per_step: int) -> StepPlan:
    """The steps of the run with ``num_windows`` in an epoch. One that begins early counts as one
    epoch of ``training.max_steps``, since nothing tells how many windows there will be."""
    if config.data.begin_early:
        num_windows = (config.training.max_steps or 0) * windows_per_step
    return StepPlan(num_windows, seq_len=config.seq_len, windows_per_step=windows_per_step)


def _too_little(data: SourceData, part: PartName, config: Config) -> Problem:
    tokens = data.store.part(part).num_tokens
    at, section = next(
        (at, section)
        for at, section in config.data.sections()
        if getattr(section, "name", "") == data.name
    )
    if part == "train":
        message = f"the training text has {tokens} tokens: nothing can be learned from it"
        return Problem(message, key=f"{at}.train_path", hint="give a longer text")
    message = f"the text to evaluate on has {tokens} tokens: nothing can be predicted in it"
    if section.val_path is not None:
        hint = "give a longer text, or leave val_path out to hold out a share"
        return Problem(message, key=f"{at}.val_path", hint=hint)
    hint = "give a longer text, hold out more of it, or name another in val_path"
    return Problem(message, key="data.val_fraction", hint=hint)


def _joined(hashes: Sequence[str]) -> str:
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
