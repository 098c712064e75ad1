"""boot(): the whole profile is checked with its plugins, and every problem comes at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import profiles
from apt_core import ConfigError, SectionSpec
from apt_core.config import InactiveKey, Override
from apt_core.errors import PluginError, Problem
from apt_core.kernel import Kernel, boot
from apt_core.plugin_manager import PluginManager

HEAD = """\
from pydantic import BaseModel

from apt_core import ConfigError, ProviderSpec, SectionSpec, hookimpl

class Settings(BaseModel):
    strength: float = 0.5

"""
OBSERVER = HEAD + "@hookimpl\ndef on_step_end(step):\n    pass\n"
MOE = HEAD.replace("strength", "enabled: bool = True\n    strength") + (
    "@hookimpl\ndef apt_register_config():\n"
    "    return [SectionSpec('model.moe', Settings, ('moe_capacity',)),\n"
    "            SectionSpec('experts', Settings, ('route_temp',))]\n"
)
NORM = HEAD + (
    "@hookimpl\ndef apt_register_providers():\n"
    "    return [ProviderSpec('norm', 'mine', 'no_such_module:Norm')]\n"
)
IMPORT_ERROR = "import no_such_module\n"
CURRICULUM = {
    "model": {"moe": {"enabled": True}},
    "schedules": {
        "enable_moe_at_epoch": 2,
        "moe_capacity": {"start": 1.5, "end": 1.1},
        "route_temp": 0.5,
    },
}
Install = Callable[..., None]
Write = Callable[[str, str], Path]


def start(profile: Mapping[str, Any] | str | Path = {}, *plugins: str, **options: Any) -> Kernel:  # noqa: B006
    return boot(profile, plugins=plugins, files=False, **options)


def problems(*arguments: Any, **options: Any) -> dict[str, Problem]:
    """The problems of a profile that is refused, by key."""
    with pytest.raises(ConfigError) as caught:
        start(*arguments, **options)
    assert caught.value.exit_code == 2
    return {problem.key: problem for problem in caught.value.problems}


def states(kernel: Kernel) -> dict[str, str]:
    return {name: record.state for name, record in kernel.manager.records.items()}


# Activating ----------------------------------------------------------------------------------


def test_a_profile_without_plugins_has_none_and_the_cores_providers(install: Install) -> None:
    install("moe", MOE)
    kernel = start()
    assert (states(kernel), kernel.notices, kernel.inactive) == ({}, [], [])
    assert ("attention", "tva_default") in kernel.providers


def test_no_positions_is_no_provider() -> None:
    named = boot({"model": {"position_name": "none"}}).providers
    assert "position" not in {kind for kind, _ in named}


def test_a_pattern_takes_the_place_of_the_attention() -> None:
    model = {"attention_name": "tva_default", "attention_pattern": ["mha"]}
    named = boot({"model": model}).providers
    attentions = {name: key for (kind, name), key in named.items() if kind == "attention"}
    assert attentions == {"mha": "model.attention_pattern"}


@pytest.mark.parametrize("key", ["model.tva.rank", "model.tva", "model.vft.r"])
def test_settings_of_the_command_line_for_what_is_not_used_are_inactive(key: str) -> None:
    value = {"rank": 4} if key == "model.tva" else 4
    vain = Override(tuple(key.split(".")), value, f"--{key}")
    profile = {"model": {"attention_name": "mha"}}
    (inactive,) = boot(profile, overrides=[vain]).inactive
    provider = "ffn:vft" if "vft" in key else "attention:tva_default"
    key = "model.tva.rank" if key == "model.tva" else key
    assert (inactive.key, inactive.reason) == (key, f"{provider} is not used")
    with pytest.raises(ConfigError, match="does nothing here"):
        boot(profile, overrides=[vain], strict=True)
    assert boot(profile, strict=True).inactive == []


@pytest.mark.parametrize("name", ["tva_default", "fancy"])
@pytest.mark.parametrize("blocked", [[], ["no:fancy"]])
def test_settings_of_what_is_used_or_may_be_fallen_back_on_are_active(
    install: Install, name: str, blocked: list[str]
) -> None:
    install("fancy", NORM.replace("'norm', 'mine'", "'attention', 'fancy'"))
    overrides = [Override(("model", "tva", "rank"), 4, ""), Override(("model", "rope"), {}, "")]
    profile = {"model": {"attention_name": name}}
    assert boot(profile, overrides=overrides, plugins=blocked).inactive == []


def test_a_run_activates_what_the_profile_and_the_command_line_name(
    install: Install, write: Write
) -> None:
    for name in ("a", "b", "c", "d"):
        install(name, OBSERVER)
    write("own.py", OBSERVER)
    listed = ["a", {"name": "b", "priority": 10, "on_failure": "required"}]
    kernel = start({"plugins": listed}, "c,./own.py", "no:a")
    assert states(kernel) == {"a": "blocked", "b": "active", "c": "active", "own": "active"}
    record = kernel.manager.records["b"]
    assert (record.priority, record.on_failure, record.dist) == (10, "required", "apt-b")
    assert [call.plugin for call in kernel.manager.order("on_step_end")] == ["b", "c", "own"]
    named = [plugin.name for plugin in kernel.config.plugins]
    assert named == ["b", "c", str(Path("own.py").resolve())]


def test_a_plugin_by_its_dotted_module_from_the_working_directory(write: Write) -> None:
    write("ideas_of_mine/__init__.py", "")
    write("ideas_of_mine/idea.py", OBSERVER)
    kernel = start({}, "ideas_of_mine.idea")
    assert states(kernel) == {"idea": "active"}
    assert sys.path[-1] == str(Path.cwd())


def test_looking_for_a_module_in_vain_leaves_the_path_alone() -> None:
    before = list(sys.path)
    assert "plugin no_such_idea" in problems({}, "no_such_idea")
    assert sys.path == before


def test_a_relative_path_in_a_profile_is_found_beside_it(write: Write) -> None:
    write("profiles/own.py", OBSERVER)
    path = write("profiles/mine.yaml", "extends: tiny_debug\nplugins: [./own.py]\n")
    assert states(start(path)) == {"own": "active"}
    assert states(start(path, "profiles/own.py")) == {"own": "active"}


def test_plugins_that_are_registered_already_are_asked_too(plugin_of: type) -> None:
    manager = PluginManager()
    declared = [SectionSpec(schedule_params=("noise",))]
    manager.register(plugin_of(apt_register_config=lambda: declared), "mine")
    kernel = start({"schedules": {"noise": 0.5}}, manager=manager)
    assert kernel.schedule.get_param("noise", epoch=1) == 0.5
    manager = PluginManager()
    manager.register(plugin_of(apt_register_config=lambda: declared), "mine")
    kernel = start({"schedules": {"noise": 0.5}}, "no:mine", manager=manager)
    assert states(kernel) == {"mine": "blocked"}
    assert not manager.has_plugin("mine")
    assert [key.key for key in kernel.inactive] == ["schedules.noise"]


def test_a_provider_of_an_installed_plugin_activates_it_and_says_so(install: Install) -> None:
    install("norms", NORM)
    install("other", OBSERVER)
    kernel = start({"model": {"norm_name": "mine"}})
    assert states(kernel) == {"norms": "active"}
    assert kernel.notices == ["plugin norms activated: the profile names norm:mine"]
    assert kernel.registry.spec("norm", "mine").plugin == "norms"


def test_a_key_of_a_plugins_section_that_names_a_provider_activates_its_plugin_too(
    install: Install,
) -> None:
    install("norms", NORM)
    own = (
        "class Own(BaseModel):\n    judge: str = 'rmsnorm'\n\n"
        "@hookimpl\ndef apt_register_config():\n"
        "    return [SectionSpec('judging', Own, names={'judge': 'norm'})]\n"
    )
    install("judging", HEAD + own)
    kernel = start({"judging": {"judge": "mine"}}, "judging")
    assert states(kernel) == {"judging": "active", "norms": "active"}
    assert kernel.providers["norm", "mine"] == "judging.judge"
    wrong = problems({"judging": {"judge": "nobody"}}, "judging")["judging.judge"]
    assert "no plugin offers norm provider 'nobody'" in wrong.message


def test_a_provider_of_a_blocked_plugin_is_known_and_falls_back(install: Install) -> None:
    install("norms", NORM)
    kernel = start({"model": {"norm_name": "mine"}}, "no:norms")
    assert states(kernel) == {"norms": "blocked"}
    with pytest.raises(ConfigError, match="its plugin norms is blocked"):
        kernel.registry.get("norm", "mine", fallback=False)


# Problems ------------------------------------------------------------------------------------


def test_every_problem_comes_at_once(install: Install) -> None:
    install("broken", IMPORT_ERROR)
    install("one", NORM)
    install("two", NORM)
    found = problems(
        {
            "plugins": ["mooe", "broken", "one", "two"],
            "model": {"attention_name": "tva_defualt"},
            "training": {"max_epochs": 3},
            "schedules": {"enable_voter_at_epoch": 2, "moe_capacity": 1.0},
        },
    )
    assert set(found) == {
        "plugin mooe",
        "plugin broken",
        "plugin two",
        "model.attention_name",
        "schedules.enable_voter_at_epoch",
    }
    assert "did you mean 'tva_default'?" in str(found["model.attention_name"])
    assert "--plugin no:mooe" in str(found["plugin mooe"])
    assert "No module named 'no_such_module'" in str(found["plugin broken"])
    assert found["plugin broken"].where.endswith("apt_installed_broken.py:1")
    assert "registered by both 'one' and 'two'" in str(found["plugin two"])


def test_a_misspelt_key_does_not_hide_a_missing_plugin() -> None:
    found = problems({"plugins": ["nothing_like_it"], "model": {"d_modle": 3}, "training": 5})
    assert set(found) == {"plugin nothing_like_it", "model.d_modle", "training"}
    assert "did you mean 'd_model'?" in str(found["model.d_modle"])


def test_how_to_do_without_a_listed_plugin_is_said_beside_a_suggestion(tmp_path: Path) -> None:
    """A run whose plugin's file is gone lists it still."""
    (tmp_path / "my_logger.py").write_text("")
    gone = str(tmp_path / "my_loger.py")
    (listed,) = problems({"plugins": [gone]}).values()
    assert listed.hint == "did you mean 'my_logger.py'?; leave it out with --plugin no:my_loger"
    (given,) = problems({}, gone).values()
    assert given.hint == "did you mean 'my_logger.py'?"


