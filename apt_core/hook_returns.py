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
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from apt_core.kinds import KINDS
from apt_core.types import PluginCosts, ProviderSpec, SectionSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_ITEMS = 100_000
"""Entries that a list or a mapping may have. (A generator may have no end.)"""

MAX_TEXT = 1 << 26
"""Characters of a prompt, and of all the text in the state of one plugin."""

MAX_DEPTH = 64
"""How deep the state of a plugin may be nested: JSON is read and written recursively."""

MAX_VALUES = 1_000_000
"""Values in the state of one plugin, all levels together."""

MAX_TENSORS = 10_000
"""Tensors in the state of one plugin: each has an entry in the header of a file."""

MAX_INT_BITS = 2048
"""Of an integer in a state. Python turns no more than a few thousand digits into text."""

MAX_EXPANDED = 1 << 26
"""Bytes of a tensor in a state whose entries share their memory."""

MAX_FACTOR = 1e4
"""Of ``lr_scale``, ``weight_decay`` and what a learning-rate schedule gives: beyond it no step
leaves the weights of use."""

TENSOR_KEY = "__tensor__"
"""Stands, in the JSON of a plugin's state, for one of its tensors."""


# Small parts ---------------------------------------------------------------------------------


def _name(value: object) -> str:
    return type(value).__name__


def text(value: Any, what: str = "it") -> str:
    """``value`` as a plain ``str``. Raises TypeError, and UnicodeError for half a surrogate pair,
    which no file takes."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {_name(value)}, not text")
    plain: str = str.__str__(value)
    plain.encode()
    return plain


def number(value: Any, what: str) -> float:
    """``value`` as a ``float``. Raises TypeError, and OverflowError for one that is too large."""
    if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):
        raise TypeError(f"{what} is a {_name(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise OverflowError(f"{what} is larger than any float") from None


def within(value: Any, what: str, highest: float = math.inf) -> float:
    """``value`` as a finite ``float`` from 0 to ``highest``. Raises TypeError, ValueError."""
    checked = number(value, what)
    if not (math.isfinite(checked) and 0 <= checked <= highest):
        bound = "" if math.isinf(highest) else f" to {highest:g}"
        raise ValueError(f"{what} is {checked:g}, not a number from 0{bound}")
    return checked


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is a {_name(value)}, not an integer")
    if not 0 <= value <= MAX_ITEMS:
        raise ValueError(f"{what} is not a number from 0 to {MAX_ITEMS}")
    return int.__int__(value)


def _items(value: Any, what: str) -> list[Any]:
    """``value``, a list, a tuple or another iterable, as a list."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"it returned {_name(value)}, not a list of {what}")
    taken = list(islice(value, MAX_ITEMS + 1))
    if len(taken) > MAX_ITEMS:
        raise ValueError(f"it returned more than {MAX_ITEMS} {what}")
    return taken


