"""Keys that are valid and do nothing in this version: reported with the reason, never silent.

A rule goes when its key starts to work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from apt_core.config.schema import Config
from apt_core.config.source import InactiveKey
from apt_core.errors import did_you_mean

METRICS = ("perplexity", "accuracy", "loss", "bits_per_byte")
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


def _enabled(section: Any) -> bool:
    return section is not None and bool(section.enabled)


_ONE_PROCESS = "the run has one process: start it with --nproc N, or with torchrun"
_FULL_WINDOWS = "text is packed into full windows, so nothing is cut or filled"
_UNOWNED = "no active plugin owns this section"

RULES = (
    Rule("model.moe", _enabled, f"{_UNOWNED}: the dense feed-forward stays"),
    Rule("model.bistate", _given, _UNOWNED),
    Rule("model.voting", _given, _UNOWNED),
    Rule("training.amp_level", _given, "torch's autocast has no levels: see mixed_precision"),
    Rule("data.truncation", _wanted, _FULL_WINDOWS),
    Rule("data.padding", lambda value: value not in (None, False, "do_not_pad"), _FULL_WINDOWS),
    Rule("monitoring.wandb.enabled", _wanted, "no active plugin is named wandb", "wandb"),
    Rule(
        "monitoring.tensorboard.enabled",
        _wanted,
        "no active plugin is named tensorboard",
        "tensorboard",
    ),
)

ALONE = (
    Rule("hardware.distributed", _wanted, _ONE_PROCESS),
    Rule("hardware.backend", _given, _ONE_PROCESS),
)


def inactive_keys(
    config: Config, active: Collection[str], owned: Collection[str]
) -> Iterator[InactiveKey]:
    """What the profile asks for in vain. ``active`` are the names of the active plugins,
    ``owned`` the paths of the sections that plugins own."""
    for rule in RULES:
        taken = any(rule.key == path or rule.key.startswith(f"{path}.") for path in owned)
        if not taken and rule.plugin not in active and rule.asks(_value(config, rule.key)):
            yield InactiveKey(rule.key, rule.reason, rule.reason.startswith(_UNOWNED))
    if config.hardware.num_gpus > 1 and not config.hardware.distributed:
        yield InactiveKey("hardware.num_gpus", "hardware.distributed is not set")
    for metric in dict.fromkeys(config.evaluation.metrics):
        if metric not in METRICS:
            hint = did_you_mean(metric, METRICS) or f"there are {', '.join(METRICS)}"
            yield InactiveKey("evaluation.metrics", f"there is no metric {metric!r} ({hint})")


def inactive_alone(config: Config) -> list[InactiveKey]:
    """What does nothing because the run has one process, which the profile cannot know."""
    return [InactiveKey(r.key, r.reason) for r in ALONE if r.asks(_value(config, r.key))]


def _value(config: Config, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value
