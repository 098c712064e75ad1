"""What a plugin does wrong is caught at that call, named, counted, and costs the others nothing."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apt_core import ConfigError, GenerationRequest, PluginFailure, StopTraining, hookimpl
from apt_core.discovery import load
from apt_core.errors import PluginError, Problem
from apt_core.hookspecs import hooks_where
from apt_core.plugin_manager import PluginManager

wrapper = hookimpl(wrapper=True)
PASSING = [StopTraining("enough"), KeyboardInterrupt()]


class Answer(str):
    """A decoder, as far as the kernel looks at it."""

    def choose(self) -> None: ...


def first(*_: Any) -> None:
    """A logits processor."""


def second(*_: Any) -> None:
    """Another one."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class Exiting(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def raising(error: BaseException) -> Callable[[], Any]:
    def function() -> Any:
        raise error

    return function


def fail() -> Any:
    raise ValueError("broken")


def empty() -> dict[str, float]:
    return {}


def metrics(manager: PluginManager) -> Any:
    return manager.hook.apt_metrics(trainer=None)


def decoder(manager: PluginManager) -> Any:
    return manager.hook.apt_decoder(request=None, session=None)


def failures(manager: PluginManager, plugin: str = "bad") -> list[PluginFailure]:
    return manager.records[plugin].failures


