"""Listings tell the truth about plugins that are there and plugins that would run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_core.inspect.listing import implementation_rows, plugin_rows, provider_rows, survey
from apt_core.inspect.tracing import traced
from apt_core.plugin_manager import PluginManager

HEAD = "from apt_core import PluginInfo, ProviderSpec, hookimpl\n\n"
PROVIDERS = "@hookimpl\ndef apt_register_providers():\n    return []\n"
OBSERVER = "@hookimpl\ndef on_step_end(step):\n    pass\n"

Install = Callable[..., None]


def states(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["name"]: row["state"] for row in rows}


def test_plugins_that_conflict_are_available_side_by_side(install: Install) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        install(name, f"{HEAD}PLUGIN = PluginInfo(conflicts=({other!r},))\n")
    assert states(plugin_rows(survey())) == {"one": "available", "two": "available"}
    assert states(plugin_rows(survey(plugins=["one"]))) == {"one": "active", "two": "available"}
    assert states(plugin_rows(survey(plugins=["one,two"]))) == {"one": "active", "two": "broken"}


def test_the_priority_of_a_profile_shows_in_every_hook(
    install: Install, write: Callable[[str, str], Path]
) -> None:
    for name in ("one", "two"):
        install(name, HEAD + PROVIDERS + OBSERVER)
    profile = write("mine.yaml", "extends: base\nplugins: [one, {name: two, priority: 5}]\n")
    rows = implementation_rows(survey(str(profile)))
    assert [(row["hook"], row["plugin"], row["priority"]) for row in rows] == [
        ("apt_register_providers", "two", 5),
        ("apt_register_providers", "one", 50),
        ("on_step_end", "two", 5),
        ("on_step_end", "one", 50),
    ]


def test_a_plugin_that_waits_for_its_schedule_is_dormant(
    install: Install, write: Callable[[str, str], Path]
) -> None:
    install("later", HEAD + OBSERVER)
    install("now", HEAD + OBSERVER)
    profile = write(
        "mine.yaml",
        "extends: base\nplugins: [later, now]\n"
        "schedules: {enable_later_at_epoch: 2, enable_now_at_epoch: 1}\n",
    )
    assert states(plugin_rows(survey(str(profile)))) == {"later": "dormant", "now": "active"}


@pytest.mark.parametrize("source", ["import no_such_module\n", "import sys\nsys.exit()\n"])
def test_a_broken_plugin_is_listed_with_the_reason(install: Install, source: str) -> None:
    install("bad", source)
    (row,) = plugin_rows(survey())
    assert (row["state"], row["dist"], row["version"]) == ("broken", "apt-bad", "1.0")
    (failure,) = row["failures"]
    assert failure["hook"] == "import"
    assert failure["where"].endswith(f"/apt_installed_bad.py:{source.count(chr(10))}")


def test_providers_of_available_plugins_are_listed(install: Install) -> None:
    install(
        "norms",
        HEAD + "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('norm', 'mine', 'x:y', requires=('no-such-package',))]\n",
    )
    rows = {row["name"]: row for row in provider_rows(survey(plugins=["no:other"]), "norm")}
    assert list(rows) == ["rmsnorm", "layernorm", "mine"]
    assert (rows["mine"]["plugin"], rows["mine"]["usable"]) == ("norms", False)
    assert rows["rmsnorm"]["default"] is True


def test_tracing_times_the_calls_of_managers_made_inside(plugin_of: type) -> None:
    with traced() as rows:
        manager = PluginManager()
        manager.register(plugin_of(on_step_end=lambda step: None), "mine")
        manager.register(plugin_of(on_step_end=lambda: 1 / 0), "bad")
        for step in range(2):
            manager.hook.on_step_end(step=step, loss=0.0, trainer=None)
        assert {(row.hook, row.plugin): row.calls for row in rows()} == {
            ("on_step_end", "mine"): 2,
            ("on_step_end", "bad"): 2,
        }
    assert manager.records["bad"].failures[0].where.startswith(__file__)
    other = PluginManager()
    other.register(plugin_of(on_step_end=lambda step: None), "mine")
    other.hook.on_step_end(step=1, loss=0.0, trainer=None)
    assert sum(row.calls for row in rows()) == 4
