"""What the manager needs of pluggy: the one private method that it replaces, and what it is given.

These run with the oldest and the newest pluggy that are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from apt_core import hookimpl
from apt_core.plugin_manager import PluginManager


class Watching(PluginManager):
    """Keeps the arguments with which pluggy calls the touch-point."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        super().__init__()

    def _hookexec(
        self,
        hook_name: str,
        methods: Sequence[Any],
        kwargs: Mapping[str, object],
        firstresult: bool,
    ) -> Any:
        self.calls.append((hook_name, methods, kwargs, firstresult))
        return super()._hookexec(hook_name, methods, kwargs, firstresult)


def tell(value: Any) -> Callable[[], Any]:
    return lambda: value


decides = SimpleNamespace(choose=lambda: None)


@pytest.fixture
def watching(plugin_of: type) -> Watching:
    manager = Watching()
    for name in "ab":
        manager.register(plugin_of(apt_metrics=tell({name: 1}), apt_decoder=tell(decides)), name)
    return manager


def test_a_call_passes_name_methods_arguments_and_firstresult(watching: Watching) -> None:
    watching.hook.apt_metrics(trainer="the trainer")
    watching.hook.apt_decoder(request="the request", session=None)
    (metrics, decoder) = watching.calls
    assert (metrics[0], dict(metrics[2]), metrics[3]) == (
        "apt_metrics",
        {"trainer": "the trainer"},
        False,
    )
    assert (decoder[0], dict(decoder[2]), decoder[3]) == (
        "apt_decoder",
        {"request": "the request", "session": None},
        True,
    )


def test_each_call_has_a_list_of_its_own_with_the_same_methods(watching: Watching) -> None:
    watching.hook.apt_metrics(trainer=None)
    watching.hook.apt_metrics(trainer=None)
    first, second = (call[1] for call in watching.calls)
    assert first is not second
    assert first == second == watching.hook.apt_metrics.get_hookimpls()


def test_a_method_tells_its_plugin_function_and_options(plugin_of: type) -> None:
    manager = Watching()

    def around() -> Generator[None, Any, Any]:
        return (yield)

    manager.register(plugin_of(apt_metrics=hookimpl(priority=7)(tell({}))), "plain")
    manager.register(plugin_of(apt_metrics=hookimpl(wrapper=True)(around)), "around")
    manager.hook.apt_metrics(trainer=None)
    methods = {method.plugin_name: method for method in manager.calls[0][1]}
    assert methods["plain"].opts["priority"] == 7
    assert methods["plain"].function() == {}
    assert (methods["plain"].wrapper, methods["around"].wrapper) == (False, True)


def test_a_specification_keeps_our_options(watching: Watching) -> None:
    spec = watching.hook.apt_loss_terms.spec
    assert spec.opts["firstresult"] is False
    assert spec.argnames == ("trainer", "batch", "output")


def test_a_cached_plan_follows_registering_and_unregistering(
    watching: Watching, plugin_of: type
) -> None:
    def names() -> list[str]:
        return [name for result in watching.hook.apt_metrics(trainer=None) for name in result]

    assert names() == ["a", "b"]
    watching.register(plugin_of(apt_metrics=tell({"aa": 1})), "aa")
    assert names() == ["a", "aa", "b"]
    watching.unregister(name="a")
    assert names() == ["aa", "b"]


def test_a_subset_of_the_plugins_is_called_through_the_guard(
    watching: Watching, plugin_of: type
) -> None:
    def fail() -> None:
        raise ValueError("broken")

    watching.register(plugin_of(apt_metrics=fail), "bad")
    without_a = watching.subset_hook_caller("apt_metrics", [watching.get_plugin("a")])
    assert without_a(trainer=None) == [{"b": 1}]
    assert watching.hook.apt_metrics(trainer=None) == [{"a": 1}, {"b": 1}]
    assert len(watching.records["bad"].failures) == 2


def test_an_extra_implementation_is_called_through_the_guard_once(watching: Watching) -> None:
    def fails() -> None:
        raise ValueError("broken")

    def answers(trainer: Any) -> dict[str, Any]:
        return {"extra": trainer}

    results = watching.hook.apt_metrics.call_extra([fails, answers], {"trainer": 3})
    assert sorted(results, key=str) == [{"a": 1}, {"b": 1}, {"extra": 3}]
    assert watching.hook.apt_metrics(trainer=None) == [{"a": 1}, {"b": 1}]
