"""What a hook returns is judged where it is called: hook by kind of value by outcome, as data."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from apt_core import PluginCosts, ProviderSpec, SectionSpec, hook_returns, hookimpl
from apt_core.hook_returns import MAX_DEPTH, TENSOR_KEY
from apt_core.inspection import hook_facts, hook_names
from apt_core.plugin_manager import PluginManager
from apt_core.testing import TinyRun, tiny_run
from apt_core.training import checkpoint
from apt_core.types import GenerationRequest

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


# The calls -------------------------------------------------------------------------------------

MODEL = nn.Linear(2, 2)
OUTPUT = SimpleNamespace(logits=torch.zeros(1, 2, 3))
NORM = ProviderSpec("norm", "mine", Builds)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "apt_register_providers": {},
    "apt_register_config": {},
    "apt_build_provider": {"spec": NORM, "config": None},
    "apt_param_groups": {"model": MODEL},
    "apt_costs": {"config": None},
    "apt_loss_terms": {"trainer": None, "batch": None, "output": OUTPUT},
    "apt_metrics": {"trainer": None},
    "apt_state_dict": {"trainer": None},
    "apt_rewrite_prompt": {"request": GenerationRequest("x")},
    "apt_logits_processors": {"request": GenerationRequest("x")},
    "apt_decoder": {"request": GenerationRequest("x")},
}
"""Hooks whose result is looked at where they are called, and a call of each."""


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
        "bytes": (b"x", "bytes, not str"),
        "half a letter": ("caf\udce9", "surrogates"),
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

RIGHT: dict[str, list[tuple[Any, Any]]] = {
    "apt_register_providers": [(spec(requires=["a"])[0], spec(requires=("a",)))],
    "apt_register_config": [
        (iter(section("a.b", Settings, schedule_params=["x"])),
         section("a.b", Settings, schedule_params=("x",))),
    ],
    "apt_param_groups": [
        ([OrderedDict(params=iter([MODEL.weight]), lr_scale=Whole(2))], group(lr_scale=2.0)),
    ],
    "apt_loss_terms": [({"a": GRAPH}, {"a": GRAPH})],
    "apt_metrics": [
        (UserDict(a=True, b=Flowing(0.5), c=torch.tensor(2.0, requires_grad=True)),
         {"a": 1.0, "b": 0.5, "c": 2.0}),
    ],
    "apt_state_dict": [
        ({Loud("a"): (Whole(3), Flowing(0.5), None, True), "b": UserDict(c=Loud("d"))},
         {"a": [3, 0.5, None, True], "b": {"c": "d"}}),
    ],
    "apt_rewrite_prompt": [(Loud("text"), "text")],
    "apt_logits_processors": [(print, [print]), ((print,), [print])],
}  # fmt: skip
"""By hook, a result and what is made of it."""


class Plugin:
    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            marked = function if hasattr(function, "apt_impl") else hookimpl(function)
            setattr(self, name, marked)


def returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def wrapping(value: Any) -> Any:
    def function() -> Any:
        yield
        return value

    return hookimpl(wrapper=True)(function)


def outcome(manager: PluginManager, hook: str, way: str) -> Any:
    """The plugin's result of the hook, called in one of the ways that there are, or None."""
    arguments = ARGUMENTS[hook]
    first = getattr(manager.hook, hook).spec.opts["firstresult"]
    if way == "plugin":
        return manager.call_plugin("mine", hook, **arguments)
    if way == "chain":
        request = manager.chain(hook, arguments["request"], "prompt")
        return request.prompt if request.prompt != arguments["request"].prompt else None
    if way == "hook":
        found = getattr(manager.hook, hook)(**arguments)
        return found if first else (found or [None])[0]
    if first:
        answer = manager.call_first(hook, **arguments)
        return answer and answer[1]
    return (manager.call_each(hook, **arguments) or [("", None)])[0][1]


def ways(hook: str) -> list[str]:
    return ["hook", "each", "plugin", *["chain"] * (hook == "apt_rewrite_prompt")]


CASES = [(hook, label, *case) for hook, cases in WRONG.items() for label, case in cases.items()]


@pytest.mark.parametrize(("hook", "label", "value", "said"), CASES,
                         ids=[f"{hook}: {label}" for hook, label, _, _ in CASES])  # fmt: skip
