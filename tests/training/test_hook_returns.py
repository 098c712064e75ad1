"""What a hook returns is judged where it is called: hook by kind of value by outcome, as data."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_values import (
    GRAPH,
    MODEL,
    NORM,
    WRONG,
    Flowing,
    Foreign,
    Loud,
    Settings,
    Whole,
    foreign,
    group,
    section,
    spec,
)
from torch import Tensor, nn

from apt_core import hook_returns, hookimpl, plain_values, plugin_state
from apt_core.hookspecs import POLICIES, hooks_where
from apt_core.markers import ignored
from apt_core.plugin_manager import PluginManager
from apt_core.runs import checkpoint
from apt_core.testing import TinyRun, tiny_run
from apt_core.types import GenerationRequest, Message, RewrittenPrompt, Source, TrainableStage

# The calls --------------------------------------------------------------------------------------

BATCH = SimpleNamespace(targets=torch.zeros(1, 2))

ARGUMENTS: dict[str, dict[str, Any]] = {
    "apt_register_providers": {},
    "apt_register_config": {},
    "apt_build_provider": {"spec": NORM, "config": None},
    "apt_param_groups": {"model": MODEL},
    "apt_trainable": {"config": None},
    "apt_costs": {"config": None},
    "apt_loss_terms": {"trainer": None, "batch": BATCH, "output": None},
    "apt_metrics": {"trainer": None},
    "apt_state_dict": {"trainer": None},
    "apt_rewrite_prompt": {"request": GenerationRequest("x"), "session": None},
    "apt_logits_processors": {"request": GenerationRequest("x"), "session": None},
    "apt_decoder": {"request": GenerationRequest("x"), "session": None},
}
"""Hooks whose result is looked at where they are called, and a call of each."""

RIGHT: dict[str, list[tuple[Any, Any]]] = {
    "apt_register_providers": [(spec(requires=["a"])[0], spec(requires=("a",)))],
    "apt_register_config": [
        (iter(section("a.b", Settings, schedule_params=["x"], names=UserDict(k="norm"))),
         section("a.b", Settings, schedule_params=("x",), names={"k": "norm"})),
    ],
    "apt_trainable": [
        (iter([TrainableStage(["a"], iter(["b"]), "epoch", Whole(2))]),
         [TrainableStage(("a",), ("b",), "epoch", 2)]),
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
    "apt_rewrite_prompt": [
        (Loud("text"), "text"),
        ([Message("user", Loud("text"))], (Message("user", "text"),)),
        (RewrittenPrompt(Loud("text"), [Source("a.md", Whole(3), "b", Flowing(0.5))]),
         RewrittenPrompt("text", (Source("a.md", 3, "b", 0.5),))),
    ],
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
    first = POLICIES[hook].firstresult
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
    return ["hook", "each", "plugin", *["chain"] * POLICIES[hook].chained]


CASES = [(hook, label, *case) for hook, cases in WRONG.items() for label, case in cases.items()]


@pytest.mark.parametrize(("hook", "label", "value", "said"), CASES,
                         ids=[f"{hook}: {label}" for hook, label, _, _ in CASES])  # fmt: skip
def test_a_wrong_result_is_a_failure_where_the_hook_is_called(
    hook: str, label: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_values, "MAX_ITEMS", 1000)
    monkeypatch.setattr(plugin_state, "MAX_VALUES", 1000)
    once = isinstance(value, Iterator) and not isinstance(value, itertools.repeat)
    for way in ways(hook)[: 1 if once else None]:
        manager = PluginManager()
        manager.register(Plugin(**{hook: returning(value)}), "mine")
        assert outcome(manager, hook, way) is None
        (failure,) = manager.records["mine"].failures
        assert said in failure.error and failure.hook == hook, failure.error
        assert f"{Path(__file__).name}:" in failure.where
    # A wrapper's result is its own, whatever the others have returned.
    manager = PluginManager()
    if once or POLICIES[hook].chained or POLICIES[hook].alone:
        return
    result = value if POLICIES[hook].firstresult else [value]
    manager.register(Plugin(**{hook: wrapping(result)}), "mine")
    assert outcome(manager, hook, "each") is None
    (failure,) = manager.records["mine"].failures
    assert said in failure.error, failure.error


RIGHT_CASES = [(hook, *case) for hook, cases in RIGHT.items() for case in cases]


@pytest.mark.filterwarnings("error")
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
    looked_at = hooks_where(lambda policy: policy.returns not in (ignored, hook_returns.anything))
    assert set(looked_at) == set(ARGUMENTS) == set(WRONG)


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


@pytest.mark.long
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