def test_two_distributions_with_one_name_are_named_both(install: Install) -> None:
    install("moe", MOE)
    install("moe", MOE, dist="other-moe", module="apt_other_moe")
    (problem,) = problems({"plugins": ["moe"]}).values()
    assert "two distributions offer a plugin of this name: apt-moe and other-moe" in str(problem)
    assert problems({}, "no:moe", "no_such").keys() == {"plugin no_such"}


def test_one_name_for_two_plugins(write: Write) -> None:
    write("one/idea.py", OBSERVER)
    write("two/idea.py", OBSERVER)
    (problem,) = problems({"plugins": ["one/idea.py"]}, "two/idea.py").values()
    assert problem.key == "plugin idea"
    assert "both 'one/idea.py' and 'two/idea.py' would have this name" in problem.message


def test_one_plugin_named_twice_is_one_plugin(write: Write) -> None:
    path = write("idea.py", OBSERVER)
    listed = {"plugins": [{"name": "./idea.py", "priority": 5}]}
    kernel = start(listed, "idea.py", str(path), f"{path},idea.py")
    assert states(kernel) == {"idea": "active"}
    assert kernel.manager.records["idea"].priority == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (IMPORT_ERROR, "it cannot be imported: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", "it called sys.exit(3) when imported"),
        ("def broken(:\n", "it cannot be imported: SyntaxError"),
        ("import sys\ndel sys.modules[__name__]\n1/0\n", "ZeroDivisionError"),
        (HEAD + "@hookimpl\ndef on_step(step): ...\n", "there is no hook of this name"),
        (
            HEAD + "@hookimpl\ndef apt_register_config():\n    raise ValueError('no')\n",
            "apt_register_config failed: ValueError: no",
        ),
        (
            HEAD + "@hookimpl\ndef apt_register_providers():\n    return [3]\n",
            "apt_register_providers failed: TypeError: it returned a list with a int",
        ),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_broken_plugin_is_bad_input_unless_the_profile_isolates_it(
    write: Write, source: str, message: str, strict: bool
) -> None:
    write("mine.py", source)
    (problem,) = problems({"plugins": ["mine.py"]}, strict=strict).values()
    assert message in problem.message
    assert "mine.py" in problem.where or "plugins" in problem.where or problem.where == "profile"
    isolated = {"plugins": [{"name": "mine.py", "on_failure": "isolate"}]}
    if strict:
        (problem,) = problems(isolated, strict=True).values()
        assert message in problem.message
        return
    kernel = start(isolated)
    record = kernel.manager.records["mine"]
    assert (record.state, len(record.failures)) == ("broken", 1)
    assert kernel.notices == [f"plugin mine is broken: {record.reason}"]
    assert not kernel.manager.has_plugin("mine")


