"""Chooses the values of a trial by Optuna's samplers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from apt_core import ConfigError
from apt_plugins.optuna.records import DIVERGED, is_paused
from apt_plugins.optuna.settings import Direction
from apt_plugins.optuna.space import Dimension, Space

TRIES = 100
"""Combinations of values that are drawn until the profile takes one."""

Refusal = Callable[[Mapping[str, Any]], ConfigError | None]
"""Why the profile refuses a combination of values; None where it takes them."""


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension as Optuna describes it."""
    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.labels)
    if dimension.kind == "int":
        low, high, step = int(dimension.low), int(dimension.high), int(dimension.step or 1)
        return IntDistribution(low, high, log=dimension.log, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """The value of a dimension in a trial, which is sampled if it has none."""
    if dimension.kind == "choice":
        return trial.suggest_categorical(dimension.key, dimension.labels)
    if dimension.kind == "int":
        low, high, step = int(dimension.low), int(dimension.high), int(dimension.step or 1)
        return trial.suggest_int(dimension.key, low, high, step=step, log=dimension.log)
    return trial.suggest_float(
        dimension.key, dimension.low, dimension.high, step=dimension.step, log=dimension.log
    )


class Given(BaseSampler):
    """Gives trials the ``values`` that were chosen for them."""

    def __init__(self) -> None:
        self.values: Mapping[str, Any] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.values[param_name]


def choose(
    space: Space,
    trials: Iterable[FrozenTrial],
    number: int,
    *,
    direction: Direction,
    sampler: str,
    seed: int,
    refusal: Refusal,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Values of a new trial, by key; ``fixed`` has those that it has already.

    They are a function of the trials so far, the ``number`` of the new one and the ``seed``:
    neither a resumed study nor another worker draws the same ones again. A paused trial counts as
    one that was pruned where it is. Raises the last ConfigError where the profile refuses TRIES
    combinations in a row.
    """
    known = [each for each in (_as_seen(trial, space) for trial in trials) if each is not None]
    drawn = _sampler(sampler, f"{seed}/{number}")
    study = optuna.create_study(direction=direction, sampler=drawn)
    study.add_trials(known)
    refused: ConfigError | None = None
    for _ in range(TRIES):
        trial = study.ask()
        values = dict(fixed or {})
        for dimension in space:
            if dimension.key not in values and dimension.is_searched(values):
                values[dimension.key] = suggest(trial, dimension)
        refused = refusal(values)
        if refused is None:
            return values
        study.tell(trial, state=TrialState.FAIL)
    assert refused is not None
    raise ConfigError(
        [
            *refused.problems,
            *ConfigError(
                f"the profile refuses {TRIES} combinations of values in a row; above is why it "
                "refuses the last one",
                "--space",
                hint="narrow the space so that its values fit each other",
            ).problems,
        ]
    )


def _sampler(name: str, seed: str) -> BaseSampler:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
    return RandomSampler(seed=number) if name == "random" else TPESampler(seed=number)


def _as_seen(trial: FrozenTrial, space: Space) -> FrozenTrial | None:
    """A trial as the sampler is to see it; None for one that tells it nothing."""
    params = trial.params
    if not params or not space.contains(params):
        return None
    state = trial.state
    if is_paused(trial) or trial.user_attrs.get(DIVERGED):
        state = TrialState.PRUNED  # without a value it is the worst of all
    if state not in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        return None
    distributions = {each.key: distribution(each) for each in space if each.key in params}
    return optuna.create_trial(
        state=state,
        value=trial.value if state is TrialState.COMPLETE else None,
        params=params,
        distributions=distributions,
        intermediate_values={} if trial.user_attrs.get(DIVERGED) else trial.intermediate_values,
    )