# Implementations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("broken\nin two lines"), "ValueError: broken"),
        (SystemExit(3), "SystemExit: 3"),
        (AssertionError(), "AssertionError"),
        (Unprintable(), "Unprintable: (its message cannot be printed)"),
        (Exiting(), "Exiting: (its message cannot be printed)"),
        (StopIteration("early"), "StopIteration: early"),
        (GeneratorExit(), "GeneratorExit"),
        (PluginError("its own", plugin="x", hook="y"), "PluginError: its own"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (
            BaseExceptionGroup("two", [ValueError(), SystemExit()]),
            "BaseExceptionGroup: two (2 sub-exceptions)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_hook_raises_is_a_failure_and_the_others_answer(
    manager: PluginManager, plugin_of: type, error: BaseException, shown: str
) -> None:
    manager.register(plugin_of(apt_metrics=lambda: {"a": 1}), "a")
    manager.register(plugin_of(apt_metrics=raising(error)), "bad")
    manager.register(plugin_of(apt_metrics=lambda: {"c": 3}), "c")
    manager.step = 7
    assert metrics(manager) == [{"a": 1}, {"c": 3}]
    (failure,) = failures(manager)
    assert (failure.plugin, failure.hook, failure.step, failure.error) == (
        "bad",
        "apt_metrics",
        7,
        shown,
    )
    assert (failure.count, failure.quarantined) == (1, False)
    assert type(error).__name__ in failure.traceback


def test_a_list_hook_skips_none(manager: PluginManager, plugin_of: type) -> None:
    manager.register(plugin_of(apt_metrics=lambda: None), "a")
    manager.register(plugin_of(apt_metrics=empty), "b")
    assert metrics(manager) == [{}]


def test_a_first_result_hook_falls_through_a_failure(
    manager: PluginManager, plugin_of: type
) -> None:
    manager.register(plugin_of(apt_decoder=fail), "a")
    manager.register(plugin_of(apt_decoder=lambda: None), "b")
    manager.register(plugin_of(apt_decoder=lambda: Answer("c answers")), "c")
    manager.register(plugin_of(apt_decoder=lambda: pytest.fail("asked after an answer")), "d")
    assert decoder(manager) == "c answers"
    assert manager.call_first("apt_decoder", request=None, session=None) == ("c", "c answers")
    assert len(failures(manager, "a")) == 2


def test_a_hook_that_nobody_answers(manager: PluginManager, plugin_of: type) -> None:
    assert (metrics(manager), decoder(manager)) == ([], None)
    manager.register(plugin_of(apt_metrics=fail, apt_decoder=fail), "bad")
    assert (metrics(manager), decoder(manager)) == ([], None)
    assert manager.call_each("apt_metrics", trainer=None) == []
    assert manager.call_first("apt_decoder", request=None, session=None) is None


def test_an_implementation_takes_only_the_parameters_that_it_wants(
    manager: PluginManager, plugin_of: type
) -> None:
    seen: list[Any] = []

    def on_step_end(trainer: Any, step: int) -> None:
        seen.append((trainer, step))

    manager.register(plugin_of(on_step_end=on_step_end), "mine")
    manager.hook.on_step_end(step=3, loss=0.5, trainer="the trainer")
    assert seen == [("the trainer", 3)]


def test_a_parameter_that_the_caller_left_out_is_no_failure_of_the_plugin(
    manager: PluginManager, plugin_of: type
) -> None:
    manager.register(plugin_of(on_epoch_start=lambda epoch: None), "mine")
    with pytest.warns(UserWarning, match="epoch"), pytest.raises(KeyError, match="epoch"):
        manager.hook.on_epoch_start(trainer=None)
    assert failures(manager, "mine") == []


def test_generator_results_are_read_inside_the_guard(
    manager: PluginManager, plugin_of: type
) -> None:
    def good() -> Generator[Callable[..., None]]:
        yield from (first, second)

    def bad() -> Generator[Callable[..., None]]:
        yield first
        raise ValueError("half way")

    manager.register(plugin_of(apt_logits_processors=good), "a")
    manager.register(plugin_of(apt_logits_processors=bad), "bad")
    both = [first, second]
    assert manager.hook.apt_logits_processors(request=None, session=None) == [both]
    assert manager.call_plugin("a", "apt_logits_processors", request=None, session=None) == both
    assert failures(manager)[0].error == "ValueError: half way"


@pytest.mark.parametrize("error", PASSING, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("through", ["hook", "call_each", "call_plugin", "generator", "setup"])
def test_what_ends_the_run_passes_and_is_no_failure(
    manager: PluginManager, plugin_of: type, error: BaseException, through: str
) -> None:
    def generator() -> Generator[Callable[..., None]]:
        yield first
        raise error

    setup = wrapper(generator_that(raise_first=error))
    function = setup if through == "setup" else raising(error)
    manager.register(plugin_of(apt_metrics=function, apt_logits_processors=generator), "ends")
    calls = {
        "generator": lambda: manager.hook.apt_logits_processors(request=None, session=None),
        "call_each": lambda: manager.call_each("apt_metrics", trainer=None),
        "call_plugin": lambda: manager.call_plugin("ends", "apt_metrics", trainer=None),
    }
    with pytest.raises(type(error)) as caught:
        calls.get(through, lambda: metrics(manager))()
    assert caught.value is error
    assert failures(manager, "ends") == []


# Wrappers ------------------------------------------------------------------------------------


def generator_that(
    *,
    raise_first: BaseException | None = None,
    raise_last: BaseException | None = None,
    returns: Any = None,
    seen: list[Any] | None = None,
) -> Callable[[], Generator[None, Any, Any]]:
    def function() -> Generator[None, Any, Any]:
        if raise_first is not None:
            raise raise_first
        try:
            result = yield
            if seen is not None:
                seen.append(result)
        except BaseException as inner:
            if seen is not None:
                seen.append(inner)
            raise
        if raise_last is not None:
            raise raise_last
        return returns

    return function


def never_yields() -> Generator[None, Any, Any]:
    return
    yield


def yields_twice() -> Generator[None, Any, Any]:
    yield
    yield


def does_not_end() -> Generator[None, Any, Any]:
    yield
    try:
        yield
    except GeneratorExit:
        yield


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (generator_that(raise_first=ValueError("setup")), "ValueError: setup"),
        (generator_that(raise_first=SystemExit(1)), "SystemExit: 1"),
        (never_yields, "RuntimeError: the wrapper did not yield"),
        (generator_that(raise_last=ValueError("teardown")), "ValueError: teardown"),
        (generator_that(raise_last=SystemExit(1)), "SystemExit: 1"),
        (yields_twice, "RuntimeError: the wrapper yielded more than once"),
        (does_not_end, "RuntimeError: generator ignored GeneratorExit"),
        (generator_that(returns="no list"), "TypeError: the wrapper returned str, not a list"),
    ],
)
def test_a_wrapper_that_fails_leaves_the_result_as_it_was(
    manager: PluginManager, plugin_of: type, function: Any, shown: str
) -> None:
    outer: list[Any] = []
    manager.register(plugin_of(apt_metrics=lambda: {"a": 1}), "inner")
    manager.register(plugin_of(apt_metrics=wrapper(function)), "bad")
    manager.register(plugin_of(apt_metrics=wrapper(generator_that(seen=outer))), "a_outer")
    assert metrics(manager) == [{"a": 1}]
    assert outer == [[{"a": 1}]]
    (failure,) = failures(manager)
    assert failure.error == shown
    assert failure.where.startswith(f"{__file__}:")


