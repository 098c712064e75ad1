"""What each hook may return: converters to plain types, which run inside the guard.

A converter takes what an implementation returned and the arguments of the call, and returns the
same as builtin containers of numbers, text, tensors and the dataclasses of :mod:`apt_core.types`:
nothing of a plugin's is left in it that could fail later, but for what a hook is there to hand over
(a provider, a function). It raises what is wrong, which then is a failure of the plugin in that
hook. A hook names its converter on ``@hookspec(returns=…)``; the first line of the converter's
docstring is its rule in the reference of hooks.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from apt_core.kinds import KINDS
from apt_core.plain_values import (
    MAX_FACTOR,
    MAX_TEXT,
    count_of,
    entries_of,
    items_of,
    number,
    plain_tensor,
    text,
    texts_of,
    type_name,
    within,
)
from apt_core.plugin_state import plain_state
from apt_core.types import (
    FIRST,
    Message,
    PluginCosts,
    ProviderSpec,
    RewrittenPrompt,
    SectionSpec,
    Source,
    TrainableStage,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_POSITION = 2**62
"""The last position that a run may have."""

# Loading -------------------------------------------------------------------------------------


def provider_specs(value: Any, arguments: Mapping[str, Any]) -> list[ProviderSpec]:
    """a list of ProviderSpec, whose fields are what they say"""
    items = [value] if isinstance(value, ProviderSpec) else items_of(value, "ProviderSpec")
    return [_provider_spec(item) for item in items]


def _provider_spec(spec: Any) -> ProviderSpec:
    if not isinstance(spec, ProviderSpec):
        raise TypeError(f"it returned a list with a {type_name(spec)}, not a list of ProviderSpec")
    name = _printable(spec.name, "a provider's name")
    kind = _printable(spec.kind, f"the kind of provider {name}")
    what = f"of provider {kind}:{name}"
    factory, config = spec.factory, spec.config
    if isinstance(factory, str):
        factory = _target(factory, f"the factory {what}")
    elif not callable(factory):
        raise TypeError(
            f"the factory {what} is a {type_name(factory)}: give a class or 'module:name'"
        )
    if isinstance(config, str):
        config = _target(config, f"the config {what}")
    elif config is not None:
        config = _model(config, f"the config {what}")
    return ProviderSpec(
        kind=kind,
        name=name,
        factory=factory,
        version=text(spec.version, f"the version {what}"),
        summary=text(spec.summary, f"the summary {what}"),
        requires=texts_of(spec.requires, f"requires {what}"),
        conflicts=texts_of(spec.conflicts, f"conflicts {what}"),
        config=config,
        section=_path(spec.section, f"the section {what}"),
        default=bool(spec.default),
        files=None if spec.files is None else texts_of(spec.files, f"files {what}"),
        reads=None if spec.reads is None else texts_of(spec.reads, f"reads {what}"),
    )


def section_specs(value: Any, arguments: Mapping[str, Any]) -> list[SectionSpec]:
    """a list of SectionSpec, whose fields are what they say"""
    return [_section_spec(item) for item in items_of(value, "SectionSpec")]


def _section_spec(spec: Any) -> SectionSpec:
    if not isinstance(spec, SectionSpec):
        raise TypeError(f"it returned a list with a {type_name(spec)}, not a list of SectionSpec")
    path = _path(spec.path, "the path of a section")
    model = spec.model
    if model is not None:
        model = _model(model, f"the model of section {path!r}")
    if bool(path) != (model is not None):
        raise TypeError(f"section {path!r}: give both a path and a model, or neither")
    params = texts_of(spec.schedule_params, f"schedule_params of section {path!r}")
    for name in params:
        if not name.isidentifier():
            raise ValueError(f"the schedule parameter {name!r} is no name")
    for what, function in (("inactive", spec.inactive), ("check", spec.check)):
        if function is not None and not callable(function):
            raise TypeError(
                f"{what} of section {path!r} is a {type_name(function)}, not a function"
            )
    names = dict(entries_of(spec.names, f"names of section {path!r}"))
    for key, kind in names.items():
        if kind not in KINDS:
            raise ValueError(f"{path}.{key} is to name a provider of the unknown kind {kind!r}")
    grows = dict(entries_of(spec.grows, f"grows of section {path!r}"))
    if unknown := [key for key in grows if model is None or key not in model.model_fields]:
        raise ValueError(f"grows of section {path!r} names {unknown[0]!r}, which it has not")
    without = text(spec.without, f"without of section {path!r}")
    return SectionSpec(path, model, params, spec.inactive, spec.check, names, grows, without)


def _printable(value: Any, what: str) -> str:
    checked = text(value, what)
    if not checked or not checked.isprintable() or checked != checked.strip():
        raise ValueError(f"{what} is {checked!r}, not a name")
    return checked


def _target(value: str, what: str) -> str:
    """``"module:attribute"``."""
    module, _, attribute = text(value, what).partition(":")
    if not (attribute.isidentifier() and all(p.isidentifier() for p in module.split("."))):
        raise ValueError(f"{what} is {str.__str__(value)!r}, not 'module:attribute'")
    return f"{module}:{attribute}"


def _path(value: Any, what: str) -> str:
    """A dotted path of keys, or nothing."""
    path = text(value, what)
    if path and not all(part and part.isprintable() for part in path.split(".")):
        raise ValueError(f"{what} is {path!r}, not a path of keys")
    return path


def _model(value: Any, what: str) -> Any:
    """A class of pydantic's. Without pydantic, which listings do not import, there is none."""
    pydantic = sys.modules.get("pydantic")
    if not isinstance(value, type):
        raise TypeError(f"{what} is a {type_name(value)}, not a pydantic model")
    if pydantic is None or not issubclass(value, pydantic.BaseModel):
        raise TypeError(f"{what} is the class {value.__name__}, which is no pydantic model")
    return value