def _pairs(value: Any, what: str, limit: int = MAX_ITEMS) -> list[tuple[str, Any]]:
    """The entries of a mapping, whose keys are text."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is a {_name(value)}, not a mapping")
    taken = [(text(key, f"a key of {what}"), v) for key, v in islice(value.items(), limit + 1)]
    if len(taken) > limit:
        raise ValueError(f"{what} has more than {limit} entries")
    return taken


def plain_tensor(value: Any, what: str) -> Tensor:
    """``value`` as a ``torch.Tensor`` itself, which no code of a plugin computes with, still part
    of its graph. Raises TypeError for one that is not dense, or of a class with operations of its
    own."""
    from torch import Tensor, strided

    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {_name(value)}, not a tensor")
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        advice = ": give its full_tensor()" if hasattr(value, "full_tensor") else ""
        raise TypeError(f"{what} is a {_name(value)}, not a plain tensor{advice}")
    if type(value) is not Tensor:
        value = value.as_subclass(Tensor)
    if value.layout is not strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{what} is a {kind} tensor: give its dense form")
    if value.is_meta:
        raise TypeError(f"{what} is on the meta device, where it has no values")
    return value


# Loading -------------------------------------------------------------------------------------


def provider_specs(value: Any, arguments: Mapping[str, Any]) -> list[ProviderSpec]:
    """a list of ProviderSpec, whose fields are what they say"""
    items = [value] if isinstance(value, ProviderSpec) else _items(value, "ProviderSpec")
    return [_provider_spec(item) for item in items]


def _provider_spec(spec: Any) -> ProviderSpec:
    if not isinstance(spec, ProviderSpec):
        raise TypeError(f"it returned a list with a {_name(spec)}, not a list of ProviderSpec")
    name = _printable(spec.name, "a provider's name")
    kind = _printable(spec.kind, f"the kind of provider {name}")
    what = f"of provider {kind}:{name}"
    factory, config = spec.factory, spec.config
    if isinstance(factory, str):
        factory = _target(factory, f"the factory {what}")
    elif not callable(factory):
        raise TypeError(f"the factory {what} is a {_name(factory)}: give a class or 'module:name'")
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
        requires=_texts(spec.requires, f"requires {what}"),
        conflicts=_texts(spec.conflicts, f"conflicts {what}"),
        config=config,
        section=_path(spec.section, f"the section {what}"),
        default=bool(spec.default),
        files=None if spec.files is None else _texts(spec.files, f"files {what}"),
        reads=None if spec.reads is None else _texts(spec.reads, f"reads {what}"),
    )


def section_specs(value: Any, arguments: Mapping[str, Any]) -> list[SectionSpec]:
    """a list of SectionSpec, whose fields are what they say"""
    return [_section_spec(item) for item in _items(value, "SectionSpec")]


def _section_spec(spec: Any) -> SectionSpec:
    if not isinstance(spec, SectionSpec):
        raise TypeError(f"it returned a list with a {_name(spec)}, not a list of SectionSpec")
    path = _path(spec.path, "the path of a section")
    model = spec.model
    if model is not None:
        model = _model(model, f"the model of section {path!r}")
    if bool(path) != (model is not None):
        raise TypeError(f"section {path!r}: give both a path and a model, or neither")
    params = _texts(spec.schedule_params, f"schedule_params of section {path!r}")
    for name in params:
        if not name.isidentifier():
            raise ValueError(f"the schedule parameter {name!r} is no name")
    for what, function in (("unused", spec.unused), ("check", spec.check)):
        if function is not None and not callable(function):
            raise TypeError(f"{what} of section {path!r} is a {_name(function)}, not a function")
    names = dict(_pairs(spec.names, f"names of section {path!r}"))
    for key, kind in names.items():
        if kind not in KINDS:
            raise ValueError(f"{path}.{key} is to name a provider of the unknown kind {kind!r}")
    return SectionSpec(path, model, params, spec.unused, spec.check, names)


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


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(f"{what} is the text {value!r}, not a list: a comma is missing")
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise TypeError(f"{what} is a {_name(value)}, not a list of text")
    return tuple(text(item, f"an item of {what}") for item in islice(value, MAX_ITEMS))


def _model(value: Any, what: str) -> Any:
    """A class of pydantic's. Without pydantic, which listings do not import, there is none."""
    pydantic = sys.modules.get("pydantic")
    if not isinstance(value, type):
        raise TypeError(f"{what} is a {_name(value)}, not a pydantic model")
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
        raise TypeError(f"a {_name(value)} is no {kind} provider: it has no {', '.join(missing)}()")
    if kind == "tokenizer":
        size = value.vocab_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise TypeError(f"the vocab_size of a {_name(value)} is no number of ids")


