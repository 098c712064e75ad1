"""Finds inactive keys, which are valid but not read, and reports them with the reason.

There are three sources. :func:`inactive_by_rule` is about keys that always do nothing, or nothing
without a plugin; :func:`inactive_core_settings` about those that other keys of the core make
useless; providers and plugins tell of theirs (``ProviderSpec.reads``, ``SectionSpec.inactive``). Of
the last two kinds only what somebody has written counts, see :func:`written_inactive`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from apt_core.config.schema import Config
from apt_core.config.source import InactiveKey, Source
from apt_core.config.yaml_text import KeyPath, dotted
from apt_core.errors import Problem, did_you_mean
from apt_core.types import Inactive

METRICS = ("perplexity", "accuracy", "loss", "bits_per_byte", "reasoning_quality")
"""The metrics that the core computes."""


@dataclass(frozen=True)
class Rule:
    """``key`` does nothing where its value ``asks`` for something, unless ``plugin`` is active or
    a plugin owns the section that it is in."""

    key: str
    asks: Callable[[Any], bool]
    reason: str
    plugin: str = ""


def _given(value: Any) -> bool:
    return value is not None


def _wanted(value: Any) -> bool:
    return value not in (None, False)


_UNNAMED = "no active plugin is named"

RULES = (
    Rule("training.amp_level", _given, "torch's autocast has no levels: see mixed_precision"),
    Rule("monitoring.wandb.enabled", _wanted, f"{_UNNAMED} wandb", "wandb"),
    Rule("monitoring.tensorboard.enabled", _wanted, f"{_UNNAMED} tensorboard", "tensorboard"),
)


def inactive_by_rule(
    config: Config, active: Collection[str], owned: Collection[str]
) -> Iterator[InactiveKey]:
    """Yield the keys that :data:`RULES` make inactive. ``active`` are the names of the active
    plugins, ``owned`` the paths of the sections that plugins own."""
    for rule in RULES:
        taken = any(rule.key == path or rule.key.startswith(f"{path}.") for path in owned)
        if not taken and rule.plugin not in active and rule.asks(_value(config, rule.key)):
            yield InactiveKey(rule.key, rule.reason)
    if config.hardware.num_gpus > 1 and not config.hardware.distributed:
        yield InactiveKey("hardware.num_gpus", "hardware.distributed is not set")
    for metric in dict.fromkeys(config.evaluation.metrics):
        if metric not in METRICS:
            hint = did_you_mean(metric, METRICS) or f"there are {', '.join(METRICS)}"
            yield InactiveKey("evaluation.metrics", f"there is no metric {metric!r} ({hint})")


def refusal(item: InactiveKey, where: str = "") -> Problem:
    """The problem of an inactive key under ``--strict``; ``where`` is its place in the profile."""
    message = f"it does nothing here: {item.reason}"
    return Problem(message, item.key, where, "--strict allows no inactive key")


def inactive_core_settings(
    config: Config, active: Collection[str], owned: Collection[str]
) -> Iterator[Inactive]:
    """Settings of the core that others make inactive; providers declare those of their own."""
    model, training = config.model, config.training
    for tracker in ("wandb", "tensorboard"):
        section = f"monitoring.{tracker}"
        if tracker not in active and section not in owned:
            yield Inactive(section, f"{_UNNAMED} {tracker}", ("plugins", f"{section}.enabled"))
    if model.attention_pattern is not None:
        pattern = "model.attention_pattern"
        yield Inactive("model.attention_name", f"{pattern} names every layer's", (pattern,))
    yield from model.tva.inactive(model.d_model // model.num_heads)
    yield from model.mha.inactive()
    yield from model.vft.inactive()
    yield from model.rope.inactive()
    yield from _inactive_data_settings(config)
    if training.early_stopping_patience is None:
        patience = "training.early_stopping_patience"
        yield Inactive("training.early_stopping_min_delta", f"{patience} is not set", (patience,))
    if training.compile is False:
        key = "training.compile"
        yield Inactive(f"{key}_mode", f"{key} is false", (key,))
    if config.hardware.device == "cpu":
        if training.compile == "auto":
            reason = "training.compile is auto, which compiles nothing on a CPU"
            keys = ("training.compile", "hardware.device")
            yield Inactive("training.compile_mode", reason, keys)
        yield Inactive(
            "hardware.tf32", "it is of a GPU: hardware.device is cpu", ("hardware.device",)
        )
    if config.evaluation.sample_tokens == 0:
        tokens = "evaluation.sample_tokens"
        for key in ("evaluation.sample_prompt", "evaluation.sample_temperature"):
            yield Inactive(key, f"{tokens} is 0: no sample is shown", (tokens,))
    evaluation = config.evaluation
    if not evaluation.tasks and "reasoning_quality" not in evaluation.metrics:
        keys = ("evaluation.tasks", "evaluation.metrics")
        yield Inactive("evaluation.task_items", "evaluation.tasks names none", keys)
    if config.debug.log_level != "DEBUG":
        level = "debug.log_level"
        reason = f"what it says more is of the level DEBUG, and {level} is {config.debug.log_level}"
        yield Inactive("debug.verbose", reason, (level,))


def _inactive_data_settings(config: Config) -> Iterator[Inactive]:
    data = config.data
    if not data.pads:
        reason = f"data.packing is {data.packing}: no sequence is filled up"
        if data.packing is None:
            reason = "documents fill whole sequences, unless data.packing or data.padding say pad"
        for key in ("data.truncation", *(("data.padding",) if data.packing else ())):
            yield Inactive(key, reason, ("data.packing", "data.padding"))
    if data.deduplicate != "near":
        key = "data.deduplicate"
        yield Inactive("data.near_threshold", f"{key} is {data.deduplicate}", (key,))
    if not any(section.has_records for _, section in data.sections()):
        names = ("train_path", "val_path", "loader", "source", "mixture")
        because = tuple(f"data.{name}" for name in names)
        yield Inactive("data.columns", "plain text has no columns", because)
    if data.begin_early:
        key = "data.begin_early"
        for name in ("max_epochs", "save_freq"):
            reason = f"{key} is set: the run is one epoch of training.max_steps"
            yield Inactive(f"training.{name}", reason, (key,))
    if data.val_path is not None:
        key = "data.val_path"
        for name in ("val_fraction", "max_val_chars"):
            yield Inactive(f"data.{name}", f"{key} is what is held out", (key,))


def written_inactive(
    config: Config,
    source: Source,
    inactive_settings: Iterable[Inactive],
    chosen: Collection[str] = (),
) -> Iterator[InactiveKey]:
    """Those ``inactive_settings`` that somebody has written to have an effect.

    That is a value other than the default, or any value on the command line. It waits for another
    choice, and is not reported, where what decides has been written later: further down a chain of
    profiles that extend each other, or on the command line. It waits for an ``enabled: false``
    beside it too. ``chosen`` are keys that the command line decides by other options.
    """
    seen: set[KeyPath] = set()
    for item in inactive_settings:
        decided = max((_decided(source, key, chosen) for key in item.because), default=-1)
        for path in source.leaves(item.key):
            written = source.layer(path)
            asks = written == source.last_layer or not _is_default(config, path)
            if path not in seen and written >= decided and asks:
                seen.add(path)
                yield InactiveKey(dotted(path), item.reason)


def _decided(source: Source, key: str, chosen: Collection[str]) -> float:
    if key in chosen:
        return source.last_layer
    layer = source.layer(key)
    return layer + 0.5 if key.endswith(".enabled") and layer >= 0 else layer


def _is_default(config: Config, path: KeyPath) -> bool:
    section = config.section(dotted(path[:-1])) if len(path) > 1 else config
    name = str(path[-1])
    if not isinstance(section, BaseModel) or name not in type(section).model_fields:
        return False
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(section, name) == default)


def _value(config: Config, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value
