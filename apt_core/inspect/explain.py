"""What a key of the profile means, who reads it, and which value it has in a profile and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apt_core.config import (
    Config,
    InactiveKey,
    KeyFacts,
    Override,
    Source,
    describe_key,
    read_profile,
)
from apt_core.config.messages import KnownKeys
from apt_core.config.secret_fields import secret_places
from apt_core.config.switches import UNITS, read_switch
from apt_core.config.yaml_text import dotted
from apt_core.errors import ConfigError, did_you_mean
from apt_core.inspect.listing import Listing, survey
from apt_core.kernel import Kernel, boot
from apt_core.kinds import KINDS, naming_keys
from apt_core.providers.optimizer import BASE_WIDTH
from apt_core.schedules import Horizon
from apt_core.secrets import SecretValues, named_secrets, redact, without_secrets
from apt_core.sections import Ramp
from apt_core.synonyms import key_meant, plain_word
from apt_core.types import CORE, FIRST, Inactive, ProviderSpec, SectionSpec

SCHEDULES = "schedules"
SHOWN_POSITIONS = 6
"""Positions of a run at which a scheduled value is shown."""

EXAMPLE_STEPS = 1_000
"""The length of the run for which a learning rate is shown where that of the run is not known."""

LEARNING_RATES = ("training.learning_rate", "training.muon.learning_rate")
"""What the learning-rate schedule multiplies."""


@dataclass(frozen=True)
class Explained:
    """A key: its facts, its ``readers``, and with a profile the ``value`` there, ``where`` it comes
    from, why it is ``inactive``, what schedules do to it (``over_the_run``), and what is wrong with
    the profile (``problems``)."""

    facts: KeyFacts
    readers: tuple[str, ...]
    profile: str = ""
    value: Any = None
    where: str = ""
    inactive: str = ""
    over_the_run: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        row = asdict(self)
        facts = row.pop("facts")
        keys = [{name: key[name] for name in ("path", "value", "default", "meaning")}
                for key in facts.pop("keys")]  # fmt: skip
        facts["key"] = facts.pop("path")
        return {**facts, **row, "keys": keys}


def explain(
    key: str,
    profile: str = "",
    references: Sequence[str] = (),
    overrides: Sequence[Override] = (),
) -> Explained:
    """Everything about a key or a section, those of installed plugins and of ``references`` too.

    ``overrides`` are those of the command line, on top of the profile. Raises ConfigError, with a
    suggestion, for a key that there is not, and for a profile that cannot be read.
    """
    listing = survey(profile, references)
    sections = [*listing.sections, *listing.available]
    facts = _facts(key.partition("=")[0], sections)
    readers = tuple(_readers(facts, sections, listing))
    if not profile:
        return Explained(facts, readers, over_the_run=tuple(_scheduled_params(facts, sections)))
    source = read_profile(profile, overrides)
    try:
        kernel = boot(profile, plugins=references, overrides=overrides, files=False)
    except ConfigError as error:
        value, where = _written(source, facts, sections), _where(source, facts)
        problems = tuple(map(str, error.problems))
        return Explained(facts, readers, profile, value, where, problems=problems)
    return Explained(
        facts,
        readers,
        profile,
        _value(kernel.config.to_dict(), facts),
        _where(source, facts),
        _inactive(kernel, facts, sections),
        tuple(_over_the_run(kernel, facts)),
    )


def _facts(key: str, sections: Sequence[SectionSpec]) -> KeyFacts:
    """The facts of a key by its dotted name, or by the last part of that where it is the only one
    that ends so."""
    path = key.split(".")
    params = {name for spec in sections for name in spec.schedule_params}
    found = describe_key(sections, path)
    if found is not None and (path[0] != SCHEDULES or len(path) == 1):
        return found
    if found is not None and path[1] in params:
        return found
    if len(path) == 2 and path[0] == SCHEDULES and (switch := read_switch(path[1], None)):
        verb = "enabled" if switch.enables else "disabled"
        meaning = f"From this {switch.unit} on, {switch.plugin} is {verb}."
        return KeyFacts(key, SCHEDULES, f"whole number ≥ {FIRST[switch.unit]}", meaning)
    models = {spec.path: spec.model for spec in sections if spec.path and spec.model is not None}
    known = KnownKeys(Config, models)
    if len(path) == 1:
        if key in params:
            return _facts(f"{SCHEDULES}.{key}", sections)
        ending = _ending(known, plain_word(key))
        if len(ending) == 1:
            return _facts(ending[0], sections)
        if len(ending) > 1:
            message = f"several keys are called {key!r}"
            raise ConfigError(message, hint=f"did you mean one of {', '.join(ending)}?")
        ours = key_meant(key)
        if ours and describe_key(sections, ours.split(".")):
            return _facts(ours, sections)
    if path[0] == SCHEDULES:
        hint = did_you_mean(path[1], params) or f"parameters are {', '.join(sorted(params))}"
        raise ConfigError(f"no installed plugin has the parameter {path[1]!r}", key, hint=hint)
    meant = known.meant(tuple(path))
    hint = f"did you mean {dotted(meant)!r}?" if meant else "`apt-hooks schema` lists every key"
    raise ConfigError("there is no such key", key, hint=hint)


def _ending(known: KnownKeys, word: str) -> list[str]:
    """The keys and sections of this name, by their dotted names."""
    return sorted(
        f"{section}.{word}".lstrip(".")
        for section, names in known.children.items()
        if word in names and "*" not in section
    )


# Who reads it -----------------------------------------------------------------------------------


def _readers(facts: KeyFacts, sections: Sequence[SectionSpec], listing: Listing) -> Iterator[str]:
    """Who reads the key, in words; the core where nobody else says so."""
    path = facts.path
    if path.startswith(f"{SCHEDULES}."):
        yield from _readers_of_schedule(path.split(".")[1], sections)
        return
    found = []
    for kind, keys in naming_keys(sections):
        if path in keys:
            names = [*listing.providers.list_providers(kind).get(kind, ())]
            names += ["none"] * KINDS[kind].optional
            found.append(f"the registry: it names a provider of {kind} ({', '.join(names)})")
    owner = _owner(facts, sections)
    found += [] if owner is None else [f"plugin {owner.plugin}"]
    for spec in listing.providers.specs():
        if _reads(spec, path):
            found.append(spec.key if spec.plugin == CORE else f"{spec.key} of plugin {spec.plugin}")
    yield from found or ["the core"]


def _reads(spec: ProviderSpec, path: str) -> bool:
    """Whether a provider says that it reads a key: it stands in a section of its own, or among what
    it reads of those that it shares."""
    own = [spec.section] if spec.section and spec.section not in Config.model_fields else []
    return any(f"{path}.".startswith(f"{key}.") for key in (*own, *(spec.reads or ())))


def _owner(facts: KeyFacts, sections: Sequence[SectionSpec]) -> SectionSpec | None:
    """The section of a plugin in which the key stands."""
    around = [
        spec for spec in sections if spec.path and f"{facts.path}.".startswith(f"{spec.path}.")
    ]
    return max(around, key=lambda spec: len(spec.path), default=None)


def _readers_of_schedule(name: str, sections: Sequence[SectionSpec]) -> Iterator[str]:
    switch = read_switch(name, None)
    if switch is not None:
        yield f"the core: it {'enables' if switch.enables else 'disables'} {switch.plugin}"
    for spec in sections:
        if name in spec.schedule_params:
            yield f"plugin {spec.plugin}"


def _scheduled_params(facts: KeyFacts, sections: Sequence[SectionSpec]) -> Iterator[str]:
    """What may be scheduled of the plugin that has the key."""
    for spec in sections:
        if spec.path and spec.schedule_params and f"{facts.path}.".startswith(f"{spec.path}."):
            names = ", ".join(f"{SCHEDULES}.{name}" for name in spec.schedule_params)
            yield f"plugin {spec.plugin} reads {names}"


# Its value in a profile -------------------------------------------------------------------------


def _value(data: Mapping[str, Any], facts: KeyFacts) -> Any:
    value: Any = data
    for part in facts.path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _written(source: Source, facts: KeyFacts, sections: Sequence[SectionSpec]) -> Any:
    """The value as an invalid profile has it, with masks for secrets."""
    secrets = SecretValues()
    secrets.add(named_secrets(source.data))
    for spec in sections:
        if spec.path and spec.model is not None:
            secrets.add(value for _, value in secret_places(spec.model, source.get(spec.path)))
    value = _value(without_secrets(source.data), facts)
    return json.loads(redact(json.dumps(value, default=str)))


def _where(source: Source, facts: KeyFacts) -> str:
    """The place that says the value, in words."""
    if not source.has(facts.path):
        return "default"
    if isinstance(source.get(facts.path), Mapping):
        return ""
    where = source.where(facts.path)
    if where.startswith("--"):
        return f"command line, {where}"
    inherited = source.layer(facts.path) < len(source.files) - 1
    return f"{where}, inherited" if inherited else where


def _inactive(kernel: Kernel, facts: KeyFacts, sections: Sequence[SectionSpec]) -> str:
    """Why the key has no effect in this profile; empty if it may have one."""
    owner = _owner(facts, sections)
    if owner is not None and owner.plugin not in {spec.plugin for spec in kernel.sections}:
        return f"plugin {owner.plugin} is not active"
    items: list[InactiveKey | Inactive] = [*kernel.inactive, *kernel.inactive_settings]
    for item in items:
        if f"{facts.path}.".startswith(f"{item.key}."):
            return item.reason
    return ""


def _over_the_run(kernel: Kernel, facts: KeyFacts) -> Iterator[str]:
    """What the schedules make of the key in the course of the run."""
    path = facts.path
    if path in LEARNING_RATES:
        yield from _rate(kernel, path)
    parts = path.split(".")
    name = parts[1] if parts[0] == SCHEDULES and len(parts) > 1 else ""
    if name in kernel.schedule.values:
        yield from _course(kernel, name)
    for spec in kernel.sections:
        owns = spec.path and f"{path}.".startswith(f"{spec.path}.")
        if not owns and name not in spec.schedule_params:
            continue
        for switch in kernel.schedule.switches_of(spec.plugin):
            verb = "enabled" if switch.enables else "disabled"
            yield f"plugin {spec.plugin} is {verb} from {switch.unit} {switch.at} on"
        for other in spec.schedule_params if owns else ():
            if other in kernel.schedule.values:
                yield from _course(kernel, other)


def _course(kernel: Kernel, name: str) -> Iterator[str]:
    """The values of a scheduled parameter."""
    value = kernel.schedule.values[name]
    if not isinstance(value, Ramp):
        yield f"{SCHEDULES}.{name}: {value:g} throughout"
        return
    try:
        first, last = kernel.schedule.span(name)
        places = _spread(first, last)
        units = {unit: "tokens" if unit == "token" else unit for unit in UNITS}
        shown = [
            f"{place:,}: {kernel.schedule.get_param(name, **{units[value.by]: place}):.4g}"
            for place in places
        ]
        yield f"{SCHEDULES}.{name} by {value.by}: {', '.join(shown)}"
    except ValueError:  # the horizon is known with the data
        unit = f"{value.by}s"
        length = "to the end of the run" if value.until is None else f"to {value.by} {value.until}"
        length = length if value.warmup is None else f"over {value.warmup} {unit}"
        yield (
            f"{SCHEDULES}.{name}: {value.shape} from {value.start:g} to {value.end:g}, {length}; "
            f"its {unit} are known with the data"
        )


def _rate(kernel: Kernel, path: str) -> Iterator[str]:
    """The peak rate times the factor of the schedule, at a few steps."""
    training = kernel.config.training
    schedule = kernel.registry.get("lr_schedule", training.lr_schedule_name)
    known = Horizon(None, training.max_steps).last("step")
    total, warmup = known or EXAMPLE_STEPS, training.warmup_steps
    peak = (
        training.muon.learning_rate if path.startswith("training.muon") else training.learning_rate
    )
    steps = sorted({*_spread(FIRST["step"], total), *([warmup] if 0 < warmup < total else [])})
    shown = [
        f"{step:,}: {peak * schedule.factor(step, total, warmup, training.min_lr_ratio):.3g}"
        for step in steps
    ]
    length = f"{total:,} steps at the most" if known else f"{total:,} steps, for example"
    yield f"{training.lr_schedule_name} by step, in a run of {length}: {', '.join(shown)}"
    model = kernel.config.model
    if path == "training.learning_rate" and training.scale_lr_by_width:
        yield (
            f"times {BASE_WIDTH / model.d_model:g} for matrices that read the residual stream "
            f"(training.scale_lr_by_width, model.d_model {model.d_model})"
        )


def _spread(first: int, last: int) -> list[int]:
    """A few positions from the first to the last one."""
    count = min(SHOWN_POSITIONS, max(1, last - first + 1))
    if count == 1:
        return [first]
    return [first + round((last - first) * n / (count - 1)) for n in range(count)]
