"""A plugin is one, however it is written: in the list, on the command line, in schedules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot

Install = Callable[..., None]
Write = Callable[[str, str], Path]

OBSERVER = "from apt_core import hookimpl\n\n\n@hookimpl\ndef on_step_end(step):\n    pass\n"
SPELLINGS = ("my-log", "my_log", "My-Log", "my-log.py", "./my-log.py", "elsewhere/my_log.py",
             "my_log.plugin", "ideas.my_log", " my-log ")  # fmt: skip


def start(listed: list[Any], *plugins: str, strict: bool = False, **profile: Any) -> Kernel:
    return boot({**profile, "plugins": listed}, plugins=plugins, strict=strict, files=False)


def states(kernel: Kernel) -> dict[str, str]:
    return {name: record.state for name, record in kernel.manager.records.items()}


@pytest.mark.parametrize("strict", [False, True])
def test_a_plugin_is_left_out_by_every_spelling_of_its_name(write: Write, strict: bool) -> None:
    write("my-log.py", OBSERVER)
    for spelling in SPELLINGS:
        kernel = start(["my-log.py"], f"no:{spelling}", strict=strict)
        assert states(kernel) == {"my_log": "blocked"}, spelling
        assert not kernel.manager.has_plugin("my_log")
        assert (kernel.config.plugins, kernel.notices) == ((), [])


def test_an_installed_plugin_is_meant_by_the_names_of_its_entry_point_and_distribution(
    install: Install,
) -> None:
    install("My-Log", OBSERVER, dist="logs-for-apt", module="apt_installed_my_log")
    for spelling in ("my_log", "My-Log", "MY_LOG", "logs-for-apt", "Logs_For_APT"):
        assert states(start([spelling])) == {"my_log": "active"}, spelling
        assert states(start(["my-log"], f"no:{spelling}")) == {"my_log": "blocked"}, spelling
    # Of two plugins of a distribution, its name means neither.
    install("other", OBSERVER, dist="logs-for-apt")
    with pytest.raises(ConfigError, match="no such plugin"):
        start(["logs-for-apt"])


def test_a_module_that_ends_in_the_name_of_an_installed_plugin_is_another_plugin(
    install: Install, write: Write
) -> None:
    install("idea", "raise ImportError\n")
    write("of_mine_alone/__init__.py", "")
    write("of_mine_alone/idea.py", OBSERVER)
    assert states(start(["of_mine_alone.idea"])) == {"idea": "active"}


@pytest.mark.parametrize("key", ["my-log", "My_Log", "my.log"])
def test_schedules_know_a_plugin_by_every_spelling(write: Write, key: str) -> None:
    write("my-log.py", OBSERVER)
    kernel = start(["my-log.py"], schedules={f"enable_{key}_at_step": 3})
    enabled = [kernel.schedule.should_enable_plugin("my_log", step=step) for step in (2, 3)]
    assert enabled == [False, True]


def test_what_leaves_nothing_out_is_told_and_an_error_where_it_may_be_misspelt(
    install: Install, write: Write
) -> None:
    write("my_log.py", OBSERVER)
    install("norms", OBSERVER)
    kernel = start(["my_log.py"], "no:my_lgo", "no:norms")
    assert [notice.split(" left nothing out: ") for notice in kernel.notices] == [
        ["--plugin no:my_lgo",
         "no plugin of this name is installed or listed (did you mean 'my_log'?)"],
        ["--plugin no:norms", "the profile does not ask for this plugin"],
    ]  # fmt: skip
    assert states(kernel) == {"my_log": "active", "norms": "blocked"}
    with pytest.raises(ConfigError, match="no:my_lgo left nothing out"):
        start(["my_log.py"], "no:my_lgo", strict=True)
    start(["my_log.py"], "no:norms", strict=True)
    for nothing, said in {
        "no:": "no: needs a name",
        "": "--plugin: needs the name of a plugin",
        ".": "'.' names no plugin",
    }.items():
        with pytest.raises(ConfigError, match=said):
            start([], nothing)


def test_options_of_a_plugin_that_is_named_twice_are_kept_or_refused(write: Write) -> None:
    path = write("a/bad.py", OBSERVER)
    required = {"name": "./a/bad.py", "on_failure": "required"}
    for listed in (
        ["a/bad.py", required],
        [required, "a/bad.py"],
        [required, {"name": str(path), "on_failure": "isolate"}],
        [required, {"name": "a/../a/bad.py", "on_failure": "required", "priority": 3}],
    ):
        with pytest.raises(ConfigError, match="plugin bad: named twice, with different options"):
            start(listed)
    for listed in ([required], [required, {**required, "name": "a/bad.py"}]):
        record = start(listed, "a/bad.py", str(path)).manager.records["bad"]
        assert record.on_failure == "required"


def test_a_list_names_what_runs() -> None:
    with pytest.raises(ConfigError, match=r"a list names what runs .*--plugin no:report"):
        start(["no:report"])