def test_a_wrapper_sees_the_result_and_may_replace_it(
    manager: PluginManager, plugin_of: type
) -> None:
    seen: list[Any] = []
    manager.register(plugin_of(apt_metrics=empty, apt_decoder=lambda: Answer("inner")), "inner")
    manager.register(
        plugin_of(
            apt_metrics=wrapper(generator_that(returns=[{"outer": 1}], seen=seen)),
            apt_decoder=wrapper(generator_that(returns=Answer("outer"), seen=seen)),
        ),
        "outer",
    )
    assert (metrics(manager), decoder(manager)) == ([{"outer": 1}], "outer")
    assert seen == [[{}], "inner"]


def test_a_wrapper_that_returns_nothing_changes_nothing_even_if_it_edits_the_list(
    manager: PluginManager, plugin_of: type
) -> None:
    @wrapper
    def edits() -> Generator[None, list[Any], None]:
        results = yield
        results.append({"smuggled": 1})

    manager.register(plugin_of(apt_metrics=edits), "outer")
    manager.register(plugin_of(apt_metrics=empty), "inner")
    assert metrics(manager) == [{}]
    assert manager.call_each("apt_metrics", trainer=None) == [("inner", {})]


@pytest.mark.parametrize("error", PASSING, ids=lambda e: type(e).__name__)
def test_what_ends_the_run_passes_through_every_wrapper(
    manager: PluginManager, plugin_of: type, error: BaseException
) -> None:
    seen: list[Any] = []

    @wrapper
    def swallows() -> Generator[None, Any, Any]:
        try:
            yield
        except BaseException as inner:
            seen.append(inner)
        return [{"as if": "nothing happened"}]

    @wrapper
    def fails_meanwhile() -> Generator[None, Any, Any]:
        try:
            yield
        finally:
            raise ValueError("in the clean-up")

    manager.register(plugin_of(apt_metrics=wrapper(generator_that(seen=seen))), "a_outer")
    manager.register(plugin_of(apt_metrics=fails_meanwhile), "bad")
    manager.register(plugin_of(apt_metrics=swallows), "c_inner")
    manager.register(plugin_of(apt_metrics=raising(error)), "ends")
    with pytest.raises(type(error)) as caught:
        metrics(manager)
    assert caught.value is error
    assert seen == [error, error]
    assert [f.error for f in failures(manager)] == ["ValueError: in the clean-up"]
    assert failures(manager, "a_outer") == failures(manager, "c_inner") == []


def test_the_first_of_two_endings_stands(manager: PluginManager, plugin_of: type) -> None:
    @wrapper
    def stops_too() -> Generator[None, Any, Any]:
        try:
            yield
        finally:
            raise StopTraining("in a clean-up")

    manager.register(plugin_of(on_training_start=stops_too), "outer")
    manager.register(plugin_of(on_training_start=raising(KeyboardInterrupt())), "ends")
    with pytest.raises(KeyboardInterrupt):
        manager.hook.on_training_start(trainer=None, run=None)


