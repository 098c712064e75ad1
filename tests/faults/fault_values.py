"""Values that no hook accepts, by hook: what the tests of results and the fault matrix return."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from apt_core import (
    Message,
    PluginCosts,
    ProviderSpec,
    RewrittenPrompt,
    SectionSpec,
    TrainableStage,
)
from apt_core.plugin_state import MAX_DEPTH, TENSOR_KEY

# Values that pretend, refuse or never end ------------------------------------------------------


class Refusing(dict[str, Any]):
    """A mapping that is one until it is read."""

    def items(self) -> Any:
        raise LookupError("no items")

    def __iter__(self) -> Any:
        raise LookupError("no keys")


class Crooked(UserDict[str, Any]):
    """Its entries are no pairs."""

    def items(self) -> Any:
        return [1, 2]


class Endless(Mapping[str, Any]):
    def __getitem__(self, key: str) -> float:
        return 0.0

    def __iter__(self) -> Iterator[str]:
        return (str(n) for n in itertools.count())

    def __len__(self) -> int:
        return 1


class Pretending:
    """Says that it is text."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        return str


class Loud(str):
    def __str__(self) -> str:
        raise LookupError("no text")

    __format__ = None  # type: ignore[assignment]


class Whole(int):
    def __repr__(self) -> str:
        raise LookupError("no digits")


class Flowing(float):
    def __repr__(self) -> str:
        raise LookupError("no digits")


class Foreign(Tensor):
    """A tensor whose operations are its own."""

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise LookupError(f"no {function}")


