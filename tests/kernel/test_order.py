"""The order that is printed is the order in which hooks run, however plugins were registered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_core import Priority, hookimpl
from apt_core.inspect.listing import implementation_rows
from apt_core.plugin_manager import PluginManager

HOOKS = {
    "on_epoch_start": {"epoch": 1, "trainer": None},
    "apt_decoder": {"request": None, "session": None},
}
"""A hook that collects, and one that stops at the first result."""

PRIORITIES = st.integers(0, 100) | st.sampled_from([0, 25, 50, 75, 100])


@dataclass(frozen=True)
class Drawn:
    """A plugin: its priority, its profile's override, whether it wraps, when it is registered."""

    name: str
    priority: int
    override: int | None
    wrapper: bool
    late: bool

    @property
    def rank(self) -> tuple[int, str]:
        return self.priority if self.override is None else self.override, self.name


@st.composite
def plugins(draw: st.DrawFn) -> list[Drawn]:
    names = draw(st.lists(st.text("abc", min_size=1, max_size=3), unique=True, max_size=7))
    return [
        Drawn(
            name,
            draw(PRIORITIES),
            draw(st.none() | PRIORITIES),
            draw(st.booleans()),
            draw(st.booleans()),
        )
        for name in names
    ]


def plugin_for(drawn: Drawn, hook: str, seen: list[tuple[str, str]]) -> Any:
    def plain() -> None:
        seen.append(("call", drawn.name))

    def wrapper() -> Generator[None, Any, Any]:
        seen.append(("enter", drawn.name))
        result = yield
        seen.append(("leave", drawn.name))
        return result

    mark = hookimpl(priority=drawn.priority, wrapper=drawn.wrapper)
    plugin = type("Plugin", (), {})()
    setattr(plugin, hook, mark(wrapper if drawn.wrapper else plain))
    return plugin


def run(
    hook: str, chosen: Sequence[Drawn], order: Sequence[Drawn]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The printed rows and the calls that were seen, with the plugins registered in ``order``."""
    manager, seen = PluginManager(), list[tuple[str, str]]()
    for late in (False, True):
        for drawn in order:
            if drawn.late == late:
                manager.register(plugin_for(drawn, hook, seen), drawn.name)
        getattr(manager.hook, hook)(**HOOKS[hook])  # the plan of the first half is cached
    for drawn in chosen:
        manager.set_priority(drawn.name, drawn.override)
    seen.clear()
    getattr(manager.hook, hook)(**HOOKS[hook])
    rows = implementation_rows(SimpleNamespace(manager=manager), hook)  # type: ignore[arg-type]
    return rows, seen


@pytest.mark.parametrize("hook", HOOKS)
@given(chosen=plugins(), data=st.data())
def test_the_printed_order_is_the_order_of_the_calls(
    hook: str, chosen: list[Drawn], data: st.DataObject
) -> None:
    rows, seen = run(hook, chosen, data.draw(st.permutations(chosen)))
    wrappers = [row["plugin"] for row in rows if row["wrapper"]]
    others = [row["plugin"] for row in rows if not row["wrapper"]]
    assert seen == [
        *(("enter", name) for name in wrappers),
        *(("call", name) for name in others),
        *(("leave", name) for name in reversed(wrappers)),
    ]
    ranked = sorted(chosen, key=lambda drawn: (not drawn.wrapper, drawn.rank))
    assert [row["plugin"] for row in rows] == [drawn.name for drawn in ranked]
    assert [row["priority"] for row in rows] == [drawn.rank[0] for drawn in ranked]
    assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
    again, _ = run(hook, chosen, data.draw(st.permutations(chosen)))
    assert [(row["plugin"], row["priority"]) for row in again] == [
        (row["plugin"], row["priority"]) for row in rows
    ]


def test_an_override_moves_every_implementation_of_a_plugin_and_can_be_taken_back(
    manager: PluginManager, plugin_of: type
) -> None:
    for name in ("early", "late"):
        priority = Priority.EARLY if name == "early" else Priority.LATE
        mark = hookimpl(priority=priority)
        manager.register(
            plugin_of(on_training_end=mark(lambda: None), on_training_start=mark(lambda: None)),
            name,
        )

    def orders() -> list[list[str]]:
        hooks = ("on_training_start", "on_training_end")
        return [[call.plugin for call in manager.order(hook)] for hook in hooks]

    assert orders() == [["early", "late"]] * 2
    manager.set_priority("late", 0)
    assert orders() == [["late", "early"]] * 2
    manager.set_priority("late", None)
    assert orders() == [["early", "late"]] * 2


def test_two_implementations_of_one_plugin_run_by_function_name(
    manager: PluginManager, plugin_of: type
) -> None:
    seen: list[str] = []

    def second() -> None:
        seen.append("second")

    def first() -> None:
        seen.append("first")

    both = {f.__name__: hookimpl(specname="on_training_start")(f) for f in (second, first)}
    manager.register(plugin_of(**both), "mine")
    manager.hook.on_training_start(trainer=None, run=None)
    assert seen == ["first", "second"]


def test_rows_name_the_line_of_the_implementation(
    manager: PluginManager, load_source: Callable[..., Any], listing_of: Callable[..., Any]
) -> None:
    source = "from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(step):\n    pass\n"
    manager.register(load_source("mine", source), "mine")
    (row,) = implementation_rows(listing_of(manager))
    assert row == {
        "hook": "on_step_end",
        "plugin": "mine",
        "priority": 50,
        "position": 1,
        "wrapper": False,
        "background": False,
        "file": "mine.py",
        "line": 3,
    }


@pytest.mark.parametrize("priority", [-1, 101, 1.5, True, "50"])
def test_a_priority_is_an_integer_from_0_to_100(priority: Any) -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        hookimpl(priority=priority)