@pytest.mark.parametrize("where", ["__init__", "plugin"])
@pytest.mark.parametrize(
    "line", ["raise RuntimeError('no')", "raise SystemExit(2)", "import no_such_module"]
)
def test_a_package_that_cannot_be_imported_is_no_unknown_plugin(
    write: Write, where: str, line: str
) -> None:
    write("package_of_mine/__init__.py", "")
    write("package_of_mine/plugin.py", OBSERVER)
    write(f"package_of_mine/{where}.py", f"\n{line}\n")
    (problem,) = problems({}, "package_of_mine.plugin").values()
    assert problem.where == f"package_of_mine/{where}.py:2"
    assert "no such plugin" not in problem.message


@pytest.mark.parametrize("reference", ["ideas", "./ideas", "ideas/"])
def test_a_folder_is_no_plugin(write: Write, reference: str) -> None:
    """It imports, as a namespace package without a hook."""
    write("ideas/mine.py", OBSERVER)
    (problem,) = problems({}, reference).values()
    assert "ideas is a folder" in problem.message
    assert problem.hint in ("in it: ideas.mine", "in it: ideas/mine.py")
    assert start({}, "ideas.mine").manager.has_plugin("mine")


def test_a_pre_registered_plugin_that_cannot_declare_is_bad_input(plugin_of: type) -> None:
    def fails() -> Any:
        raise ValueError("no")

    for strict in (False, True):
        manager = PluginManager(strict=strict)
        manager.register(plugin_of(apt_register_providers=fails), "mine")
        (problem,) = problems({}, manager=manager, strict=strict).values()
        assert problem.message == "apt_register_providers failed: ValueError: no"


