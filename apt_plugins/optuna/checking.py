"""Checks a space against the profile before anything runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apt_core import ConfigError, Problem
from apt_core.config import Override, json_schema
from apt_core.errors import did_you_mean
from apt_core.kernel import Kernel
from apt_plugins.optuna.space import Dimension, Space, middle

TRIES = 30
"""Combinations with values of other dimensions in which a value is tried that the profile refuses
by itself."""

ALIKE = 8
"""After so many that are refused for the same reason, no more are tried."""

OF_TEXT = ("data.",)
"""Sections whose keys change what a held-out loss is measured on."""

Boot = Callable[[Sequence[Override]], Kernel]
"""Checks the profile with these values on top of it, as a trial does. Raises ConfigError."""


@dataclass(frozen=True)
class Checked:
    """A ``space`` whose kinds fit the profile, and what is to be told of it."""

    space: Space
    notices: tuple[str, ...] = ()


def check_space(space: Space, kernel: Kernel, boot: Boot) -> Checked:
    """Try both ends of every range, and every choice, on the profile.

    ``kernel`` is the profile's own. A range is one of floats where the profile's key takes floats.
    A value that the profile refuses beside its own other values may be right beside those of other
    dimensions, and is tried with them. Raises ConfigError for every key that does not exist, value
    that is refused, and key that nothing reads.
    """
    schema = json_schema(kernel.sections)
    space = Space(tuple(_with_kind(each, schema) for each in space))
    trying = _Trying(space, boot)
    problems = [problem for each in space for problem in trying.problems(each)]
    if problems:
        raise ConfigError(problems)
    return Checked(space, tuple(_notices(space)))


def _with_kind(dimension: Dimension, schema: Mapping[str, Any]) -> Dimension:
    """The dimension as one of floats, where the profile's key takes floats and whole ends were
    written."""
    if dimension.kind != "int" or dimension.step is not None:
        return dimension
    if _types(dimension.key.split("."), schema) & {"integer", "number"} != {"number"}:
        return dimension
    return replace(dimension, kind="float", low=float(dimension.low), high=float(dimension.high))


def _types(path: Sequence[str], schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that the profile's schema has at a path; empty where it has none."""
    definitions = schema.get("$defs", {})
    entries: list[Mapping[str, Any]] = [schema]
    for key in (*path, None):
        options: list[Mapping[str, Any]] = []
        while entries:
            entry = entries.pop()
            below = [*entry.get("anyOf", ()), *entry.get("allOf", ()), *entry.get("oneOf", ())]
            if reference := entry.get("$ref", ""):
                below.append(definitions.get(reference.removeprefix("#/$defs/"), {}))
            entries += below
            options.append(entry)
        if key is None:
            return {str(each["type"]) for each in options if isinstance(each.get("type"), str)}
        for entry in options:
            found = entry.get("properties", {}).get(key, entry.get("additionalProperties"))
            entries += [found] if isinstance(found, dict) else []
    return set()


class _Trying:
    """Tries values of a space on a profile."""

    def __init__(self, space: Space, boot: Boot) -> None:
        self._space, self._boot = space, boot
        self._random = random.Random(0)  # noqa: S311, no secret: the same values in every process

    def problems(self, dimension: Dimension) -> list[Problem]:
        """What is wrong with a dimension: each problem once."""
        found: dict[tuple[str, str], Problem] = {}
        reads, reasons = False, []
        for value in dimension.values():
            try:
                kernel = self._booted(dimension, value)
            except ConfigError as error:
                for problem in error.problems:
                    found.setdefault((problem.key, problem.message), problem)
                continue
            reason = _inactive(kernel, dimension.key)
            reads = reads or not reason
            reasons += [reason] if reason else []
        if not found and not reads and reasons:
            message = f"nothing reads it: {reasons[0]}"
            hint = "take it out of the space"
            return [Problem(message, dimension.key, f"--space {dimension.where}", hint)]
        return [*found.values()]

    def _booted(self, dimension: Dimension, value: Any) -> Kernel:
        """The profile with the value, beside its own others or, where it refuses that, beside
        others of the space. Raises the ConfigError of the first try."""
        first = self._with(dimension, value, {})
        try:
            return self._boot(self._space.overrides(first))
        except ConfigError as error:
            refused = error
        known = _said(refused)
        for tried in range(TRIES if len(self._space) > 1 else 0):
            others = {
                each.key: self._random.choice([*each.values(), middle(each)])
                for each in self._space
            }
            try:
                return self._boot(self._space.overrides(self._with(dimension, value, others)))
            except ConfigError as error:
                known &= _said(error)
                own = any(f"{dimension.key}.".startswith(f"{key}.") for key, _ in known)
                if tried + 1 >= ALIKE and own:
                    break  # it is wrong whatever stands beside it
        raise refused

    def _with(self, dimension: Dimension, value: Any, others: Mapping[str, Any]) -> dict[str, Any]:
        """``others`` with the value, and with what its condition asks for."""
        values = {**others, dimension.key: value}
        needed = [dimension]
        while needed:
            for key, wanted in needed.pop().when.items():
                values[key] = wanted[0]
                other = self._space.get(key)
                needed += [other] if other is not None else []
        return {
            each.key: values[each.key]
            for each in self._space
            if each.key in values and each.is_searched(values)
        }


def _said(error: ConfigError) -> set[tuple[str, str]]:
    return {(problem.key, problem.message) for problem in error.problems}


def _inactive(kernel: Kernel, key: str) -> str:
    """Why nothing reads the key; empty where something does."""
    for item in kernel.inactive:
        if f"{key}.".startswith(f"{item.key}."):
            return item.reason
    return ""


def check_metric(kernel: Kernel, metric: str) -> Iterator[Problem]:
    """A problem where no evaluation of the profile has the metric, as far as that is known before
    its tasks are read."""
    evaluation = kernel.config.evaluation
    known = ["val_loss", "val_bpb", "val_ppl"]
    known += [f"val_{name}" for name in evaluation.metrics if name != "perplexity"]
    if metric in known or (evaluation.tasks and metric.startswith("task/")):
        return
    hint = did_you_mean(metric, known) or f"there are {', '.join(known)}"
    if metric.startswith("task/"):
        hint = "evaluation.tasks names none"
    yield Problem(f"no evaluation of this profile has {metric!r}", "--metric", hint=hint)


def _notices(space: Space) -> Iterator[str]:
    text = [each.key for each in space if each.key.startswith(OF_TEXT)]
    if text:
        yield (
            f"{', '.join(text)}: where trials evaluate on other text or other tokens, their losses "
            "are of different things; val_bpb (--metric) compares tokenizers on the same text"
        )
