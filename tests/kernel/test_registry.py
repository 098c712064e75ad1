"""Providers: derived from what plugins declare, chosen by name, never replaced silently."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from apt_core import ConfigError, FallbackEvent, ProviderSpec, StopTraining
from apt_core.catalogue import Catalogue, usable
from apt_core.config import Source, validate
from apt_core.errors import PluginError, ProviderError
from apt_core.plugin_manager import PluginManager
from apt_core.providers.base import Provider
from apt_core.registry import Registry, Resolution

ROOT = Path(__file__).parents[2]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    width: int = 3


class Built:
    """What a factory makes: remembers its settings."""

    def __init__(self, config: Any = None) -> None:
        self.config = config


class Other(Built):
    def create_layer(self) -> None: ...


def spec(name: str, kind: str = "retrieval", factory: Any = Built, **facts: Any) -> ProviderSpec:
    return ProviderSpec(kind, name, factory, **facts)


@pytest.fixture
def offer(manager: PluginManager, plugin_of: type) -> Callable[..., Registry]:
    """``offer({"plugin": [spec, …]}, …)``: a registry over plugins that declare these."""

    def make(plugins: dict[str, list[Any]], strict: bool = False, **options: Any) -> Registry:
        manager.strict = strict
        for name, specs in plugins.items():
            manager.register(plugin_of(apt_register_providers=returning(specs)), name)
        return Registry(manager, strict=strict, **options)

    return make


def returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def raising(error: BaseException) -> Callable[..., Any]:
    def factory(config: Any) -> Any:
        raise error

    return factory


def a_default(**facts: Any) -> ProviderSpec:
    return spec("safe", default=True, factory=Other, **facts)


# Declaring -----------------------------------------------------------------------------------


def test_a_name_that_two_plugins_register_names_both(offer: Callable[..., Registry]) -> None:
    registry = offer({"one": [spec("bm25")], "two": [spec("bm25"), spec("exact")]})
    (problem,) = registry.known.problems
    assert problem.message == "provider retrieval:bm25 is registered by both 'one' and 'two'"
    assert registry.spec("retrieval", "bm25").plugin == "one"
    assert registry.has("retrieval", "exact")


def test_a_name_of_the_core_cannot_be_taken(offer: Callable[..., Registry]) -> None:
    (problem,) = offer({"mine": [spec("gpt", "backbone")]}).known.problems
    assert "by both 'core' and 'mine'" in problem.message


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([spec("x", "atention")], "atention:x has an unknown kind"),
        (spec("x", "retrieval"), None),
    ],
)
def test_what_cannot_be_taken_is_a_problem(
    offer: Callable[..., Registry], declared: Any, message: str | None
) -> None:
    problems = offer({"mine": declared}).known.problems
    assert [problem.message for problem in problems] == ([message] if message else [])


def test_listings_have_the_default_first_and_the_plugin_of_each(
    offer: Callable[..., Registry],
) -> None:
    registry = offer({"mine": [spec("another", "norm"), a_default(), spec("bm25")]})
    assert registry.list_providers("norm") == {"norm": ["rmsnorm", "another", "layernorm"]}
    assert registry.list_providers()["retrieval"] == ["safe", "bm25"]
    assert [s.plugin for s in registry.known.specs("norm")] == ["core", "mine", "core"]
    assert registry.known.default("router") is None


def test_the_facts_of_a_provider(offer: Callable[..., Registry]) -> None:
    facts = {
        "version": "2",
        "requires": ("pluggy>=1",),
        "conflicts": ("norm:rmsnorm",),
        "summary": "words",
        "section": "retriever",
    }
    registry = offer({"mine": [spec("bm25", config=Settings, **facts)]})
    info = registry.get_info("retrieval", "bm25")
    assert info["config"]["schema"]["properties"]["width"]["default"] == 3
    assert info == {
        "kind": "retrieval",
        "name": "bm25",
        "version": "2",
        "plugin": "mine",
        "dependencies": ["pluggy>=1"],
        "is_default": False,
        "conflicts": ["norm:rmsnorm"],
        "summary": "words",
        "config": {"section": "retriever", "schema": info["config"]["schema"]},
    }
    assert registry.get_info("norm", "rmsnorm")["is_default"] is True


@pytest.mark.parametrize(
    ("kind", "name", "message", "hint"),
    [
        ("attention", "tva_defualt", "no plugin offers attention provider 'tva_defualt'",
         "did you mean 'tva_default'?"),
        ("router", "topk", "no plugin offers router provider 'topk'", "there are: none"),
        ("atention", "x", "there is no kind 'atention'", "did you mean 'attention'?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ask", ["get", "get_info", "spec"])
def test_an_unknown_name_is_bad_input_with_a_suggestion(
    kind: str, name: str, message: str, hint: str, ask: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(Registry(), ask)(kind, name)
    (problem,) = caught.value.problems
    assert (problem.message, problem.hint) == (message, hint)


def test_a_kind_without_a_default_must_be_named() -> None:
    with pytest.raises(ConfigError, match="'router' has no default provider: name one"):
        Registry().get("router")


def test_conflicts_are_reported_once_whoever_names_them(offer: Callable[..., Registry]) -> None:
    registry = offer(
        {"mine": [spec("a", conflicts=("norm:b",)), spec("b", "norm", conflicts=("retrieval:a",))]}
    )
    keys = ["retrieval:a", "norm:b", "norm:rmsnorm", "norm:unknown"]
    (problem,) = registry.check_conflicts(keys)
    assert problem.message == "providers norm:b and retrieval:a conflict"
    assert registry.check_conflicts(keys[1:]) == []


# Getting -------------------------------------------------------------------------------------


def test_a_provider_is_built_once_for_each_config(offer: Callable[..., Registry]) -> None:
    registry = offer({"mine": [spec("bm25", config=Settings)]})
    provider = registry.get("retrieval", "bm25")
    assert provider.config == Settings()
    assert registry.get("retrieval", "bm25", {"width": 3}) is provider
    assert registry.get("retrieval", "bm25", {"width": 4}).config.width == 4
    assert registry.resolutions["retrieval", "bm25"].row() == {
        "kind": "retrieval",
        "asked": "bm25",
        "used": "bm25",
        "reason": "",
    }


def test_settings_that_print_alike_are_not_the_same(offer: Callable[..., Registry]) -> None:
    class Hidden(BaseModel):
        seed: int = Field(default=0, repr=False)

    class Opaque:
        def __repr__(self) -> str:
            return "opaque"

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    registry = offer({"mine": [spec("bm25", config=Hidden), spec("open")]})
    seeds = [registry.get("retrieval", "bm25", {"seed": seed}).config.seed for seed in (1, 2)]
    assert seeds == [1, 2]
    np = pytest.importorskip("numpy")
    values = (1, True, 1.0, Opaque(), Opaque(), np.arange(2000), np.arange(2000) % 1999)
    for value in values:
        assert registry.get("retrieval", "open", {"value": [value]}).config["value"][0] is value
        provider = registry.get("retrieval", "open", {"value": [value]})
        assert registry.get("retrieval", "open", {"value": [value]}) is provider


def test_a_factory_may_be_named_and_is_resolved_on_first_use(
    offer: Callable[..., Registry], write: Callable[[str, str], Path], folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write("late_factory.py", "def make(config):\n    return 'made'\n")
    monkeypatch.syspath_prepend(str(folder))
    registry = offer({"mine": [spec("bm25", factory="late_factory:make")]})
    assert "late_factory" not in sys.modules
    assert registry.get("retrieval", "bm25") == "made"


def test_the_section_of_the_profile_is_the_default_config(
    offer: Callable[..., Registry],
) -> None:
    profile = validate(Source.from_dict({"model": {"d_model": 64, "tva": {"r": 4}}})).require()
    registry = offer({"mine": [spec("bm25", section="model.tva")]}, profile=profile)
    assert registry.get("retrieval", "bm25").config.r == 4
    assert registry.get("retrieval", "bm25", {"r": 8}).config == {"r": 8}


@pytest.mark.parametrize(
    ("config", "key", "text"),
    [
        ({"widht": 3}, "retrieval:bm25.widht", "did you mean 'width'?"),
        ({"width": "wide"}, "retrieval:bm25.width", "must be a whole number, not the text 'wide'"),
        ([1, 2], "retrieval:bm25", "settings are a mapping, not list"),
    ],
)
def test_an_invalid_config_is_bad_input(
    offer: Callable[..., Registry], config: Any, key: str, text: str
) -> None:
    registry = offer({"mine": [spec("bm25", config=Settings), a_default()]})
    with pytest.raises(ConfigError) as caught:
        registry.get("retrieval", "bm25", config)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert text in str(problem)


# Building ------------------------------------------------------------------------------------


def test_the_first_plugin_that_answers_builds(
    offer: Callable[..., Registry], manager: PluginManager, plugin_of: type
) -> None:
    asked: list[Any] = []

    def declines(spec: ProviderSpec, config: Any) -> Any:
        asked.append((spec.key, spec.plugin, config))

    def fails(spec: ProviderSpec) -> Any:
        raise ValueError("broken")

    manager.register(plugin_of(apt_build_provider=declines), "a")
    manager.register(plugin_of(apt_build_provider=fails), "bad")
    manager.register(plugin_of(apt_build_provider=lambda spec: "instead"), "c")
    registry = offer({"mine": [spec("bm25")]})
    assert registry.get("retrieval", "bm25", {"k": 1}) == "instead"
    assert asked == [("retrieval:bm25", "mine", {"k": 1})]
    assert manager.records["bad"].state == "quarantined"


@pytest.mark.parametrize(
    ("facts", "reason", "failures"),
    [
        ({"requires": ("no-such-package>=2",)}, "no-such-package is not installed", 0),
        ({"factory": "no_such_module:Provider"}, "No module named 'no_such_module'", 0),
        ({"config": "no_such_module:Settings"}, "No module named 'no_such_module'", 0),
        ({"factory": raising(ImportError("needs cuda"))}, "needs cuda", 0),
        ({"factory": raising(ValueError("broken"))}, "building it failed: ValueError: broken", 1),
        ({"factory": raising(SystemExit(1))}, "building it failed: SystemExit: 1", 1),
        ({"factory": raising(StopTraining())}, "building it failed: StopTraining: ", 1),
        ({"factory": "json:no_such_name"}, "building it failed: AttributeError: ", 1),
        ({"config": "json:no_such_name"}, "building it failed: AttributeError: ", 1),
    ],
)
def test_what_cannot_be_used_falls_back_with_the_reason(
    offer: Callable[..., Registry],
    manager: PluginManager,
    plugin_of: type,
    caplog: pytest.LogCaptureFixture,
    facts: dict[str, Any],
    reason: str,
    failures: int,
) -> None:
    told: list[FallbackEvent] = []
    manager.register(plugin_of(on_provider_fallback=lambda event: told.append(event)), "listener")
    registry = offer({"mine": [spec("bm25", **facts)], "safe": [a_default()]})
    assert isinstance(registry.get("retrieval", "bm25"), Other)
    resolution = registry.resolutions["retrieval", "bm25"]
    assert (resolution.asked, resolution.used) == ("bm25", "safe")
    assert reason in resolution.reason
    assert told == [FallbackEvent("retrieval", "bm25", "safe", resolution.reason)]
    assert caplog.messages[-1] == (f"retrieval: bm25 not usable ({resolution.reason}): using safe")
    record = manager.records["mine"]
    assert [failure.hook for failure in record.failures] == ["apt_build_provider"] * failures
    assert record.state == ("quarantined" if failures else "active")
    registry.get("retrieval", "bm25")
    assert len(told) == 1


def test_a_factorys_failure_is_placed_in_the_plugins_file(
    manager: PluginManager, load_source: Callable[..., Any], write: Callable[[str, str], Path]
) -> None:
    write("layers_of_mine.py", "import json\n\n\ndef make(config):\n    return json.loads('{')\n")
    source = (
        "from apt_core import ProviderSpec, hookimpl\n\n"
        "def direct(config):\n    raise ValueError('broken')\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('retrieval', 'direct', direct),\n"
        "            ProviderSpec('retrieval', 'named', 'layers_of_mine:make')]\n"
    )
    manager.register(load_source("mine", source), "mine")
    sys.path.append(".")
    for name in ("direct", "named"):
        with pytest.raises(ProviderError):
            Registry(manager).get("retrieval", name)
        manager.set_state("mine", "active")
    wheres = [Path(failure.where).name for failure in manager.records["mine"].failures]
    assert wheres == ["mine.py:4", "layers_of_mine.py:5"]


def test_bad_input_that_a_factory_finds_is_no_failure(
    offer: Callable[..., Registry], manager: PluginManager
) -> None:
    refusal = ConfigError("width must be even")
    registry = offer({"mine": [spec("bm25", factory=raising(refusal)), a_default()]})
    with pytest.raises(ConfigError, match="width must be even"):
        registry.get("retrieval", "bm25")
    assert manager.records["mine"].failures == []


def test_the_probe_decides_whether_a_provider_works_here(
    offer: Callable[..., Registry],
) -> None:
    def probe(spec: ProviderSpec, provider: Any, config: Any) -> str | None:
        return "no GPU" if spec.name == "bm25" else None

    registry = offer({"mine": [spec("bm25"), a_default()]}, probe=probe)
    assert isinstance(registry.get("retrieval", "bm25"), Other)
    assert registry.resolutions["retrieval", "bm25"].reason == "no GPU"


def test_a_default_of_a_plugin_that_cannot_be_used_falls_back_to_the_cores(
    offer: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = offer({"mine": [spec("mine", "tokenizer", default=True, requires=("no-such",))]})
    assert registry.known.default("tokenizer").plugin == "mine"  # type: ignore[union-attr]
    registry = offer({"norms": [spec("mine", "norm", default=True, requires=("no-such",))]})
    core = registry.spec("norm", "rmsnorm")
    monkeypatch.setitem(registry.known._specs, ("norm", "rmsnorm"), replace(core, factory=Other))
    assert isinstance(registry.get("norm"), Other)
    assert registry.resolutions["norm", "mine"].used == "rmsnorm"


def test_the_default_takes_what_it_knows_of_the_settings_in_a_section_of_both(
    offer: Callable[..., Registry],
) -> None:
    class Wider(BaseModel):
        width: int = 3
        window: int = 8

    asked = spec("bm25", config=Wider, section="retriever", requires=("no-such",))
    registry = offer({"mine": [asked, a_default(config=Settings, section="retriever")]})
    settings = Wider(width=5)
    assert registry.get("retrieval", "bm25", settings).config == Settings(width=5)


# No fallback ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dataset", "tokenizer"])
def test_text_and_ids_are_never_replaced(offer: Callable[..., Registry], kind: str) -> None:
    registry = offer({"mine": [spec("gone", kind, requires=("no-such-package",))]})
    with pytest.raises(ProviderError, match=rf"{kind}:gone \(plugin mine\) cannot be used: no-su"):
        registry.get(kind, "gone")


@pytest.mark.parametrize(
    ("strict", "fallback", "because"),
    [(True, True, "--strict is on"), (False, False, "fallback=False")],
)
def test_a_fallback_that_is_not_allowed_is_an_error(
    offer: Callable[..., Registry], strict: bool, fallback: bool, because: str
) -> None:
    registry = offer({"mine": [spec("bm25", requires=("no-such",)), a_default()]}, strict)
    with pytest.raises(ConfigError) as caught:
        registry.get("retrieval", "bm25", fallback=fallback)
    (problem,) = caught.value.problems
    assert problem.hint == "ask for safe"
    assert because in problem.message


def test_a_fallback_that_happened_before_is_not_handed_out_where_none_is_allowed(
    offer: Callable[..., Registry],
) -> None:
    registry = offer({"mine": [spec("bm25", requires=("no-such",)), a_default()]})
    assert isinstance(registry.get("retrieval", "bm25"), Other)
    with pytest.raises(ConfigError, match="no fallback is allowed"):
        registry.get("retrieval", "bm25", fallback=False)


def test_a_failing_factory_stops_a_strict_run(offer: Callable[..., Registry]) -> None:
    registry = offer({"mine": [spec("bm25", factory=raising(ValueError())), a_default()]}, True)
    with pytest.raises(PluginError) as caught:
        registry.get("retrieval", "bm25")
    assert (caught.value.plugin, caught.value.hook) == ("mine", "apt_build_provider")


def test_a_default_that_cannot_be_used_either_is_an_error(
    offer: Callable[..., Registry],
) -> None:
    broken = [spec("bm25", requires=("no-such",)), a_default(requires=("nor-such",))]
    with pytest.raises(ProviderError, match=r"no-such is not.*nor is the default safe: nor-such"):
        offer({"mine": broken}).get("retrieval", "bm25")


def test_a_provider_of_a_blocked_plugin_falls_back_and_says_so() -> None:
    gone = [
        spec("bm25", plugin="gone", config="no_such_module:Settings"),
        spec("t", "tokenizer", plugin="gone"),
    ]
    reason = "its plugin gone is blocked"
    known = Catalogue([("mine", [a_default()])], [(each, reason) for each in gone])
    registry = Registry(known=known)
    assert registry.spec("retrieval", "bm25").plugin == "gone"
    assert isinstance(registry.get("retrieval", "bm25"), Other)
    assert registry.resolutions["retrieval", "bm25"] == Resolution(
        "retrieval", "bm25", "safe", reason
    )
    with pytest.raises(ProviderError, match=r"tokenizer:t \(plugin gone\)"):
        registry.get("tokenizer", "t")


def test_what_can_be_told_without_torch(offer: Callable[..., Registry]) -> None:
    registry = offer({"mine": [spec("a"), spec("b", requires=("no-such",))]})
    assert usable(registry.spec("norm", "rmsnorm")) == (True, "")
    assert usable(registry.spec("retrieval", "a")) == (None, "")
    can_be_used, reason = usable(registry.spec("retrieval", "b"))
    assert (can_be_used, reason.split(" (")[0]) == (False, "no-such is not installed")


# Scripts -------------------------------------------------------------------------------------


class Mine(Provider):
    name, version, dependencies = "mine", "1.2", ("pluggy>=1",)


class Asks:
    """A provider that needs an instance to tell its version."""

    def __init__(self, config: Any = None) -> None:
        self.number = 3

    def get_version(self) -> str:
        return f"v{self.number}"

    @classmethod
    def get_dependencies(cls) -> list[str]:
        return ["pluggy"]


def test_a_script_registers_a_class_and_gets_it_built() -> None:
    registry = Registry()
    registry.register("retrieval", "mine", Mine, default=True, excludes=("norm:rmsnorm",))
    provider = registry.get("retrieval", "mine", {"r": 4})
    assert (type(provider), provider.config) == (Mine, {"r": 4})
    info = registry.get_info("retrieval", "mine")
    assert (info["version"], info["dependencies"], info["is_default"]) == (
        "1.2",
        ["pluggy>=1"],
        True,
    )
    assert isinstance(registry.get("retrieval"), Mine)
    assert len(registry.check_conflicts(["retrieval:mine", "norm:rmsnorm"])) == 1
    registry.register("retrieval", "asks", Asks)
    info = registry.get_info("retrieval", "asks")
    assert (info["version"], info["dependencies"]) == ("", ["pluggy"])


def test_registering_the_same_class_again_changes_nothing() -> None:
    registry = Registry()
    registry.register("retrieval", "mine", Mine)
    before = registry.get_info("retrieval", "mine")
    registry.register("retrieval", "mine", Mine, default=True)
    assert registry.get_info("retrieval", "mine") == before
    with pytest.raises(ConfigError, match="is registered by both"):
        registry.register("retrieval", "mine", Other)
    with pytest.raises(ConfigError, match="unknown kind"):
        registry.register("atention", "mine", Mine)


def test_the_process_wide_registry_is_made_on_first_use() -> None:
    code = (
        "import apt_core.registry as module\n"
        "assert 'registry' not in vars(module)\n"
        "from apt_core.registry import registry\n"
        "assert module.registry is registry and registry.has('attention', 'tva_default')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
