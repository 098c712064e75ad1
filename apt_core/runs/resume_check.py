"""Checks whether a profile may continue from a checkpoint: which keys may differ, and which may
not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from apt_core.config import Config, Source, validate
from apt_core.config.differences import differences
from apt_core.config.source import plugin_items
from apt_core.config.yaml_text import parse_yaml
from apt_core.errors import CheckpointError, ConfigError, Problem
from apt_core.kernel import Kernel
from apt_core.secrets import is_secret, without_secrets
from apt_core.types import Inactive, SectionSpec

FREE_SECTIONS = ("name", "version", "description", "plugins", "evaluation", "monitoring", "debug")
"""Sections that may differ, with a notice. (Plugins may come and go: a loss term too.)"""

FREE_KEYS = (
    # Its outcome is compared separately.
    "training.mixed_precision",
    # Their product with the number of processes must not differ, which is checked separately.
    "training.batch_size",
    "training.grad_accum_steps",
    "training.compile",
    "training.compile_mode",
    "training.max_seconds",
    "training.early_stopping_patience",
    "training.early_stopping_min_delta",
    "training.save_freq",
    "data.num_workers",
    "data.build_workers",
    "training.save_every_steps",
    "training.keep_last",
    "training.checkpoint_dir",
    "training.log_every_steps",
    "training.max_nonfinite_steps",
    "training.hook_timeout",
    "training.background_queue",
    "training.background_timeout",
    # With auto the machine decides.
    "hardware.device",
    "hardware.num_gpus",
    "hardware.distributed",
    "hardware.backend",
    "hardware.num_threads",
)
HORIZON_KEYS = ("training.max_epochs", "training.max_steps", "training.max_tokens")
"""Keys of the run's length, on which the learning rate and annealed parameters depend."""

TEXT_KEYS = (
    "data.source",
    "data.train_path",
    "data.val_path",
    "data.loader",
    "data.columns",
    "data.errors",
    "data.normalize",
    "data.min_chars",
    "data.max_chars",
    "data.deduplicate",
    "data.near_threshold",
    "data.val_fraction",
    "data.max_val_chars",
    "data.tokenizer",
)
"""Keys that say where text is from and how it becomes tokens: the tokens are compared instead."""