def test_an_ending_in_a_wrappers_setup_is_seen_by_the_wrappers_around_it(
    manager: PluginManager, plugin_of: type
) -> None:
    seen: list[Any] = []
    stop = StopTraining("now")
    manager.register(plugin_of(apt_metrics=wrapper(generator_that(seen=seen))), "a_outer")
    manager.register(plugin_of(apt_metrics=wrapper(generator_that(raise_first=stop))), "b_inner")
    manager.register(plugin_of(apt_metrics=lambda: pytest.fail("called after the end")), "c")
    with pytest.raises(StopTraining):
        metrics(manager)
    assert seen == [stop]


# Who answered --------------------------------------------------------------------------------


def test_results_belong_to_the_plugin_that_gave_them(
    manager: PluginManager, plugin_of: type
) -> None:
    shared = {"shared": 1}

    @wrapper
    def adds() -> Generator[None, list[Any], Any]:
        results = yield
        return [*results, {"added": 1}]

    @wrapper
    def drops_the_first() -> Generator[None, list[Any], Any]:
        results = yield
        return results[1:]

    manager.register(plugin_of(apt_metrics=lambda: shared), "a")
    manager.register(plugin_of(apt_metrics=lambda: shared), "b")
    manager.register(plugin_of(apt_metrics=empty), "c")
    each = [("a", shared), ("b", shared), ("c", {})]
    assert manager.call_each("apt_metrics", trainer=None) == each
    manager.register(plugin_of(apt_metrics=adds), "w_adds")
    each.append(("w_adds", {"added": 1}))
    assert manager.call_each("apt_metrics", trainer=None) == each
    manager.register(plugin_of(apt_metrics=drops_the_first), "x_drops")
    each.pop(0)
    kept = manager.call_each("apt_metrics", trainer=None)
    assert [value for _, value in kept] == [value for _, value in each]
    assert kept[1:] == each[1:]


def test_a_first_result_belongs_to_the_last_one_who_changed_it(
    manager: PluginManager, plugin_of: type
) -> None:
    @wrapper
    def passes_on() -> Generator[None, Any, Any]:
        return (yield)

    manager.register(plugin_of(apt_decoder=lambda: Answer("answer")), "inner")
    manager.register(plugin_of(apt_decoder=passes_on), "outer")
    assert manager.call_first("apt_decoder", request=None, session=None) == ("inner", "answer")
    replacing = plugin_of(apt_decoder=wrapper(generator_that(returns=Answer("better"))))
    manager.register(replacing, "replacing")
    assert manager.call_first("apt_decoder", request=None, session=None) == ("replacing", "better")


def test_one_plugin_alone_can_be_called(manager: PluginManager, plugin_of: type) -> None:
    manager.register(plugin_of(apt_metrics=lambda: {"a": 1}), "a")
    manager.register(plugin_of(apt_metrics=fail), "bad")
    assert manager.call_plugin("a", "apt_metrics", trainer=None) == {"a": 1}
    assert manager.call_plugin("bad", "apt_metrics", trainer=None) is None
    assert manager.call_plugin("nobody", "apt_metrics", trainer=None) is None
    assert len(failures(manager)) == 1


# Chains --------------------------------------------------------------------------------------


def rewrite(manager: PluginManager, prompt: str = "x") -> str:
    return manager.chain("apt_rewrite_prompt", GenerationRequest(prompt), "prompt").prompt