def test_a_wrong_result_is_a_failure_where_the_hook_is_called(
    hook: str, label: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("MAX_ITEMS", "MAX_VALUES"):
        monkeypatch.setattr(hook_returns, limit, 1000)
    once = isinstance(value, Iterator) and not isinstance(value, itertools.repeat)
    for way in ways(hook)[: 1 if once else None]:
        manager = PluginManager()
        manager.register(Plugin(**{hook: returning(value)}), "mine")
        assert outcome(manager, hook, way) is None
        (failure,) = manager.records["mine"].failures
        assert said in failure.error and failure.hook == hook, failure.error
        assert f"{Path(__file__).name}:" in failure.where
    # A wrapper's result is its own, whatever the others have returned.
    if once or hook == "apt_rewrite_prompt":
        return
    manager = PluginManager()
    result = value if manager._specs()[hook].opts["firstresult"] else [value]
    manager.register(Plugin(**{hook: wrapping(result)}), "mine")
    assert outcome(manager, hook, "each") is None
    (failure,) = manager.records["mine"].failures
    assert said in failure.error, failure.error


RIGHT_CASES = [(hook, *case) for hook, cases in RIGHT.items() for case in cases]


@pytest.mark.parametrize(("hook", "value", "made"), RIGHT_CASES,
                         ids=[f"{case[0]}-{n}" for n, case in enumerate(RIGHT_CASES)])  # fmt: skip
def test_a_result_is_taken_as_plain_types(hook: str, value: Any, made: Any) -> None:
    manager = PluginManager(strict=True)
    manager.register(Plugin(**{hook: returning(value)}), "mine")
    found = outcome(manager, hook, "hook")
    assert found == made and type(found) is type(made)
    for item, expected in zip(leaves(found), leaves(made), strict=True):
        assert type(item) is type(expected)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_every_hook_whose_result_is_looked_at_has_its_cases() -> None:
    manager = PluginManager()
    ignored = {"no result: what is returned is not looked at"}
    looked_at = {h for h in hook_names(manager) if hook_facts(manager, h)["returns"] not in ignored}
    assert looked_at - {"apt_transform_model"} == set(ARGUMENTS) == set(WRONG)
    judging = {h for h in hook_names(manager) if hook_facts(manager, h)["judges_input"]}
    assert judging == {"apt_configure", "apt_transform_model"}
    fatal = {h for h in hook_names(manager) if hook_facts(manager, h)["fatal_among_processes"]}
    assert fatal == {"apt_loss_terms"}


def test_tensors_of_a_state_are_copies_that_can_be_saved() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    given = {
        "transposed": base.T,
        "grown": torch.ones(1).expand(3),
        "graph": nn.Parameter(torch.ones(2)) * 2,
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "foreign": foreign(torch.ones(2)),
    }
    manager = PluginManager(strict=True)
    manager.register(Plugin(apt_state_dict=lambda: given), "mine")
    state = manager.call_plugin("mine", "apt_state_dict", trainer=None)
    tensors: dict[str, Tensor] = {}
    plain = checkpoint.split_tensors(state, "mine", tensors)
    assert json.loads(json.dumps(plain)) == plain and len(tensors) == len(given)
    base.zero_()
    assert state["transposed"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert state["negated"].tolist() == [-2.0]
    for tensor in tensors.values():
        assert type(tensor) is Tensor and tensor.is_contiguous() and not tensor.requires_grad


def test_a_term_of_a_class_of_ones_own_stays_in_its_graph() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    manager = PluginManager(strict=True)
    manager.register(Plugin(apt_loss_terms=lambda: {"a": foreign(weight * 3)}), "mine")
    del Foreign.__torch_function__
    ((_, terms),) = manager.call_each("apt_loss_terms", **ARGUMENTS["apt_loss_terms"])
    assert type(terms["a"]) is Tensor


def test_a_wrapper_edits_copies() -> None:
    def edits() -> Iterator[None]:
        results: Any = yield
        results[0]["a"] = object()

    manager = PluginManager()
    manager.register(Plugin(apt_metrics=lambda: {"a": 1.0}), "mine")
    manager.register(Plugin(apt_metrics=hookimpl(wrapper=True)(edits)), "wraps")
    assert manager.call_each("apt_metrics", trainer=None) == [("mine", {"a": 1.0})]
    assert manager.records["wraps"].failures == []


# In a run --------------------------------------------------------------------------------------


def tiny(*plugins: Any, output: Path, strict: bool = False, **overrides: Any) -> TinyRun:
    keys = {"training.save_every_steps": 2, "training.keep_last": 0, "model.dropout": 0.1}
    return tiny_run(
        *plugins,
        steps=6,
        strict=strict,
        output=output,
        overrides=keys | {key.replace("__", "."): value for key, value in overrides.items()},
    )


LEFT_OUT = ("apt_metrics", "apt_state_dict", "apt_rewrite_prompt", "apt_logits_processors",
            "apt_decoder", "apt_loss_terms", "apt_param_groups")  # fmt: skip
"""Hooks without whose results a run is what it is without the plugin."""


def test_wrong_results_leave_the_run_as_it_is_without_them(tmp_path: Path) -> None:
    quiet = tiny(output=tmp_path / "quiet")
    wrong = [
        type(f"Wrong{number}", (Plugin,), {})(**{hook: returning(value)})
        for number, (hook, value) in enumerate(
            (hook, value)
            for hook in LEFT_OUT
            for value, _ in WRONG[hook].values()
            if not isinstance(value, Iterator)
        )
    ]
    run = tiny(*wrong, output=tmp_path / "wrong")
    assert run.same_weights(quiet)
    assert run.result.sample == quiet.result.sample
    for record in run.manager.records.values():
        assert record.failures, record.name
    found, expected = (
        checkpoint.list_checkpoints(tmp_path / name / "checkpoints") for name in ("wrong", "quiet")
    )
    assert [path.name for path in found] == [path.name for path in expected] and len(found) == 3
    for one, other in zip(found, expected, strict=True):
        checkpoint.load(one)
        for part in ("model", "optimizer"):
            name = f"{part}.safetensors"
            assert (one / name).read_bytes() == (other / name).read_bytes()
