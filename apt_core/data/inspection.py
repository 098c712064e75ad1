"""Looks at the data of a run: the windows that are asked for, and the figures of its sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from apt_core.data.describe import fertility, mixture_figures, part_figures, view_window
from apt_core.data.loading import RunData, SourceData, batch_plan, named_sources, source_of
from apt_core.data.origins import find_origins
from apt_core.data.packing.choice import packing_of
from apt_core.data.packing.rows import Windows
from apt_core.data.pipeline.prepare import PipelineSettings
from apt_core.data.store.build import PRIVATE
from apt_core.data.store.format import PARTS, PartName
from apt_core.data.store.parts import TokenPart
from apt_core.errors import ConfigError, did_you_mean
from apt_core.kernel import Kernel
from apt_core.schedules import Horizon


@dataclass(frozen=True)
class Chosen:
    """Windows to look at: ``count`` of ``part``, those of an optimizer ``step`` of a run in
    ``processes``, or those from ``window`` on; of one ``source`` of a mixture, or of all."""

    part: PartName = "train"
    step: int | None = None
    window: int | None = None
    source: str = ""
    count: int = 1
    processes: int = 1


def view_windows(
    kernel: Kernel, data: RunData, chosen: Chosen, *, max_chars: int
) -> list[dict[str, Any]]:
    """The windows as :func:`view_window` shows them, each with its part, ``windows`` (of how many
    it is one), source (of a mixture) and step, and with where its documents are from, as far as
    :func:`find_origins` finds it in ``max_chars`` characters of the source.

    Raises ConfigError for what there is not.
    """
    views = []
    for step, source, index in _chosen(kernel, data, chosen):
        windows = _windows(source, chosen.part)
        view = view_window(windows, source.store.part(chosen.part), data.tokenizer, index)
        head = {"part": chosen.part, "source": source.name or None, "step": step}
        views.append({**head, "windows": len(windows), **view})
    for source in data.sources:
        _add_origins(
            kernel, data, source, [v for v in views if v["source"] == (source.name or None)],
            max_chars,
        )  # fmt: skip
    return views


def _chosen(
    kernel: Kernel, data: RunData, chosen: Chosen
) -> Iterator[tuple[int | None, SourceData, int]]:
    """The step, source and number of each window that was asked for."""
    names = [source.name for source in data.sources]
    if chosen.source and chosen.source not in names:
        hint = did_you_mean(chosen.source, names) or (
            f"there are {', '.join(names)}" if names != [""] else "the profile has no data.mixture"
        )
        raise ConfigError(f"there is no source {chosen.source!r}", hint=hint)
    early = kernel.config.data.begin_early
    if chosen.part == "train" and chosen.window is None and (chosen.step or not early):
        step = chosen.step or 1
        if early:
            raise ConfigError(
                "which windows a step sees depends on when the run looked for them",
                key="data.begin_early",
                hint="--window shows those of the store; events.jsonl of the run has its looks",
            )
        plan = batch_plan(kernel, data, 0, chosen.processes)
        last = Horizon.of(kernel.config, plan.steps).last("step")
        if last is not None and step > last:
            raise ConfigError(f"there is no step {step:,}", hint=f"the run has {last:,}")
        epoch, index = divmod(step - 1, plan.steps_per_epoch)
        drawn = plan.drawn(epoch + 1, index)
        found = [
            (step, data.sources[number], window)
            for number, window in zip(drawn.sources.tolist(), drawn.windows.tolist(), strict=True)
            if chosen.source in ("", names[number])
        ]
        yield from found[: chosen.count]
        return
    known = [s for s in data.sources if chosen.source in ("", s.name)]
    source = next((s for s in known if _number(s, chosen.part)), known[0])
    number, first = _number(source, chosen.part), chosen.window or 0
    if first >= number:
        raise ConfigError(
            f"there is no window {first:,} of {chosen.part}",
            hint=f"they are numbered 0 to {number - 1:,}" if number else "it has none",
        )
    for index in range(first, min(number, first + chosen.count)):
        yield None, source, index


def _windows(source: SourceData, part: str) -> Windows:
    windows = source.train if part == "train" else source.val
    assert windows is not None
    return windows


def _number(source: SourceData, part: str) -> int:
    windows = source.train if part == "train" else source.val
    return 0 if windows is None else len(windows)


def _add_origins(
    kernel: Kernel,
    data: RunData,
    source: SourceData,
    views: Sequence[dict[str, Any]],
    max_chars: int,
) -> None:
    documents = [document for view in views for document in view["documents"]]
    if not documents or not max_chars:
        return
    part = views[0]["part"]
    sections = dict(named_sources(kernel))
    found = find_origins(
        [document["document"] for document in documents],
        source.store.part(part),
        source_of(kernel, sections[source.name]),
        data.tokenizer,
        PipelineSettings.of(kernel.config.data),
        held_out=part == "val",
        max_chars=max_chars,
    )
    for document in documents:
        document["where"] = found.get(document["document"])


def store_rows(data: RunData) -> list[dict[str, Any]]:
    """The store of each source: the name (of a mixture), description, folder, whether it is
    ``kept`` there for other runs, counts of the pipeline, and the documents, tokens and bytes of
    its parts."""
    return [
        {
            **_store_row(source),
            "kept": not source.store.manifest.key.startswith(PRIVATE),
            **{name: _sizes(source.store.part(name)) for name in PARTS},
        }
        for source in data.sources
    ]


def _store_row(source: SourceData) -> dict[str, Any]:
    return {
        "name": source.name or None,
        "description": source.described,
        "folder": str(source.store.folder),
        "counts": dict(source.store.manifest.counts),
    }


def _sizes(part: TokenPart) -> dict[str, Any]:
    return {name: getattr(part, f"num_{name}") for name in ("documents", "tokens", "bytes")}


def data_figures(
    kernel: Kernel, data: RunData, processes: int, steps: Sequence[int]
) -> dict[str, Any]:
    """The figures of the data with the keys tokenizer, vocab_size, seq_len, windows_per_step,
    steps_per_epoch, steps (of the run, null if it has no end), epochs, sources and mixture.

    A source has its name (of a mixture), description, ``folder``, packing, the ``counts`` of the
    pipeline, the share of tokens that is ``held_out``, ``fertility`` and the figures of its parts,
    ``train`` and ``val``, as :mod:`apt_core.data.describe` says. ``mixture`` has the weights at
    ``steps`` and the epochs of each source. Raises ConfigError for less than one step.
    """
    config = kernel.config
    plan = batch_plan(kernel, data, 0, processes)
    last = Horizon.of(config, plan.steps).last("step")
    per_epoch = -(-data.num_windows // plan.windows_per_step)
    mixture = None
    if len(data.sources) > 1:
        mixture = mixture_figures(plan.order, last, steps)
    return {
        "tokenizer": config.data.tokenizer_name,
        "vocab_size": data.tokenizer.vocab_size,
        "seq_len": config.seq_len,
        "windows_per_step": plan.windows_per_step,
        "steps_per_epoch": per_epoch,
        "steps": last,
        "epochs": None if last is None else last / per_epoch,
        "sources": [_source_figures(kernel, data, source) for source in data.sources],
        "mixture": mixture,
    }


def _source_figures(kernel: Kernel, data: RunData, source: SourceData) -> dict[str, Any]:
    store = source.store
    train, val = store.part("train"), store.part("val")
    return {
        **_store_row(source),
        "packing": packing_of(kernel.config, marked=train.marked),
        "held_out": val.num_tokens / max(1, train.num_tokens + val.num_tokens),
        "fertility": fertility(train, data.tokenizer),
        "train": part_figures(train, source.train),
        "val": part_figures(val, source.val),
    }