def test_each_plugin_of_a_chain_sees_what_the_one_before_made(
    manager: PluginManager, plugin_of: type
) -> None:
    def appends(letter: str) -> Callable[..., str]:
        return lambda request: request.prompt + letter

    manager.register(plugin_of(apt_rewrite_prompt=appends("a")), "a")
    manager.register(plugin_of(apt_rewrite_prompt=lambda request: None), "b")
    manager.register(plugin_of(apt_rewrite_prompt=fail), "bad")
    manager.register(plugin_of(apt_rewrite_prompt=appends("c")), "c")
    assert rewrite(manager) == "xac"
    seen: list[Any] = []
    around = wrapper(generator_that(returns="wrapped", seen=seen))
    manager.register(plugin_of(apt_rewrite_prompt=around), "w")
    assert rewrite(manager) == "wrapped"
    assert seen == ["xac"]


def test_a_chain_without_plugins_changes_nothing(manager: PluginManager) -> None:
    request = GenerationRequest("x")
    assert manager.chain("apt_rewrite_prompt", request, "prompt") == request


@pytest.mark.parametrize("wraps", [False, True])
def test_a_value_of_the_wrong_type_fails_in_the_chain_and_not_later(
    manager: PluginManager, plugin_of: type, wraps: bool
) -> None:
    function = wrapper(generator_that(returns=42)) if wraps else lambda: 42
    manager.register(plugin_of(apt_rewrite_prompt=function), "bad")
    manager.register(plugin_of(apt_rewrite_prompt=lambda request: request.prompt + "c"), "c")
    assert rewrite(manager) == "xc"
    assert failures(manager)[0].error == "TypeError: it returned int, not text or a list of Message"


# Quarantine ----------------------------------------------------------------------------------


def test_the_third_failure_quarantines_wherever_it_happens(
    manager: PluginManager, plugin_of: type, caplog: pytest.LogCaptureFixture
) -> None:
    manager.register(plugin_of(apt_metrics=fail, on_training_start=fail), "bad")
    metrics(manager)
    manager.hook.on_training_start(trainer=None, run=None)
    assert manager.records["bad"].state == "active"
    metrics(manager)
    metrics(manager)
    manager.hook.on_training_start(trainer=None, run=None)
    record = manager.records["bad"]
    assert (record.state, [f.count for f in record.failures]) == ("quarantined", [1, 2, 3])
    assert [f.quarantined for f in record.failures] == [False, False, True]
    assert record.reason.startswith("ValueError: broken (")
    assert manager.order("apt_metrics") == []
    assert "plugin bad failed in apt_metrics at step 0" in caplog.text
    assert "quarantined" in caplog.messages[-1]
    assert len(caplog.messages) == 3


LIMIT_ONE = {
    "apt_register_providers": {},
    "apt_register_config": {},
    "apt_configure": {"config": None},
    "apt_trainable": {"config": None},
    "apt_costs": {"config": None},
    "apt_build_provider": {"spec": None, "config": None},
    "apt_param_groups": {"model": None},
    "apt_transform_model": {"model": None, "config": None, "registry": None, "trains": True},
    "apt_loss_terms": {"trainer": None, "batch": None, "output": None},
}


def test_the_first_failure_quarantines_where_it_changes_the_weights(
    plugin_of: type,
) -> None:
    assert set(LIMIT_ONE) == set(hooks_where(lambda policy: policy.failure_limit == 1))
    for hook, arguments in LIMIT_ONE.items():
        manager = PluginManager()
        manager.register(plugin_of(**{hook: fail}), "bad")
        getattr(manager.hook, hook)(**arguments)
        assert manager.records["bad"].state == "quarantined"


def test_a_dormant_plugin_runs_in_the_hooks_that_say_so(
    manager: PluginManager, plugin_of: type
) -> None:
    manager.register(plugin_of(apt_metrics=empty, apt_state_dict=empty), "sleeps")
    manager.set_state("sleeps", "dormant", "waits for its schedule")
    assert metrics(manager) == []
    assert manager.hook.apt_state_dict(trainer=None) == [{}]
    manager.set_state("sleeps", "active")
    assert metrics(manager) == [{}]


