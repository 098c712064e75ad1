"""Installed distributions: what ``apt-hooks plugins`` and a run say of each is the truth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.distributions.conftest import Environment

pytestmark = pytest.mark.long

MISSING = "no_such_package_for_apt"
BROKEN = {
    "import_error": (f"ModuleNotFoundError: No module named {MISSING!r}", "apt_import_error.py:5"),
    "exits": ("it called sys.exit(3) when imported", "apt_exits.py:7"),
    "misspelt": (
        "on_step_ends: there is no hook of this name (did you mean 'on_step_end'?)",
        "apt_misspelt.py:8",
    ),
    "twin": ("two distributions offer a plugin of this name: apt-twin-one and apt-twin-two", ""),
}
"""Plugins that cannot be used: what is said of each, and the line that it names."""

EVERYTHING = f"[counter, marked, {', '.join(BROKEN)}]"


def plugins(environment: Environment, *options: str, **variables: str) -> dict[str, Any]:
    done = environment.run("hooks", "plugins", "--json", *options, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return {row["name"]: row for row in json.loads(done.stdout)}


def train(environment: Environment, *options: str) -> tuple[Any, str]:
    """Train; returns the manifest and what was printed."""
    run = environment.folder / "run"
    done = environment.run("train", "--profile", "small.yaml", "--output", str(run), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return json.loads((run / "manifest.json").read_text()), done.stdout


def test_a_good_plugin_is_available_with_its_facts_and_its_provider(
    environment: Environment,
) -> None:
    row = plugins(environment)["counter"]
    facts = {key: row[key] for key in ("dist", "version", "state", "priority", "failures")}
    assert facts == {
        "dist": "apt-good",
        "version": "1.2.0",
        "state": "available",
        "priority": None,
        "failures": [],
    }
    assert row["summary"] == "counts steps and offers a norm" and row["load_ms"] > 0
    listed = environment.run("plugin-list")
    assert "norm:\n  - rmsnorm (default)\n  - good_norm\n" in listed.stdout


def test_a_good_plugin_is_active_in_a_run_that_names_it_and_its_numbers_count(
    environment: Environment,
) -> None:
    profile = environment.profile("[counter]")
    assert plugins(environment, "-p", profile)["counter"]["state"] == "active"
    manifest, printed = train(environment)
    assert [(row["name"], row["dist"], row["state"]) for row in manifest["plugins"]] == [
        ("counter", "apt-good", "active")
    ]
    assert "plugin counter: active" in printed
    rows = [
        json.loads(line)
        for line in (environment.folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["counter/steps"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_provider_that_the_profile_names_activates_its_plugin_and_says_so(
    environment: Environment,
) -> None:
    environment.profile("[]")
    manifest, printed = train(environment, "--model.norm_name", "good_norm")
    assert {"kind": "norm", "asked": "good_norm", "used": "good_norm", "reason": ""} in manifest[
        "providers"
    ]
    assert [row["name"] for row in manifest["plugins"]] == ["counter"]
    assert "plugin counter activated: the profile names norm:good_norm" in printed


def test_the_listing_tells_what_is_wrong_with_each_broken_plugin(environment: Environment) -> None:
    listed = plugins(environment)
    for name, (reason, place) in BROKEN.items():
        assert listed[name]["state"] == "broken"
        (failure,) = listed[name]["failures"]
        assert failure["error"].endswith(reason) and failure["where"].endswith(place)
    twin = listed["twin"]
    assert (twin["dist"], twin["version"]) == ("apt-twin-one, apt-twin-two", "1.0.0, 2.0.0")
    table = environment.run("hooks", "plugins")
    assert table.returncode == 0 and "Traceback" not in table.stderr
    for reason, place in BROKEN.values():
        assert reason in table.stdout and place in table.stdout
    # Damaged distributions are named, and cost nothing but themselves.
    warnings = table.stderr.splitlines()
    for damaged, reason in (
        ("no_metadata", "its metadata cannot be read: no Name"),
        ("latin", "its metadata cannot be read: UnicodeDecodeError"),
        ("no_value", "its entry points cannot be read"),
        ("latin_points", "its entry points cannot be read: UnicodeDecodeError"),
        ("folder_points", "its entry points cannot be read: IsADirectoryError"),
    ):
        (line,) = [line for line in warnings if f"/{damaged}-1.0.dist-info: " in line]
        assert line.startswith("warning: ") and reason in line
    assert len(warnings) == 5
    assert "its entry point 'my-module' is not MODULE or MODULE:ATTRIBUTE" in table.stdout
    assert "twice offers two plugins of this name: colorsys and json" in table.stdout
    assert (listed["no_metadata"]["dist"], listed["latin"]["version"]) == ("no_metadata", "1.0")


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_names_a_broken_plugin_is_refused_in_one_readable_block(
    environment: Environment, name: str
) -> None:
    reason, place = BROKEN[name]
    environment.profile(f"[counter, {name}]")
    done = environment.run("train", "-p", "small.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    # Within the brackets the way to leave it out follows.
    assert f"plugin {name}" in line and reason.rstrip(")") in line and place in line
    assert not (environment.folder / "runs").exists()


def test_a_run_that_names_every_broken_plugin_reports_them_all_with_the_remedies(
    environment: Environment,
) -> None:
    environment.profile(EVERYTHING)
    done = environment.run("train", "-p", "small.yaml")
    assert done.returncode == 2
    head, *lines = done.stderr.splitlines()
    assert head == f"error: {len(BROKEN)} problems:" and len(lines) == len(BROKEN)
    remedies = {
        "import_error": "--plugin no:import_error",
        "exits": "{name: exits, on_failure: isolate}",
        "misspelt": "did you mean 'on_step_end'?",
        "twin": "uninstall one of them",
    }
    for (name, remedy), line in zip(remedies.items(), lines, strict=True):
        assert f"plugin {name}" in line and remedy in line


def test_plugins_that_are_left_out_are_not_imported_and_the_run_goes_on(
    environment: Environment,
) -> None:
    environment.profile(EVERYTHING)
    blocked = ["marked", *BROKEN]
    options = [f"--plugin=no:{name}" for name in blocked]
    listed = plugins(environment, "-p", "small.yaml", *options)
    assert {name: listed[name]["state"] for name in blocked} == dict.fromkeys(blocked, "blocked")
    manifest, printed = train(environment, *options)
    assert not environment.mark.exists()
    states = {row["name"]: row["state"] for row in manifest["plugins"]}
    assert states == {**dict.fromkeys(blocked, "blocked"), "counter": "active"}
    assert "plugin marked: blocked (no:marked)" in printed


def test_the_mark_is_left_where_the_plugin_is_not_blocked(environment: Environment) -> None:
    plugins(environment, "--plugin", "marked")
    assert environment.mark.exists()


def test_isolated_plugins_are_left_out_and_manifest_and_summary_say_why(
    environment: Environment,
) -> None:
    isolated = [f"{{name: {name}, on_failure: isolate}}" for name in BROKEN]
    environment.profile(f"[counter, {', '.join(isolated)}]")
    manifest, printed = train(environment)
    rows = {row["name"]: row for row in manifest["plugins"]}
    assert rows["counter"]["state"] == "active"
    for name, (reason, place) in BROKEN.items():
        assert rows[name]["state"] == "broken"
        assert rows[name]["failures"][0]["error"].endswith(reason)
        assert rows[name]["failures"][0]["where"].endswith(place)
        (said,) = (line for line in printed.splitlines() if line.startswith(f"plugin {name}: "))
        assert "broken" in said and reason in said


def test_without_autoload_no_distribution_is_seen(environment: Environment) -> None:
    off = {"APT_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert plugins(environment, **off) == {}
    assert not environment.mark.exists()
    environment.profile("[counter]")
    done = environment.run("train", "-p", "small.yaml", **off)
    assert done.returncode == 2
    assert "plugin counter: no such plugin" in done.stderr


def test_the_command_of_a_plugin_is_a_verb(environment: Environment) -> None:
    done = environment.run("greet", "all", "authors")
    assert (done.returncode, done.stdout) == (0, "greetings to all authors\n")
    assert "  greet\n" in environment.run("--help").stdout
    misspelt = environment.run("gret")
    assert misspelt.returncode == 2 and "did you mean 'greet'?" in misspelt.stderr