# Building ------------------------------------------------------------------------------------


def provider(value: Any, arguments: Mapping[str, Any]) -> Any:
    """an object with the methods of its kind"""
    check_provider(value, arguments["spec"].kind)
    return value


def check_provider(value: Any, kind: str) -> None:
    """Raise TypeError where ``value`` cannot be a provider of this kind, as far as is seen without
    building anything with it."""
    if isinstance(value, type):
        raise TypeError(f"the class {value.__name__} is no {kind} provider: give an object of it")
    missing = [m for m in KINDS[kind].methods if not callable(getattr(value, m, None))]
    if missing:
        raise TypeError(
            f"a {type_name(value)} is no {kind} provider: it has no {', '.join(missing)}()"
        )
    if kind == "tokenizer":
        size = value.vocab_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise TypeError(f"the vocab_size of a {type_name(value)} is no number of ids")


def parameter_groups(value: Any, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """a list of mappings with ``params``, which are of the model, and numbers"""
    own = {id(parameter) for parameter in arguments["model"].parameters()}
    return [_parameter_group(group, own) for group in items_of(value, "parameter groups")]


def _parameter_group(value: Any, own: set[int]) -> dict[str, Any]:
    group = dict(entries_of(value, "a parameter group"))
    unknown = group.keys() - {"params", "lr_scale", "weight_decay"}
    if unknown:
        raise ValueError(f"a parameter group has the unknown keys {sorted(unknown)}")
    if "params" not in group:
        raise ValueError("a parameter group has no params")
    parameters = items_of(group["params"], "parameters")
    strangers = sum(id(parameter) not in own for parameter in parameters)
    if strangers:
        raise ValueError(f"{strangers} of its tensors are no parameters of the model")
    checked: dict[str, Any] = {"params": parameters}
    for key in ("lr_scale", "weight_decay"):
        if key in group:
            checked[key] = within(group[key], key, MAX_FACTOR)
    return checked


def anything(value: Any, arguments: Mapping[str, Any]) -> Any:
    """an object of the type that is documented; the caller looks at it"""
    return value


def costs(value: Any, arguments: Mapping[str, Any]) -> PluginCosts:
    """a PluginCosts of counts"""
    if not isinstance(value, PluginCosts):
        raise TypeError(f"it returned {type_name(value)}, not PluginCosts")
    return PluginCosts(
        averages=count_of(value.averages, "averages"),
        forwards=count_of(value.forwards, "forwards"),
        passes=count_of(value.passes, "passes"),
    )


def trainable_stages(value: Any, arguments: Mapping[str, Any]) -> list[TrainableStage]:
    """a list of TrainableStage, whose fields are what they say"""
    return [_trainable_stage(item) for item in items_of(value, "TrainableStage")]


def _trainable_stage(stage: Any) -> TrainableStage:
    if not isinstance(stage, TrainableStage):
        raise TypeError(
            f"it returned a list with a {type_name(stage)}, not a list of TrainableStage"
        )
    unit = next((unit for unit in FIRST if unit == text(stage.unit, "the unit of a stage")), None)
    if unit is None:
        raise ValueError(f"the unit of a stage is {stage.unit!r}, not one of {', '.join(FIRST)}")
    at = stage.at
    if isinstance(at, bool) or not isinstance(at, int):
        raise TypeError(f"the {unit} of a stage is a {type_name(at)}, not an integer")
    at = int.__int__(at)
    if at < FIRST[unit]:
        raise ValueError(f"a stage is at {unit} {at}: the first one of a run is {FIRST[unit]}")
    if at > MAX_POSITION:
        raise ValueError(f"a stage is at a {unit} that no run comes to")
    freeze, thaw = (
        [_printable(pattern, f"a pattern of {what}") for pattern in texts_of(given, what)]
        for what, given in (("freeze", stage.freeze), ("thaw", stage.thaw))
    )
    key = text(stage.key, "the key of a stage")
    return TrainableStage(tuple(freeze), tuple(thaw), unit, at, key)


# Training ------------------------------------------------------------------------------------


def loss_terms(value: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """a mapping of names to 0-d real tensors on the model's device"""
    device = arguments["batch"].targets.device
    return {name: _loss_term(term, device) for name, term in entries_of(value, "what it returned")}


def _loss_term(value: Any, device: torch.device) -> Tensor:
    term = plain_tensor(value, "a loss term")
    if not term.is_floating_point() or term.element_size() == 1:
        raise TypeError(f"a loss term is of type {term.dtype}, not a real floating type")
    if term.ndim != 0:
        raise ValueError(f"a loss term has the shape {list(term.shape)}: reduce it to 0-d")
    if term.device not in (device, _cpu()):
        raise ValueError(f"a loss term is on {term.device}, the model's output on {device}")
    return term


@functools.cache
def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def metrics(value: Any, arguments: Mapping[str, Any]) -> dict[str, float]:
    """a mapping of names to numbers"""
    pairs = entries_of(value, "what it returned")
    return {name: number(v, f"the metric {name!r}") for name, v in pairs}


# Checkpoints ---------------------------------------------------------------------------------


def state(value: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """a mapping of JSON values and dense tensors, nested and sized within bounds"""
    return plain_state(value)


# Generation ----------------------------------------------------------------------------------


def prompt(value: Any, arguments: Mapping[str, Any]) -> str | tuple[Message, ...] | RewrittenPrompt:
    """text that can be encoded, a list of Message, or a RewrittenPrompt of one of them"""
    if not isinstance(value, RewrittenPrompt):
        return _prompt(value)
    sources = items_of(value.sources, "sources")
    return RewrittenPrompt(_prompt(value.prompt), tuple(_source(source) for source in sources))


def _prompt(value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        checked: str | tuple[Message, ...] = text(value, "the prompt")
        length = len(checked)
    elif isinstance(value, list | tuple) and value:
        checked = tuple(_message(each) for each in items_of(value, "messages"))
        length = sum(len(each.content) for each in checked)
    else:
        raise TypeError(f"it returned {type_name(value)}, not text or a list of Message")
    if length > MAX_TEXT:
        raise ValueError(f"the prompt has more than {MAX_TEXT} characters")
    return checked


def _message(value: Any) -> Message:
    if not isinstance(value, Message):
        raise TypeError(f"it returned a prompt with a {type_name(value)}, not of Message")
    return Message(text(value.role, "a role"), text(value.content, "the content of a message"))


def _source(value: Any) -> Source:
    if not isinstance(value, Source):
        raise TypeError(f"a source of the prompt is a {type_name(value)}, not a Source")
    return Source(
        path=text(value.path, "the path of a source"),
        first_line=count_of(value.first_line, "the first line of a source"),
        text=text(value.text, "the text of a source"),
        score=number(value.score, "the score of a source"),
    )


def functions(value: Any, arguments: Mapping[str, Any]) -> list[Callable[..., Any]]:
    """a list of callables"""
    taken = [value] if callable(value) else items_of(value, "functions")
    for function in taken:
        if not callable(function):
            raise TypeError(f"a logits processor is a {type_name(function)}, not a function")
    return taken


def decoder(value: Any, arguments: Mapping[str, Any]) -> Any:
    """an object with a method ``choose``"""
    if not callable(getattr(value, "choose", None)):
        raise TypeError(f"a {type_name(value)} is no decoder: it has no choose()")
    return value


def logits(value: Any, given: Tensor) -> Tensor:
    """What a logits processor made of ``given`` [V], as a plain tensor of the same kind. Raises
    TypeError, and ValueError where nothing is left to choose from or a logit is not below +inf."""
    shape = list(given.shape)
    changed = plain_tensor(value, "what the logits processor returned")
    if changed.shape != given.shape or not changed.is_floating_point():
        raise TypeError(f"the logits processor did not return logits {shape}")
    if changed.device != given.device:
        raise ValueError(f"the logits are on {given.device}, what it returned on {changed.device}")
    changed = changed.detach().to(given.dtype)
    import torch

    # Read at once, for a device is waited for.
    bad, some = torch.stack([~(changed < math.inf).all(), changed.isfinite().any()]).tolist()
    if bad:
        raise ValueError("the logits processor returned a logit that is NaN or +inf")
    if not some:
        raise ValueError("the logits processor left no token that can be chosen")
    return changed