def test_the_state_survives_a_checkpoint(manager: PluginManager, plugin_of: type) -> None:
    def fresh() -> PluginManager:
        manager = PluginManager()
        manager.register(plugin_of(apt_metrics=fail), "bad")
        manager.register(plugin_of(on_training_start=fail), "once")
        return manager

    before = fresh()
    before.register(plugin_of(), "only_before")
    before.step = 4
    for _ in range(3):
        metrics(before)
    before.hook.on_training_start(trainer=None, run=None)
    after = fresh()
    after.failures.load_state_dict(json.loads(json.dumps(before.failures.state_dict())))
    assert "only_before" not in after.records
    for name in ("bad", "once"):
        old, new = before.records[name], after.records[name]
        assert (new.state, new.reason, new.failures) == (old.state, old.reason, old.failures)
    assert after.order("apt_metrics") == []
    after.hook.on_training_start(trainer=None, run=None)
    assert [f.count for f in failures(after, "once")] == [1, 2]


# Required and strict -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strict", "on_failure", "because"),
    [(True, "isolate", "--strict"), (False, "required", "on_failure: required")],
)
@pytest.mark.parametrize("wraps", [False, True])
def test_strict_and_required_stop_the_run_and_say_where(
    plugin_of: type, strict: bool, on_failure: str, because: str, wraps: bool
) -> None:
    manager = PluginManager(strict=strict)
    seen: list[Any] = []
    told: list[str] = []
    function = wrapper(generator_that(raise_last=ValueError("broken"))) if wraps else fail
    manager.register(plugin_of(on_training_start=function), "bad")
    manager.register(plugin_of(on_plugin_failure=lambda failure: told.append(failure.plugin)), "b")
    manager.register(plugin_of(on_training_start=wrapper(generator_that(seen=seen))), "a_outer")
    manager.records["bad"].on_failure = on_failure
    manager.step = 12
    with pytest.raises(PluginError) as caught:
        manager.hook.on_training_start(trainer=None, run=None)
    error = caught.value
    assert (error.plugin, error.hook, error.exit_code) == ("bad", "on_training_start", 1)
    assert error.where == failures(manager)[0].where
    assert error.where.startswith(f"{__file__}:")
    for part in ("plugin bad", "on_training_start", "step 12", error.where, "broken", because):
        assert part in str(error)
    assert isinstance(error.__cause__, ValueError)
    assert seen == [error]
    assert told == ["bad"]


def test_a_plugin_that_is_not_required_stops_nothing_beside_one_that_is(
    manager: PluginManager, plugin_of: type
) -> None:
    manager.register(plugin_of(apt_metrics=fail), "bad")
    manager.register(plugin_of(apt_metrics=empty), "needed")
    manager.records["needed"].on_failure = "required"
    assert metrics(manager) == [{}]


# Failures while failures are told ------------------------------------------------------------


def test_a_failure_is_told_to_every_plugin(manager: PluginManager, plugin_of: type) -> None:
    told: list[PluginFailure] = []
    manager.register(
        plugin_of(apt_metrics=fail, on_plugin_failure=lambda failure: told.append(failure)), "bad"
    )
    metrics(manager)
    assert told == failures(manager)


