"""A plugin that cannot work is refused with every reason, and nothing has changed then."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import pluggy
import pytest

from apt_core import ConfigError, PluginInfo, hookimpl
from apt_core.code_source import source_of
from apt_core.errors import Problem
from apt_core.plugin_manager import PluginManager

HEAD = "import functools\n\nimport pluggy\n\nfrom apt_core import hookimpl, PluginInfo\n\n"


def refused(manager: PluginManager, plugin: Any, name: str = "mine") -> list[Problem]:
    """The problems of a plugin that is refused; shows that the manager is as it was before."""

    def snapshot() -> Any:
        callers = vars(manager.hook)
        return (
            dict(manager.records),
            manager.list_name_plugin(),
            {hook: caller.get_hookimpls() for hook, caller in callers.items()},
        )

    before = snapshot()
    with pytest.raises(ConfigError) as caught:
        manager.register(plugin, name)
    assert snapshot() == before
    return list(caught.value.problems)


FUNCTIONS = {
    "@hookimpl\ndef on_step_ends(step): ...": (
        "on_step_ends",
        "there is no hook of this name",
        "did you mean 'on_step_end'?",
    ),
    "@hookimpl\ndef zzz(step): ...": (
        "zzz",
        "there is no hook of this name",
        "'apt-hooks list --all' shows every hook",
    ),
    "@hookimpl(specname='on_step_ended')\ndef mine(step): ...": (
        "on_step_ended",
        "there is no hook of this name",
        "did you mean 'on_step_end'?",
    ),
    "@hookimpl\ndef on_step_end(step=1): ...": (
        "on_step_end",
        "parameter 'step' has a default and would never be passed",
        "remove the default",
    ),
    "@hookimpl\ndef on_step_end(*, step): ...": (
        "on_step_end",
        "parameter keyword-only step would never be passed",
        "name the parameters that you want",
    ),
    "@hookimpl\ndef on_step_end(*args): ...": (
        "on_step_end",
        "parameter *args would never be passed",
        "name the parameters that you want",
    ),
    "@hookimpl\ndef on_step_end(**kwargs): ...": (
        "on_step_end",
        "parameter **kwargs would never be passed",
        "name the parameters that you want",
    ),
    "@hookimpl\ndef on_step_end(trainr): ...": (
        "on_step_end",
        "the hook has no parameter 'trainr'",
        "did you mean 'trainer'?",
    ),
    "@hookimpl\ndef on_epoch_end(x): ...": (
        "on_epoch_end",
        "the hook has no parameter 'x'",
        "it offers epoch, trainer",
    ),
    "@hookimpl\nasync def on_step_end(step): ...": (
        "on_step_end",
        "it is asynchronous",
        "hooks are plain functions: drop 'async'",
    ),
    "@hookimpl\nasync def on_step_end(step):\n    yield": (
        "on_step_end",
        "it is asynchronous",
        "hooks are plain functions: drop 'async'",
    ),
    "@hookimpl(wrapper=True)\ndef on_step_end(step): ...": (
        "on_step_end",
        "a wrapper must yield once",
        "result = yield; return result",
    ),
    "@hookimpl(wrapper=True)\ndef apt_configure(config):\n    yield": (
        "apt_configure",
        "it is called for one plugin at a time, so a wrapper is around nothing",
        "",
    ),
    **{
        f"@pluggy.HookimplMarker('apt')({option}=True)\ndef on_step_end(step):\n    yield": (
            "on_step_end",
            "tryfirst, trylast and hookwrapper are not offered",
            "use apt_core.hookimpl with priority=… or wrapper=True",
        )
        for option in ("tryfirst", "trylast", "hookwrapper")
    },
}


@pytest.mark.parametrize("source", FUNCTIONS)
def test_an_implementation_that_could_not_work_is_refused(
    manager: PluginManager, load_source: Callable[..., Any], source: str
) -> None:
    hook, message, hint = FUNCTIONS[source]
    module = load_source("mine", f"{HEAD}{source}\n")
    where = f"mine.py:{HEAD.count(chr(10)) + 1}"
    assert refused(manager, module) == [Problem(message, f"plugin mine, {hook}", where, hint)]


class Methods:
    @hookimpl
    def on_step_end():  # type: ignore[misc]
        pass

    @hookimpl
    def on_step_start(*args):  # type: ignore[no-untyped-def]
        pass

    on_metrics = hookimpl(functools.partial(print, "row"))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("on_step_end", "it is a method without a first parameter"),
        ("on_step_start", "parameter *args would never be passed"),
        ("on_metrics", "@hookimpl marks a partial, not a function"),
    ],
)
def test_what_cannot_be_called_as_a_method_is_refused(
    manager: PluginManager, hook: str, message: str
) -> None:
    found = {problem.key: problem.message for problem in refused(manager, Methods())}
    assert found[f"plugin mine, {hook}"] == message


def test_every_problem_of_a_plugin_comes_at_once(
    manager: PluginManager, load_source: Callable[..., Any]
) -> None:
    source = HEAD + "PLUGIN = {'summary': 'a dict'}\n\n" + "\n\n".join([*FUNCTIONS][:2])
    problems = refused(manager, load_source("mine", source))
    assert [problem.key for problem in problems] == [
        "plugin mine",
        "plugin mine, on_step_ends",
        "plugin mine, zzz",
    ]
    assert problems[0].message == "PLUGIN is a dict"


def test_a_class_is_made_into_an_object_of_each_manager(manager: PluginManager) -> None:
    class Good:
        PLUGIN = PluginInfo(summary="of the class")

        @hookimpl
        def on_step_end(self) -> None: ...

    other = PluginManager()
    assert manager.register(Good) == other.register(Good) == "good"
    one, two = manager.get_plugin("good"), other.get_plugin("good")
    assert type(one) is type(two) is Good
    assert one is not two
    assert manager.records["good"].summary == "of the class"
    (problem,) = refused(manager, Good)
    assert problem.message == "it is active already as 'good'"
    assert {problem.key for problem in refused(PluginManager(), Methods)} == {
        problem.key for problem in refused(PluginManager(), Methods())
    }


CLASS = (
    HEAD
    + """