def _tva_rank(config: Config) -> int:
    return config.model.tva.rank_in(config.model.d_model // config.model.num_heads)


def _tva_is_normalised(config: Config) -> bool:
    return config.model.tva.normalises(_tva_rank(config))


def _vft_rank(config: Config) -> int:
    return config.model.vft.rank_in(config.model.d_model)


def _nothing(config: Config) -> None:
    return None


RATE_KEYS = ("training.learning_rate", "training.muon.learning_rate", "training.gradient_clip")
"""Rates that a resume may change from its step on with --allow-change."""

EFFECTS: Mapping[str, Callable[[Config], Any]] = {
    "data.max_length": lambda config: config.seq_len,
    # What its items read is compared as tokens.
    "data.mixture": lambda config: [(i.name, i.weight) for i in config.data.mixture or ()],
    "model.num_kv_heads": lambda config: config.model.num_kv_heads or config.model.num_heads,
    "model.mha.head_dim": lambda config: config.model.mha.width_of(
        config.model.d_model, config.model.num_heads
    ),
    "model.tva.r": _tva_rank,
    "model.tva.rank": _tva_rank,
    "model.tva.qk_norm": _tva_is_normalised,
    "model.vft.r": _vft_rank,
    "model.vft.rank": _vft_rank,
    "training.amp_level": _nothing,
}
"""Functions of keys whose outcome decides: keys may differ if it is the same."""


def saved_profile(text: str) -> dict[str, Any]:
    """The profile in a checkpoint. Raises CheckpointError if it is not a mapping."""
    try:
        profile = parse_yaml(text, "profile.yaml").data
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's profile cannot be read: {error}") from None
    if not isinstance(profile, dict):
        raise CheckpointError("the checkpoint's profile is not a mapping")
    return profile


def saved_config(
    profile: Mapping[str, Any],
    sections: Sequence[SectionSpec] = (),
    available: Sequence[SectionSpec] = (),
) -> Config | None:
    """A checkpoint's profile with the defaults of keys that it does not have; None for one of
    another version, or with sections of plugins that are not active.

    ``sections`` are those of the active plugins. Of ``available``, those of others that were not
    active then either had no effect, and are left out.
    """
    # It was accepted when the run began: what was refused since then is no reason to know it less.
    source = Source.from_dict(profile, recorded=True)
    listed = dict(plugin_items(source.data.get("plugins")))
    available = [section for section in available if section.plugin not in listed]
    checked = validate(source, sections, available=available)
    # Earlier versions wrote a null for each section of a plugin that was not active.
    empty = [path for path in checked.unknown if source.get(path) is None]
    for path in empty:
        del source.get(path[:-1])[path[-1]]
    return (validate(source, sections, available=available) if empty else checked).config


def check_resume(
    config: Config,
    profile: Mapping[str, Any],
    before: Config | None,
    *,
    inactive_settings: Iterable[Inactive],
    same_text: bool,
    another_past: Callable[[], str],
    allowed: Collection[str] = (),
    reporting: Collection[str] = (),
) -> list[str]:
    """Keys that differ from those of the checkpoint and may.

    ``profile`` is the checkpoint's, ``before`` is it as a Config, None where it is no valid one
    here. ``inactive_settings`` are the settings without effect in ``config``. ``same_text`` says
    whether both read the same text, and ``another_past`` is asked where the length of the run
    differs: what a run of the present one would have had otherwise up to the checkpoint, or "".
    ``allowed`` are those of RATE_KEYS that the run was told to change; ``reporting`` the sections
    of plugins that only observe. Raises ConfigError naming every key that must not differ.
    """
    changed, refused = [], []
    for key in allowed:
        if key not in RATE_KEYS:
            hint = f"these may: {', '.join(RATE_KEYS)}"
            refused.append(
                Problem("a resume may not change it", f"--allow-change {key}", hint=hint)
            )
    saved = without_secrets(profile) if before is None else before.to_dict()
    differing = [*differences(saved, config.to_dict())]
    length = another_past() if any(key in HORIZON_KEYS for key, _, _ in differing) else ""
    for key, old, new in differing:
        reason = "" if key.split(".")[0] in FREE_SECTIONS or key in FREE_KEYS else TRAINS
        if key in HORIZON_KEYS:
            reason = length
        elif is_secret(key.rpartition(".")[2], new if old is None else old):
            reason = ""  # it opens something, and trains nothing
        elif any(f"{key}.".startswith(f"{section}.") for section in reporting):
            reason = ""
        elif any(f"{key}.".startswith(f"{text}.") for text in TEXT_KEYS):
            reason = "" if same_text else "another text is read there"
        elif key in allowed or (
            reason and before is not None and _same_effect(key, before, config, inactive_settings)
        ):
            reason = ""
        if not reason:
            changed.append(key)
            continue
        hint = (
            f"put it back (was {old!r}), resume with the run's own profile.yaml, or start a new "
            "run: leave --resume out"
        )
        if key in RATE_KEYS:
            hint += f", or take it from here on: --allow-change {key}"
        message = f"is {new!r}, the checkpoint was made with {old!r}: {reason}"
        refused.append(Problem(message, key=key, hint=hint))
    if refused:
        raise ConfigError(refused)
    return changed


def check_providers(kernel: Kernel, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError where another implementation runs than when the checkpoint was made,
    which would be another model. ``manifest`` is the checkpoint's."""
    resolutions = kernel.registry.resolutions.values()
    here = {(row.kind, row.asked): row.used for row in resolutions}
    for row in manifest.get("providers", []):
        asked = row["kind"], row["asked"]
        used = here.get(asked)
        if used is not None and used != row["used"]:
            key = kernel.providers.get(asked)
            raise CheckpointError(
                f"{row['kind']}: the checkpoint was trained with {row['used']!r}, here "
                f"{used!r} would run" + (f"; name {row['used']!r} in {key}" if key else "")
            )


TRAINS = "it changes how the weights train"


def _same_effect(
    key: str, before: Config, now: Config, inactive_settings: Iterable[Inactive]
) -> bool:
    if key in EFFECTS and EFFECTS[key](before) == EFFECTS[key](now):
        return True
    values = [Source.from_dict(config.to_dict()) for config in (before, now)]
    return any(
        # If the deciding keys are unchanged, the setting was inactive before too.
        item.because and all(len({repr(v.get(k)) for v in values}) == 1 for k in item.because)
        for item in inactive_settings
        if f"{key}.".startswith(f"{item.key}.")
    )
