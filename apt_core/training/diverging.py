"""Finds weights, steps and losses that are not finite, and says how to go on before them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import isfinite
from typing import Any

from apt_core.code_source import short_path
from apt_core.config.schema import TrainingSection
from apt_core.errors import DivergedError, TrainingError
from apt_core.metric_names import CROSS_ENTROPY, LOSS
from apt_core.runs.checkpoint import newest_sound, step_of
from apt_core.runs.folder import RunFolder


def void_steps(
    training: TrainingSection, folder: RunFolder, what: str, row: Mapping[str, Any]
) -> TrainingError:
    """The error for ``what``, several steps in a row that were not finite. ``row`` is the newest
    row of metrics: if the cross-entropy is finite in it, loss terms that are not finite are named
    as the cause."""
    terms = [name for name, value in row.items() if name.startswith(f"{LOSS}/")
             and isinstance(value, float) and not isfinite(value)]  # fmt: skip
    if not terms or CROSS_ENTROPY in terms:
        return diverged(training, folder, what)
    return TrainingError(
        f"{what}: not finite is {', '.join(terms)}, a loss term of a plugin; mend the plugin or "
        "leave it out, and --resume"
    )


def diverged(training: TrainingSection, folder: RunFolder, what: str) -> DivergedError:
    """The error for ``what``, with the command that goes on from the newest sound checkpoint."""
    back = newest_sound(folder.checkpoints)
    rates = {"training.learning_rate": training.learning_rate}
    if training.optimizer_name == "muon":
        rates["training.muon.learning_rate"] = training.muon.learning_rate
    now = ", ".join(f"{key} (now {rate:g})" for key, rate in rates.items())
    if back is None:
        return DivergedError(
            f"{what}; no checkpoint is from before that: start a new run with a lower {now}, a "
            "longer training.warmup_steps or a lower training.gradient_clip"
        )
    arguments = ["--output", str(folder), "--resume-from", short_path(str(back))]
    for key, rate in rates.items():
        arguments += [f"--{key}", f"{rate / 2:g}", "--allow-change", key]
    return DivergedError(
        f"{what}; go back to step {step_of(back)}, the newest checkpoint from before that, with a "
        f"lower {now}: {shlex.join(arguments)}",
        arguments,
    )