PLUGIN = PluginInfo(summary="counts", observer=True)
made = []

class Plugin:
    def __init__(self):
        made.append(self)
        self.seen = []

    @hookimpl
    def on_step_end(self, step, trainer):
        self.seen.append(step)
"""
)


def test_a_module_names_its_class(load_source: Callable[..., Any]) -> None:
    module = load_source("counting", CLASS)
    managers = [PluginManager(), PluginManager()]
    for number, manager in enumerate(managers):
        assert manager.register(module, "counting") == "counting"
        manager.hook.on_step_end(step=number, loss=0.0, trainer=None)
        assert manager.records["counting"].summary == "counts"
        assert manager.only_observes("counting")
        (problem,) = refused(manager, module)
        assert problem.message == "it is active already as 'counting'"
    assert [manager.get_plugin("counting").seen for manager in managers] == [[0], [1]]
    assert PluginManager().register(module.Plugin()) == "apt_plugin_counting"


@pytest.mark.parametrize(
    ("source", "key", "message"),
    [
        (
            CLASS + "\n@hookimpl\ndef on_epoch_end(): ...\n",
            "plugin mine, on_epoch_end",
            "its module has hooks beside its class Plugin",
        ),
        (
            CLASS.replace("__init__(self)", "__init__(self, config)"),
            "plugin mine",
            "its class Plugin cannot be made: TypeError: Plugin.__init__() missing 1 required "
            "positional argument: 'config'",
        ),
        (CLASS.replace("step, trainer", "steps"), "plugin mine, on_step_end", "no parameter 'st"),
        (CLASS.replace("PluginInfo(", "dict("), "plugin mine", "PLUGIN is a dict"),
        (
            CLASS.replace("summary=", "requires=('no-such-package',), summary=").replace(
                "made.append", "import_what_is_missing"
            ),
            "plugin mine",
            "it cannot be used: no-such-package",
        ),
    ],
)
def test_what_is_wrong_with_a_class(
    manager: PluginManager, load_source: Callable[..., Any], source: str, key: str, message: str
) -> None:
    (problem,) = refused(manager, load_source("mine", source))
    assert problem.key == key
    assert message in problem.message


def test_a_class_without_hooks_is_the_plugin_where_there_are_no_others(
    manager: PluginManager, load_source: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    module = load_source("mine", CLASS.replace("    @hookimpl\n", ""))
    manager.register(module, "mine")
    assert type(manager.get_plugin("mine")) is module.Plugin
    assert "on_step_end at mine.py:16 has the name of a hook but is not marked" in caplog.text


def test_a_class_without_hooks_is_none_of_the_plugin(
    manager: PluginManager, load_source: Callable[..., Any]
) -> None:
    source = HEAD + "class Plugin: ...\n\n@hookimpl\ndef on_epoch_end(): ...\n"
    module = load_source("mine", source)
    manager.register(module, "mine")
    assert manager.get_plugin("mine") is module


def test_an_unmet_requirement(manager: PluginManager, plugin_of: type) -> None:
    plugin = plugin_of()
    plugin.PLUGIN = PluginInfo(requires=("pluggy>=1", "no-such-package>=2", "pluggy<1"))
    first, second = refused(manager, plugin)
    assert "no-such-package is not installed" in first.message
    assert 'pip install "no-such-package>=2"' in first.message
    assert second.message.startswith("it cannot be used: pluggy ")


@pytest.mark.parametrize("who", ["first", "second"])
def test_a_conflict_that_either_of_two_plugins_names(
    manager: PluginManager, plugin_of: type, who: str
) -> None:
    plugins = {"first": plugin_of(), "second": plugin_of()}
    other = "second" if who == "first" else "first"
    plugins[who].PLUGIN = PluginInfo(conflicts=(other,))
    manager.register(plugins["first"], "first")
    (problem,) = refused(manager, plugins["second"], "second")
    assert problem.message == "it conflicts with the active plugin 'first'"
    assert problem.hint == "block one: --plugin no:first"


def test_a_listing_shows_plugins_that_conflict_side_by_side(plugin_of: type) -> None:
    manager = PluginManager(listing=True)
    for name in ("first", "second"):
        plugin = plugin_of()
        plugin.PLUGIN = PluginInfo(conflicts=("first",))
        manager.register(plugin, name)
    assert list(manager.records) == ["first", "second"]


def test_a_name_that_is_taken(manager: PluginManager, plugin_of: type) -> None:
    manager.register(plugin_of(), "mine")
    (problem,) = refused(manager, plugin_of())
    assert problem.message == "the name is taken by another active plugin"


def test_one_object_under_two_names(manager: PluginManager, plugin_of: type) -> None:
    plugin = plugin_of()
    manager.register(plugin, "first")
    (problem,) = refused(manager, plugin, "second")
    assert problem.message == "it is active already as 'first'"


class Lazy:
    """Its descriptors must not be run; a cached one would keep what it computed."""

    @property
    def weights(self) -> Any:
        raise SystemExit("evaluated")

    @functools.cached_property
    def on_training_start(self) -> Any:
        raise SystemExit("evaluated")

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(f"evaluated: {name}")

    @hookimpl
    def on_step_end(self, step: int) -> None: ...


def test_properties_are_never_evaluated(manager: PluginManager) -> None:
    manager.register(Lazy(), "lazy")
    assert manager.implements("lazy", "on_step_end")


@pytest.mark.parametrize("outside", [staticmethod, classmethod])
def test_static_and_class_methods_are_marked_in_either_order(
    manager: PluginManager, outside: Any
) -> None:
    def answer(*parameters: Any) -> Any:
        return (lambda: {"a": 1}) if outside is staticmethod else (lambda cls: {"a": 1})

    inner = type("Inner", (), {"apt_metrics": outside(hookimpl(answer()))})
    outer = type("Outer", (), {"apt_metrics": hookimpl(outside(answer()))})
    manager.register(inner())
    manager.register(outer())
    assert manager.hook.apt_metrics(trainer=None) == [{"a": 1}] * 2


def test_an_unmarked_function_with_the_name_of_a_hook_is_warned_of(
    manager: PluginManager, load_source: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    source = "def on_step_end(step): ...\n\ndef helper(step): ...\n"
    manager.register(load_source("mine", source), "mine")
    assert not manager.implements("mine", "on_step_end")
    (message,) = caplog.messages
    assert message == (
        "plugin mine: on_step_end at mine.py:1 has the name of a hook but is not marked with "
        "@hookimpl; it will not be called"
    )


def test_hooks_that_a_module_imports_are_not_its_own(
    manager: PluginManager, load_source: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    source = "from apt_core.hookspecs import on_step_end, apt_metrics\n"
    manager.register(load_source("mine", source), "mine")
    assert caplog.messages == []


def test_the_mark_of_stock_pluggy_is_understood(manager: PluginManager, plugin_of: type) -> None:
    mark = pluggy.HookimplMarker("apt")
    manager.register(plugin_of(apt_metrics=mark(lambda: {"a": 1})), "mine")
    assert manager.hook.apt_metrics(trainer=None) == [{"a": 1}]
    assert manager.order("apt_metrics")[0].priority == 50


def test_plugin_facts_are_kept(manager: PluginManager, load_source: Callable[..., Any]) -> None:
    source = HEAD + "PLUGIN = PluginInfo(summary='adds noise', version='2.1')\n"
    name = manager.register(load_source("mine", source))
    record = manager.records[name]
    assert (record.state, record.summary, record.version) == ("active", "adds noise", "2.1")
    assert importlib.import_module("apt_plugin_mine") is manager.get_plugin(name)


def test_the_cores_own_name_is_not_to_be_had() -> None:
    with pytest.raises(ConfigError, match="core's own"):
        PluginManager().register(object(), "core")


def test_no_field_of_a_declaration_is_lost() -> None:
    """What a hook returned is made anew from its fields: from every one of them."""
    from pydantic import BaseModel

    from apt_core import ProviderSpec, SectionSpec
    from apt_core.hook_returns import provider_specs, section_specs

    class Mine(BaseModel):
        x: int = 1

    provider = ProviderSpec(
        kind="norm",
        name="mine",
        factory="mine:Norm",
        version="1",
        summary="a norm",
        requires=("numpy",),
        conflicts=("ffn:other",),
        config=Mine,
        section="mine",
        default=True,
        files=("train_path",),
        reads=("training.eps",),
    )
    section = SectionSpec(
        "mine",
        Mine,
        ("rate",),
        inactive=lambda config: [],
        check=lambda config: [],
        names={"x": "norm"},
        without="as it is",
        grows={"x": "d_ff"},
    )
    bare = {provider: ProviderSpec("", "", ""), section: SectionSpec()}
    assert provider_specs([provider], {}) == [provider]
    assert section_specs([section], {}) == [section]
    for spec, defaults in bare.items():
        untried = [f for f, value in vars(spec).items() if value == vars(defaults)[f]]
        assert untried in ([], ["plugin"]), "the manager stamps the plugin, all else is declared"


class Refuses(type):
    def __getattribute__(cls, name: str) -> Any:
        raise KeyError(name)


class Unlisted:
    def __dir__(self) -> Any:
        return 5


def test_what_a_plugin_has_is_looked_at_without_its_help(manager: PluginManager) -> None:
    class Plugin:
        on_step_end = Refuses("on_step_end", (), {})

    (problem,) = refused(manager, Plugin())
    assert "what it has cannot be told: KeyError" in problem.message
    (problem,) = refused(manager, Unlisted(), "other")
    assert "what it has cannot be told: TypeError" in problem.message

    class Numbered:
        @hookimpl(specname=3)  # type: ignore[arg-type]
        def on_step_end(self, step: int) -> None: ...

    (problem,) = refused(manager, Numbered(), "third")
    assert problem.message == "specname is a int"


def test_a_module_may_say_anything_of_its_file() -> None:
    module = types.ModuleType("odd")
    module.__file__ = 5  # type: ignore[assignment]
    assert source_of(module) == ("", 0)