class Wrapped(Tensor):
    """A tensor whose operations are its own, beneath autograd."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise LookupError(f"no {function}")


def foreign(value: Tensor) -> Tensor:
    return torch.Tensor._make_subclass(Foreign, value)


def wrapped(value: Tensor) -> Tensor:
    return torch.Tensor._make_subclass(Wrapped, value)


def raising(error: BaseException) -> Iterator[Any]:
    yield from ()
    raise error


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"in": value}
    return value


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def shared(levels: int) -> Any:
    """A list of 2 ** levels values that takes little memory."""
    value: Any = [1]
    for _ in range(levels):
        value = [value, value]
    return value


class Settings(BaseModel):
    x: int = 1


@dataclass
class NoModel:
    x: int = 1


class Builds:
    def __init__(self, config: Any) -> None: ...

    def create_layer(self, d_model: int) -> nn.Module:
        return nn.Identity()


# By hook ----------------------------------------------------------------------------------------

MODEL = nn.Linear(2, 2)
NORM = ProviderSpec("norm", "mine", Builds)


def spec(**fields: Any) -> list[ProviderSpec]:
    return [ProviderSpec(**{"kind": "norm", "name": "mine", "factory": Builds, **fields})]


def section(*args: Any, **fields: Any) -> list[SectionSpec]:
    return [SectionSpec(*args, **fields)]


def group(**settings: Any) -> list[dict[str, Any]]:
    return [{"params": [MODEL.weight], **settings}]


TERM = torch.tensor(0.5, requires_grad=True)
GRAPH = TERM * 2
JAGGED = torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)

WRONG: dict[str, dict[str, tuple[Any, str]]] = {
    "apt_register_providers": {
        "a name": ("norm", "str, not a list"),
        "a list of names": (["norm"], "a list with a str"),
        "a mapping": ({"norm": Builds}, "dict, not a list"),
        "a generator that raises": (raising(LookupError("half")), "LookupError: half"),
        "an endless list": (itertools.repeat(NORM), "more than"),
        "a name that is a number": (spec(name=5), "a provider's name is a int"),
        "a name that pretends": (spec(name=Pretending()), "TypeError"),
        "an empty name": (spec(name=""), "not a name"),
        "a name with escapes": (spec(name="\x1b[2Jx"), "not a name"),
        "a name with half a letter": (spec(name="\udce9"), "surrogates"),
        "a kind that has no hash": (spec(kind=[]), "the kind of provider mine is a list"),
        "a factory that is nothing": (spec(factory=None), "the factory of provider norm:mine"),
        "a factory without a name": (spec(factory="a.b"), "not 'module:attribute'"),
        "requires as text": (spec(requires="torch"), "a comma is missing"),
        "requires of numbers": (spec(requires=[1]), "a int, not text"),
        "a config that is no model": (spec(config=NoModel), "no pydantic model"),
        "a config that is an instance": (spec(config=Settings()), "not a pydantic model"),
        "a version that is a number": (spec(version=1.0), "the version of provider norm:mine"),
        "a section that is a list": (spec(section=["model"]), "the section of provider"),
    },
    "apt_register_config": {
        "a class": (Settings, "not a list"),
        "a dataclass for a model": (section("mine", NoModel), "no pydantic model"),
        "an instance for a model": (section("mine", Settings()), "not a pydantic model"),
        "a path without a model": (section("mine"), "both a path and a model"),
        "a path that is a number": (section(3, Settings), "a int, not text"),
        "a path with a gap": (section("a..b", Settings), "not a path of keys"),
        "parameters as text": (section(schedule_params=("rate")), "a comma is missing"),
        "a parameter that is no name": (section(schedule_params=["a b"]), "no name"),
        "a list of naming keys": (section("mine", Settings, names=["norm"]), "not a mapping"),
        "a key of no kind": (section("mine", Settings, names={"a": "nrom"}), "unknown kind 'nrom'"),
    },
    "apt_build_provider": {
        "a name": ("rmsnorm", "a str is no norm provider: it has no create_layer()"),
        "nothing of use": (object(), "no create_layer()"),
        "an attribute for a method": (SimpleNamespace(create_layer=3), "no create_layer()"),
        "a class": (Builds, "the class Builds is no norm provider"),
    },
    "apt_param_groups": {
        "a group alone": (group()[0], "dict, not a list"),
        "tensors": ([MODEL.weight], "not a mapping"),
        "no params": ([{"lr_scale": 1.0}], "has no params"),
        "an unknown key": (group(lr=0.1), "unknown keys ['lr']"),
        "another model's": ([{"params": [nn.Parameter(torch.ones(1))]}], "no parameters of"),
        "one tensor for a list": ([{"params": MODEL.weight}], "no parameters of the model"),
        "a group that refuses": ([Refusing()], "LookupError: no items"),
        **{
            f"{key} {label}": (group(**{key: value}), f"{key} is {shown}")
            for key in ("lr_scale", "weight_decay")
            for label, value, shown in (
                ("NaN", float("nan"), "nan"),
                ("infinite", float("inf"), "inf"),
                ("negative", -1e-3, "-0.001"),
                ("huge", 1e30, "1e+30"),
                ("too large for a float", 10**400, "larger than any float"),
                ("as text", "0.1", "a str, not a number"),
                ("None", None, "a NoneType, not a number"),
            )
        },
    },
    "apt_trainable": {
        "a stage": (TrainableStage(["embedding"]), "TrainableStage, not a list"),
        "patterns": (["embedding"], "a list with a str"),
        "one pattern for a list": ([TrainableStage(freeze="embedding")], "freeze"),
        "a pattern that is a number": ([TrainableStage(thaw=[0])], "a int, not text"),
        "an empty pattern": ([TrainableStage(thaw=[""])], "is '', not a name"),
        "another unit": (
            [TrainableStage(unit="day")],  # type: ignore[arg-type]
            "'day', not one of epoch",
        ),
        "before the first step": ([TrainableStage(at=0)], "at step 0: the first one"),
        "half a step": ([TrainableStage(at=1.5)], "a float, not an integer"),  # type: ignore[arg-type]
        "without end": ([TrainableStage(at=10**400)], "that no run comes to"),
    },
    "apt_costs": {
        "a number": (3, "int, not PluginCosts"),
        "text in it": (PluginCosts(averages="1"), "averages is a str"),  # type: ignore[arg-type]
        "less than nothing": (PluginCosts(forwards=-1), "forwards is not a number from 0"),
        "without end": (PluginCosts(passes=10**400), "passes is not a number from 0"),
    },
    "apt_loss_terms": {
        "a tensor": (TERM, "Tensor, not a mapping"),
        "a mapping that refuses": (Refusing(a=1), "LookupError: no items"),
        "entries that are no pairs": (Crooked(a=1), "TypeError"),
        "a number": ({"a": 0.5}, "a float, not a tensor"),
        "a name that is a number": ({1: TERM}, "a key of what it returned is a int"),
        "an integer": ({"a": torch.tensor(1)}, "torch.int64, not a real floating type"),
        "complex": ({"a": torch.tensor(1j)}, "torch.complex64, not a real"),
        "eight bits": ({"a": torch.tensor(1.0).to(torch.float8_e4m3fn)}, "not a real floating"),
        "a vector": ({"a": torch.ones(2)}, "reduce it to 0-d"),
        "sparse": ({"a": torch.tensor(1.0).to_sparse()}, "sparse_coo tensor"),
        "on no device": ({"a": torch.tensor(1.0, device="meta")}, "meta device"),
        "beneath autograd": ({"a": wrapped(torch.tensor(1.0))}, "not a plain tensor"),
    },
    "apt_metrics": {
        "a list": ([1.0], "list, not a mapping"),
        "a mapping that refuses": (Refusing(a=1), "LookupError: no items"),
        "without end": (Endless(), "more than"),
        "text": ({"a": "1.5"}, "the metric 'a' is a str, not a number"),
        "too large": ({"a": 256**200}, "the metric 'a' is larger than any float"),
        "a vector": ({"a": torch.ones(2)}, "Error: "),
        "on no device": ({"a": torch.tensor(1.0, device="meta")}, "RuntimeError"),
        "half a letter": ({"\ud800": 1.0}, "surrogates"),
        "a name that is a number": ({1: 2.0}, "a key of what it returned is a int"),
    },
    "apt_state_dict": {
        "a list": ([1], "list, not a mapping"),
        "a mapping that refuses": ({"a": Refusing(b=1)}, "LookupError: no items"),
        "a large integer": ({"a": 7**6000}, "state 'a' is an integer of 16845 bits"),
        "an object": ({"a": {"b": object()}}, "state 'a.b' is a object"),
        "half a letter": ({"a": ["\udce9"]}, "surrogates"),
        "a name that is a number": ({1: 2}, "a key of the state is a int"),
        "our own key": ({TENSOR_KEY: "x"}, "cannot be saved"),
        "deep": (nested(MAX_DEPTH + 2), "nested more than"),
        "within itself": (cyclic(), "nested more than"),
        "many": ({"a": shared(21)}, "more than 1000 values"),
        "without end": (Endless(), "more than"),
        "sparse": ({"a": torch.eye(4).to_sparse()}, "state 'a' is a torch.sparse_coo tensor"),
        "nested tensors": ({"a": JAGGED}, "not a plain tensor"),
        "complex": ({"a": torch.ones(1, dtype=torch.complex128)}, "torch.complex128, which no"),
        "on no device": ({"a": torch.ones(1, device="meta")}, "meta device"),
        "expanded": ({"a": torch.ones(1).expand(2**40)}, "expanded from 4 bytes"),
        "beneath autograd": ({"a": wrapped(torch.ones(1))}, "not a plain tensor"),
    },
    "apt_rewrite_prompt": {
        "bytes": (b"x", "bytes, not text"),
        "half a letter": ("caf\udce9", "surrogates"),
        "half a letter of a message": ([Message("user", "caf\udce9")], "surrogates"),
        "texts": (["a"], "a str, not of Message"),
        "a source that is none": (RewrittenPrompt("a", ["b.md"]), "a str, not a Source"),
        "what pretends": (Pretending(), "TypeError"),
    },
    "apt_logits_processors": {
        "a name": ("argmax", "str, not a list of functions"),
        "a list of names": (["argmax"], "a str, not a function"),
        "an endless list": (itertools.repeat(print), "more than"),
    },
    "apt_decoder": {
        "a name": ("greedy", "a str is no decoder: it has no choose()"),
        "an attribute for a method": (SimpleNamespace(choose=3), "no decoder"),
    },
}
"""By hook and name of the case, a result and a part of what is said of it."""