def test_a_plugin_may_refuse_the_profile(write: Write) -> None:
    write("mine.py", HEAD + "@hookimpl\ndef apt_configure(config):\n    raise ConfigError('no')\n")
    with pytest.raises(ConfigError, match="plugin mine: no"):
        start({}, "mine.py")


def test_a_failure_while_configuring_is_a_failure_of_the_plugin(write: Write) -> None:
    write("mine.py", HEAD + "@hookimpl\ndef apt_configure(config):\n    raise ValueError('no')\n")
    assert states(start({}, "mine.py")) == {"mine": "quarantined"}
    with pytest.raises(PluginError, match=r"plugin mine failed in apt_configure .*mine\.py:10"):
        start({}, "mine.py", strict=True)


def test_a_plugin_that_changes_the_model_cannot_be_disabled(write: Write) -> None:
    source = HEAD + "@hookimpl\ndef apt_transform_model(model):\n    return None\n"
    write("mine.py", source)
    schedules = {"enable_mine_at_epoch": 1, "disable_mine_at_epoch": 2}
    found = problems({"schedules": schedules}, "mine.py")
    assert set(found) == {"schedules.disable_mine_at_epoch"}
    assert "cannot be taken back" in found["schedules.disable_mine_at_epoch"].message


def test_a_schedule_of_a_plugin_that_nobody_blocked_is_an_error(install: Install) -> None:
    install("moe", MOE)
    found = problems(CURRICULUM)
    assert set(found) == {
        "schedules.enable_moe_at_epoch",
        "schedules.moe_capacity",
        "schedules.route_temp",
    }


# Blocking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("how", ["installed", "not installed", "a file", "not importable"])
def test_blocking_a_plugin_makes_its_keys_inert(
    install: Install, write: Write, strict: bool, how: str
) -> None:
    source = IMPORT_ERROR if how == "not importable" else MOE
    profile: dict[str, Any] = {**CURRICULUM, "plugins": ["moe"]}
    if how == "a file":
        write("parts/moe.py", source)
        profile["plugins"] = ["parts/moe.py"]
    elif how != "not installed":
        install("moe", source)
    if how in ("installed", "a file"):
        profile["experts"] = {"strength": 0.1}
    kernel = start(profile, "no:moe", strict=strict)
    assert states(kernel) == {"moe": "blocked"}
    inert = {key.key for key in kernel.inactive}
    assert {
        "model.moe",
        "schedules.enable_moe_at_epoch",
        "schedules.moe_capacity",
        "schedules.route_temp",
    } <= inert
    assert ("experts" in inert) == ("experts" in profile)
    assert {key.reason for key in kernel.inactive if key.key == "model.moe"} == {
        "plugin moe is blocked"
    }
    assert kernel.config.plugins == ()


