"""How long a study would take, and the values of its first trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_core.errors import AptError, ConfigError
from apt_core.kernel import Kernel
from apt_plugins.optuna.sampling import choose
from apt_plugins.optuna.settings import Settings
from apt_plugins.optuna.space import Space, own_values
from apt_plugins.optuna.tuned import Tuned


def estimate(
    tuned: Tuned,
    kernel: Kernel,
    space: Space,
    settings: Settings,
    trials: int,
    workers: int,
    shown: int,
) -> dict[str, Any]:
    """The ``samples`` of the first trials, the ``seconds_per_trial`` that the plan of the first one
    says of a whole trial, and the ``seconds`` of the study; null where the plan does not know."""

    def refusal(values: Mapping[str, Any]) -> ConfigError | None:
        try:
            tuned.boot(space.overrides(values))
        except ConfigError as error:
            return error
        return None

    own = own_values(space, kernel.config.to_dict()) if settings.baseline else None
    samples = [
        own
        if number == 0 and own is not None
        else choose(
            space,
            (),
            number,
            direction=settings.direction,
            sampler=settings.sampler,
            seed=settings.seed,
            refusal=refusal,
        )
        for number in range(min(trials, shown))
    ]
    whole = _seconds(tuned.boot(space.overrides(samples[0])))
    return {
        "samples": samples,
        "seconds_per_trial": whole,
        "seconds": None if whole is None else whole * _whole_trials(settings, trials) / workers,
    }


def _whole_trials(settings: Settings, trials: int) -> float:
    """The training of a study in whole trials: by halving, most of them train a part."""
    rungs, factor = settings.rungs, settings.reduction_factor
    total = 0.0
    for number in range(trials):
        first = settings.bracket(number)
        before = 0.0
        for index, share in enumerate(rungs[first:]):
            total += (share - before) / factor**index
            before = share
    return total


def _seconds(kernel: Kernel) -> float | None:
    """How long the plan of a profile says that its run takes."""
    from apt_core.planning.plan import make_plan

    try:
        plan = make_plan(kernel, 1)
    except AptError:
        return None
    training = kernel.config.training
    steps, stage = plan["batch"]["steps_per_epoch"], plan["stages"][-1]
    if stage["seconds_per_epoch"] is None or not steps:
        return None
    epochs = float(training.max_epochs or 1)
    if training.max_steps is not None:
        epochs = min(epochs, training.max_steps / steps)
    return float(stage["seconds_per_epoch"]) * epochs