def test_a_failure_in_on_plugin_failure_is_counted_and_not_told_again(
    manager: PluginManager, plugin_of: type, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    manager.register(plugin_of(on_plugin_failure=fail), "a_bad_listener")
    manager.register(plugin_of(apt_metrics=fail), "bad")
    manager.register(plugin_of(on_plugin_failure=lambda failure: told.append(failure.plugin)), "c")
    metrics(manager)
    assert told == ["bad"]
    assert [f.hook for f in failures(manager, "a_bad_listener")] == ["on_plugin_failure"]
    assert "plugin a_bad_listener failed in on_plugin_failure" in caplog.text
    metrics(manager)
    metrics(manager)
    assert manager.records["a_bad_listener"].state == "quarantined"


@pytest.mark.parametrize("required", ["bad", "a_bad_listener", None])
def test_a_failure_in_on_plugin_failure_stops_a_strict_run_with_the_first_failure(
    plugin_of: type, required: str | None
) -> None:
    manager = PluginManager(strict=required is None)
    manager.register(plugin_of(on_plugin_failure=fail), "a_bad_listener")
    manager.register(plugin_of(apt_metrics=fail), "bad")
    if required:
        manager.records[required].on_failure = "required"
    with pytest.raises(PluginError) as caught:
        metrics(manager)
    assert caught.value.plugin == (required or "bad")
    assert len(failures(manager)) == len(failures(manager, "a_bad_listener")) == 1
    if required != "a_bad_listener":
        return
    manager.records["a_bad_listener"].on_failure = "isolate"
    metrics(manager)  # nothing is left over from before


def test_stopping_in_on_plugin_failure_stops_cleanly_unless_the_failure_is_fatal(
    manager: PluginManager, plugin_of: type
) -> None:
    manager.register(plugin_of(on_plugin_failure=raising(StopTraining("seen enough"))), "a")
    manager.register(plugin_of(apt_metrics=fail), "bad")
    with pytest.raises(StopTraining):
        metrics(manager)
    manager.records["bad"].on_failure = "required"
    with pytest.raises(PluginError):
        metrics(manager)


# What is kept --------------------------------------------------------------------------------


class Tensor:
    """Something large that a failing hook holds."""


def holding(refs: list[weakref.ref[Tensor]]) -> ValueError:
    tensor = Tensor()
    refs.append(weakref.ref(tensor))
    error = ValueError("broken")
    error.held = tensor  # type: ignore[attr-defined]
    return error


def fails_plainly(refs: list[Any]) -> Any:
    def function() -> Any:
        raise holding(refs)

    return function


def fails_when_read(refs: list[Any]) -> Any:
    class Rows(dict[str, float]):
        def items(self) -> Any:
            raise holding(refs)

    return lambda: Rows(row=1.0)


def fails_before_the_yield(refs: list[Any]) -> Any:
    def function() -> Any:
        raise holding(refs)
        yield

    return wrapper(function)


def fails_after_the_yield(refs: list[Any]) -> Any:
    def function() -> Any:
        yield
        raise holding(refs)

    return wrapper(function)


@pytest.mark.parametrize(
    "failing",
    [fails_plainly, fails_when_read, fails_before_the_yield, fails_after_the_yield],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_of_a_failure_is_kept_alive(
    manager: PluginManager, plugin_of: type, failing: Callable[..., Any], wrapped: bool
) -> None:
    refs: list[weakref.ref[Tensor]] = []
    manager.register(plugin_of(apt_metrics=failing(refs)), "bad")
    if wrapped:
        manager.register(plugin_of(apt_metrics=wrapper(generator_that())), "around")
    gc.disable()
    try:
        metrics(manager)
        manager.call_each("apt_metrics", trainer=None)
        manager.call_plugin("bad", "apt_metrics", trainer=None)
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()
    assert len(refs) >= 2


# Where ---------------------------------------------------------------------------------------

SINGLE = """\
import json

from apt_core import hookimpl


def helper(text):
    return json.loads(text)


@hookimpl
def on_training_start():
    helper("{")


@hookimpl
def on_training_end():
    eval("1 +")


@hookimpl
def on_epoch_end():
    raise ValueError


@hookimpl(wrapper=True)
def on_epoch_start():
    return
    yield
"""


def test_where_is_the_line_in_the_plugins_own_file(
    manager: PluginManager, load_source: Callable[..., Any]
) -> None:
    manager.register(load_source("mine", SINGLE), "mine")
    record = manager.records["mine"]
    manager.hook.on_training_start(trainer=None, run=None)  # fails inside json
    manager.hook.on_training_end(trainer=None, run=None)  # a syntax error in another text
    manager.hook.on_epoch_end(epoch=1, trainer=None)
    record.state, record.failures = "active", [*record.failures]
    manager.set_state("mine", "active")
    manager.hook.on_epoch_start(epoch=1, trainer=None)  # nothing was raised: its definition
    assert [failure.where for failure in record.failures] == [
        "mine.py:7",
        "mine.py:17",
        "mine.py:22",
        "mine.py:25",
    ]


def test_where_is_any_file_of_a_plugin_that_is_a_package(
    manager: PluginManager,
    write: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("whole_package/__init__.py", "")
    write("whole_package/parts.py", "import json\n\n\ndef work():\n    json.loads('{')\n")
    write(
        "whole_package/plugin.py",
        "from apt_core import hookimpl\nfrom whole_package.parts import work\n\n"
        "@hookimpl\ndef on_training_start():\n    work()\n",
    )
    monkeypatch.syspath_prepend(".")
    plugin, record = load("whole_package.plugin", {})
    manager.register(plugin, "whole", record=record)
    manager.hook.on_training_start(trainer=None, run=None)
    assert record.failures[0].where == "whole_package/parts.py:5"


def test_what_a_plugin_handed_over_fails_as_its_hook_does(
    manager: PluginManager, load_source: Callable[..., Any]
) -> None:
    source = (
        "from apt_core import hookimpl\n\ndef broken():\n    raise ValueError('later')\n\n"
        "@hookimpl\ndef apt_logits_processors():\n    return [broken]\n"
    )
    manager.register(load_source("mine", source), "mine")
    (((plugin, (function,)),)) = manager.call_each(
        "apt_logits_processors", request=None, session=None
    )
    for _ in range(3):
        try:
            function()
        except ValueError as error:
            manager.failures.fail(plugin, "apt_logits_processors", error)
    manager.failures.fail(plugin, "apt_logits_processors", TypeError("never raised"))
    manager.failures.fail(plugin, "apt_decoder", TypeError("not implemented here"))
    assert [f.where for f in failures(manager, "mine")] == [
        *["mine.py:4"] * 3,
        "mine.py:6",
        "mine.py",
    ]
    assert manager.records["mine"].state == "quarantined"


def test_apt_configure_may_refuse_the_profile(manager: PluginManager, plugin_of: type) -> None:
    refusal = ConfigError(Problem("too many layers", key="model.num_layers", hint="take fewer"))
    manager.register(plugin_of(apt_configure=raising(refusal)), "mine")
    with pytest.raises(ConfigError) as caught:
        manager.hook.apt_configure(config=None)
    (problem,) = caught.value.problems
    assert str(problem) == "model.num_layers: plugin mine: too many layers (take fewer)"
    assert failures(manager, "mine") == []


# Plugins of every kind -----------------------------------------------------------------------


@dataclass
class Unhashable:
    """Equal by value, so that it has no hash."""

    value: int = 0

    @hookimpl
    def apt_metrics(self) -> dict[str, int]:
        return {"value": self.value}


def test_a_plugin_need_not_have_a_hash(manager: PluginManager) -> None:
    plugin = Unhashable(3)
    assert manager.register(plugin) == "unhashable"
    assert metrics(manager) == [{"value": 3}]
    assert manager.unregister(plugin) is plugin
    assert (metrics(manager), manager.records) == ([], {})


def test_a_plugin_that_registers_another_in_its_hook(
    manager: PluginManager, plugin_of: type
) -> None:
    def registers() -> dict[str, int]:
        if not manager.has_plugin("b"):
            manager.register(plugin_of(apt_metrics=lambda: {"b": 1}), "b")
        return {"a": 1}

    manager.register(plugin_of(apt_metrics=registers), "a")
    assert metrics(manager) == [{"a": 1}]
    assert metrics(manager) == [{"a": 1}, {"b": 1}]