@pytest.mark.parametrize("strict", [False, True])
def test_the_whole_curriculum_runs_with_every_plugin_blocked(strict: bool) -> None:
    text = Path(profiles.__file__).with_name("gpt5_moe_reasoning.yaml").read_text(encoding="utf-8")
    profile = yaml.safe_load(text)
    for section in ("monitoring", "hardware", "debug"):
        del profile[section]
    del profile["training"]["amp_level"], profile["evaluation"]
    profile["data"] = {"train_path": "x.jsonl", "val_path": "y.jsonl"}
    profile["training"]["learning_rate"] = 3e-5
    kernel = start(profile, "no:moe,no:align,no:routing,no:voter", strict=strict)
    inert = {key.key for key in kernel.inactive}
    assert {"model.moe", "model.bistate", "model.voting"} <= inert
    assert {f"schedules.{key}" for key in profile["schedules"]} <= inert


def test_other_inactive_keys_stay_errors_under_strict(install: Install) -> None:
    install("moe", MOE)
    profile = {**CURRICULUM, "plugins": ["moe"], "monitoring": {"wandb": {"enabled": True}}}
    assert problems(profile, "no:moe", strict=True).keys() == {"monitoring.wandb.enabled"}
    start(profile, "no:moe", "no:wandb", strict=True)


def test_a_blocked_plugin_is_imported_only_where_its_keys_must_be_told(
    install: Install, folder: Path
) -> None:
    mark = "from pathlib import Path\nPath('imported').touch()\n"
    install("moe", mark + MOE)
    start({"plugins": ["moe"]}, "no:moe")
    assert not (folder / "imported").exists()
    start({**CURRICULUM, "plugins": ["moe"]}, "no:moe")
    assert (folder / "imported").exists()


@pytest.mark.parametrize("reference", ["no:moe", "no: moe", "no:parts/moe.py", "a.py, no:moe"])
def test_a_plugin_is_blocked_by_name_or_path(write: Write, reference: str) -> None:
    write("a.py", OBSERVER)
    kernel = start({"plugins": ["moe"]}, reference)
    assert states(kernel)["moe"] == "blocked"


def test_an_isolated_broken_plugin_leaves_its_keys_inert(install: Install) -> None:
    install("moe", IMPORT_ERROR)
    profile = {**CURRICULUM, "plugins": [{"name": "moe", "on_failure": "isolate"}]}
    kernel = start(profile)
    assert states(kernel) == {"moe": "broken"}
    assert {key.key for key in kernel.inactive} == {
        "model.moe",
        *(f"schedules.{key}" for key in CURRICULUM["schedules"]),
    }


def test_what_only_a_run_finds_inactive_is_kept_once_and_refused_when_strict() -> None:
    profile = {"training": {"amp_level": "O1"}}
    kernel = start(profile)
    (known,) = kernel.inactive
    found = [InactiveKey(known.key, "another reason"), InactiveKey("hardware.backend", "alone")]
    kernel.add_inactive(found)
    kernel.add_inactive(found)
    assert kernel.inactive == [known, found[1]]
    strict = start(strict=True)
    with pytest.raises(ConfigError) as caught:
        strict.add_inactive(found)
    # In the words of boot().
    refused = [str(problem).removeprefix("profile: ") for problem in caught.value.problems]
    (told,) = problems(profile, strict=True).values()
    assert (
        refused[1]
        == "hardware.backend: it does nothing here: alone (--strict allows no inactive key)"
    )
    assert refused[0].replace("another reason", known.reason) == str(told).removeprefix("profile: ")


CLASS = """\
from apt_core import PluginInfo, hookimpl

class Mine:
    PLUGIN = PluginInfo(summary="of the class")

    def __init__(self):
        self.seen = []

    @hookimpl
    def apt_configure(self, config):
        self.seen.append(config.training.seed)
"""


@pytest.mark.parametrize("attribute", ["Mine", ""])
def test_every_boot_makes_an_object_of_its_own(
    install: Callable[..., None], attribute: str
) -> None:
    install("own", CLASS + ("" if attribute else "\nPlugin = Mine\n"), attribute=attribute)
    managers = [
        boot({"plugins": ["own"], "training": {"seed": seed}}, files=False).manager
        for seed in (1, 2)
    ]
    assert [manager.get_plugin("own").seen for manager in managers] == [[1], [2]]
    assert {manager.records["own"].summary for manager in managers} == {"of the class"}
    assert all(len(manager.records["own"].source_sha256) == 64 for manager in managers)