def parameter_groups(value: Any, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """a list of mappings with ``params``, which are of the model, and numbers"""
    own = {id(parameter) for parameter in arguments["model"].parameters()}
    return [_parameter_group(group, own) for group in _items(value, "parameter groups")]


def _parameter_group(value: Any, own: set[int]) -> dict[str, Any]:
    group = dict(_pairs(value, "a parameter group"))
    unknown = group.keys() - {"params", "lr_scale", "weight_decay"}
    if unknown:
        raise ValueError(f"a parameter group has the unknown keys {sorted(unknown)}")
    if "params" not in group:
        raise ValueError("a parameter group has no params")
    parameters = _items(group["params"], "parameters")
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
        raise TypeError(f"it returned {_name(value)}, not PluginCosts")
    return PluginCosts(
        averages=_count(value.averages, "averages"),
        forwards=_count(value.forwards, "forwards"),
        passes=_count(value.passes, "passes"),
    )


# Training ------------------------------------------------------------------------------------


def loss_terms(value: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """a mapping of names to 0-d real tensors on the model's device"""
    device = arguments["batch"].targets.device
    return {name: _loss_term(term, device) for name, term in _pairs(value, "what it returned")}


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
    pairs = _pairs(value, "what it returned")
    return {name: number(v, f"the metric {name!r}") for name, v in pairs}


# Checkpoints ---------------------------------------------------------------------------------


def state(value: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """a mapping of JSON values and dense tensors, nested and sized within bounds

    The tensors of the result are copies on the CPU, contiguous, of a type that safetensors takes.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"it returned {_name(value)}, not a mapping")
    plain: dict[str, Any] = _State().plain(value, ())
    return plain


class _State:
    """Takes over one plugin's state, and counts what it is of."""

    def __init__(self) -> None:
        self._values = self._tensors = self._characters = 0

    def plain(self, value: Any, path: tuple[Any, ...]) -> Any:
        """``value``, which stands at ``path``, in plain types. Raises TypeError, ValueError."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise ValueError(f"the state has more than {MAX_VALUES} values")
        if len(path) > MAX_DEPTH:
            raise ValueError(f"the state is nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, int):
            value = int.__int__(value)
            if value.bit_length() > MAX_INT_BITS:
                raise ValueError(f"{_place(path)} is an integer of {value.bit_length()} bits")
            return value
        if isinstance(value, str):
            return self._counted(text(value, _place(path)))
        if isinstance(value, list | tuple):
            return [self.plain(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, Mapping):
            pairs = _pairs(value, _place(path), MAX_VALUES - self._values)
            for key, _ in pairs:
                if self._counted(key) == TENSOR_KEY:
                    raise TypeError(f"{_place(path)} has a key that cannot be saved: {key!r}")
            return {key: self.plain(item, (*path, key)) for key, item in pairs}
        return self._tensor(value, _place(path))

    def _counted(self, value: str) -> str:
        self._characters += len(value)
        if self._characters > MAX_TEXT:
            raise ValueError(f"the state has more than {MAX_TEXT} characters of text")
        return value

    def _tensor(self, value: Any, what: str) -> Tensor:
        import torch

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{what} is a {_name(value)}: neither JSON nor a tensor")
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise ValueError(f"the state has more than {MAX_TENSORS} tensors")
        tensor = plain_tensor(value, what).detach()
        if not _can_be_saved(tensor.dtype):
            raise TypeError(f"{what} is of type {tensor.dtype}, which no checkpoint takes")
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > max(held, MAX_EXPANDED):
            raise ValueError(f"{what} is expanded from {held} bytes: give what it is expanded from")
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _place(path: tuple[Any, ...]) -> str:
    """What a message calls the entry at ``path``: no more than a line."""
    shown = ".".join(map(str, path))
    return f"state {shown[:60]!r}" if path else "the state"


@functools.cache
def _can_be_saved(dtype: torch.dtype) -> bool:
    """Does safetensors write and read it?"""
    import torch
    from safetensors.torch import load, save

    try:
        load(save({"tensor": torch.empty(1, dtype=dtype, device="cpu")}))
    except (KeyError, TypeError, ValueError, RuntimeError):
        return False
    return True


# Generation ----------------------------------------------------------------------------------


def prompt(value: Any, arguments: Mapping[str, Any]) -> str:
    """text that can be encoded"""
    if not isinstance(value, str):
        raise TypeError(f"it returned {_name(value)}, not str")
    checked = text(value, "the prompt")
    if len(checked) > MAX_TEXT:
        raise ValueError(f"the prompt has more than {MAX_TEXT} characters")
    return checked


def functions(value: Any, arguments: Mapping[str, Any]) -> list[Callable[..., Any]]:
    """a list of callables"""
    taken = [value] if callable(value) else _items(value, "functions")
    for function in taken:
        if not callable(function):
            raise TypeError(f"a logits processor is a {_name(function)}, not a function")
    return taken


def decoder(value: Any, arguments: Mapping[str, Any]) -> Any:
    """an object with a method ``choose``"""
    if not callable(getattr(value, "choose", None)):
        raise TypeError(f"a {_name(value)} is no decoder: it has no choose()")
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
