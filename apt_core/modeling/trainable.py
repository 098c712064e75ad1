"""The stages of the trainable set: which parameters each of them freezes and thaws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from apt_core.errors import Problem, did_you_mean
from apt_core.kernel import Kernel
from apt_core.modeling.parameter_names import (
    chosen,
    named_with_aliases,
    shortened,
    words_of,
)
from apt_core.schedules import Schedule
from apt_core.types import TrainableStage, Unit

HOOK = "apt_trainable"

MOST_NAMED = 4
"""The most patterns that a text lists."""


@dataclass(frozen=True)
class PlacedStage:
    """A ``stage`` of ``plugin``, the one with this ``number`` from 1."""

    plugin: str
    number: int
    stage: TrainableStage

    @property
    def unit(self) -> Unit:
        return self.stage.unit

    @property
    def at(self) -> int:
        return self.stage.at


def declared_stages(kernel: Kernel, schedule: Schedule) -> list[PlacedStage]:
    """The stages that the plugins of the run declare, in the order of ``schedule``, the kernel's
    with its horizon. Raises ConfigError for what a plugin refuses."""
    manager = kernel.manager
    names = [call.plugin for call in manager.order(HOOK, dormant=True)]
    found = [
        PlacedStage(name, number, stage)
        for name in dict.fromkeys(names)
        for number, stage in enumerate(
            manager.call_plugin(name, HOOK, config=kernel.config) or (), start=1
        )
    ]
    return schedule.in_order(found)


@dataclass(frozen=True)
class Change:
    """What a stage makes of a model: names of parameters that it freezes and thaws."""

    frozen: Sequence[str]
    thawed: Sequence[str]

    @classmethod
    def of(cls, stage: TrainableStage, model: nn.Module) -> Change:
        """The change of ``model``, in which nothing is set."""
        parameters, aliases = named_with_aliases(model)
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        after = dict(before)
        for patterns, learns in ((stage.freeze, False), (stage.thaw, True)):
            for pattern in patterns:
                after |= dict.fromkeys(chosen(pattern, aliases), learns)
        changed = [name for name in before if before[name] != after[name]]
        return cls([n for n in changed if before[n]], [n for n in changed if after[n]])

    def apply(self, model: nn.Module) -> None:
        """Freeze and thaw parameters of ``model``."""
        parameters = dict(model.named_parameters())
        for names, learns in ((self.frozen, False), (self.thawed, True)):
            for name in names:
                parameters[name].requires_grad_(learns)

    def parts(self, model: nn.Module) -> Mapping[str, tuple[Sequence[str], int]]:
        """For ``frozen`` and ``thawed``, if there are any: patterns that choose these parameters of
        ``model``, and how many numbers they have."""
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return {
            what: (shortened(names, sizes), sum(sizes[name] for name in names))
            for what, names in (("frozen", self.frozen), ("thawed", self.thawed))
            if names
        }


def faults_of(placed: PlacedStage, model: nn.Module, *, known: bool = True) -> Iterator[Problem]:
    """Problems of a stage that changes ``model``, in which what earlier stages froze is frozen;
    where that is not ``known``, those of its patterns alone."""
    stage, (parameters, aliases) = placed.stage, named_with_aliases(model)
    learns = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for what, patterns, then in (("freeze", stage.freeze, False), ("thaw", stage.thaw, True)):
        for pattern in patterns:
            names = chosen(pattern, aliases)
            if not names:
                message = f"{pattern!r} chooses no parameter of the model as it is then"
                yield Problem(message, _key(placed, what), hint=_like(pattern, aliases))
            elif known and all(learns[name] is then for name in names):
                state = "is trained" if then else "is frozen"
                hint = "freeze it earlier, or take it out" if then else "take it out"
                message = f"what {pattern!r} chooses {state} before this stage already"
                yield Problem(message, _key(placed, what), hint=hint)
        # What a stage freezes comes first, so that it may leave out some of it.
        for pattern in patterns:
            learns |= dict.fromkeys(chosen(pattern, aliases), then)
    if known and not any(learns.values()):
        yield Problem(
            "every parameter is frozen from this stage on: nothing would be trained",
            _key(placed),
            hint="let the same stage thaw a part of what it freezes",
        )


def _key(placed: PlacedStage, what: str = "") -> str:
    key = placed.stage.key
    return f"{key}.{what}" if key and what else key or f"plugin {placed.plugin}"


def _like(pattern: str, aliases: Mapping[str, str]) -> str:
    """What may be meant by a pattern that chooses nothing."""
    words = words_of(aliases)
    unknown = [word for word in pattern.split(".") if word not in words]
    close = next(filter(None, (did_you_mean(word, words) for word in unknown)), "")
    return close or f"its parts are {', '.join(_parts(aliases))}"


def _parts(names: Iterable[str]) -> Iterator[str]:
    """The parts at the top of a model; of a list of parts, with their numbers."""
    beneath: dict[str, list[str]] = {}
    for name in names:
        first, *rest = name.split(".")
        beneath.setdefault(first, []).extend(rest[:1])
    for first, seconds in beneath.items():
        numbered = all(second.isdecimal() for second in seconds) and seconds
        yield f"{first}.0-{max(map(int, seconds))}" if numbered else first


def listed(patterns: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(patterns) - MOST_NAMED} more" if len(patterns) > MOST_NAMED else ""
    return ", ".join(patterns[:MOST_NAMED]) + more
