"""May this profile go on from that checkpoint? Which keys may differ, and which may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from apt_core.config import Config
from apt_core.errors import CheckpointError, ConfigError, Problem
from apt_core.types import SectionSpec

FREE_SECTIONS = ("name", "version", "description", "plugins", "evaluation", "monitoring", "debug")
"""Sections that may differ, with a notice. (Plugins may come and go: a loss term too.)"""

FREE_KEYS = (
    # What it comes to is compared apart.
    "training.mixed_precision",
    # Their product with the number of processes may not differ, which is checked apart.
    "training.batch_size",
    "training.grad_accum_steps",
    "training.compile",
    "training.max_seconds",
    "training.early_stopping_patience",
    "training.early_stopping_min_delta",
    "training.save_freq",
    "training.save_every_steps",
    "training.keep_last",
    "training.checkpoint_dir",
    "training.log_every_steps",
    "training.max_nonfinite_steps",
    "hardware.num_gpus",
    "hardware.distributed",
    "hardware.backend",
    "hardware.num_threads",
)
HORIZON_KEYS = ("training.max_epochs", "training.max_steps", "training.max_tokens")
"""The end of the run. The learning rate is a function of it, and so are annealed parameters."""


def saved_profile(text: str, sections: Sequence[SectionSpec] = ()) -> dict[str, Any]:
    """The profile in a checkpoint, with the defaults of keys that it does not have.

    ``sections`` are those of the active plugins. Raises CheckpointError if it is not a mapping.
    """
    try:
        profile = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"the checkpoint's profile cannot be read: {error}") from None
    if not isinstance(profile, dict):
        raise CheckpointError("the checkpoint's profile is not a mapping")
    try:
        return Config.from_dict(profile, sections=sections).to_dict()
    except ConfigError:
        # Of another version, or with sections of plugins that are not active: as it stands.
        return profile


def check_resume(
    config: Config, checkpoint_profile: Mapping[str, Any], *, constant_horizon: bool
) -> list[str]:
    """Keys that differ from the checkpoint's profile and may.

    ``constant_horizon`` says that the run's length changes nothing but its end. Raises ConfigError
    naming every key that must not differ.
    """
    changed, refused = [], []
    for key, before, after in differences(checkpoint_profile, config.to_dict()):
        section = key.split(".")[0]
        free = section in FREE_SECTIONS or key in FREE_KEYS
        if free or (key in HORIZON_KEYS and constant_horizon):
            changed.append(key)
        else:
            reason = (
                "the learning rate and annealed parameters depend on the length of the run"
                if key in HORIZON_KEYS
                else "it changes how the weights train"
            )
            refused.append(
                Problem(
                    f"is {after!r}, the checkpoint was made with {before!r}: {reason}",
                    key=key,
                    hint=f"put it back, or start a new run: leave --resume out (was {before!r})",
                )
            )
    if refused:
        raise ConfigError(refused)
    return changed


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        path = f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{path}.")
        elif old != new:
            yield path, old, new
