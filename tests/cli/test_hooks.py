"""``apt-hooks``: what it lists, in which shape, and what it says of bad input."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apt_core.cli.hooks import app
from apt_core.inspect.hook_reference import hook_reference
from apt_core.kinds import KINDS

if TYPE_CHECKING:
    from tests.cli.conftest import Command

SHAPES: dict[str, dict[str, Any]] = {
    "list": {
        "hook": str,
        "plugin": str,
        "priority": int,
        "position": int,
        "wrapper": bool,
        "background": bool,
        "file": str,
        "line": int,
    },
    "plugins": {
        "name": str,
        "dist": str,
        "version": str,
        "state": str,
        "priority": int | None,
        "failures": list,
        "load_ms": float,
        "summary": str,
    },
    "providers": {
        "kind": str,
        "name": str,
        "plugin": str,
        "version": str,
        "default": bool,
        "requires": list,
        "usable": bool | None,
        "reason": str,
        "section": str,
        "settings": dict,
    },
}
INFO = {
    "kind": str,
    "name": str,
    "version": str,
    "plugin": str,
    "dependencies": list,
    "is_default": bool,
    "conflicts": list,
    "summary": str,
    "config": dict,
}


def assert_shape(row: dict[str, Any], shape: dict[str, Any]) -> None:
    assert row.keys() == shape.keys()
    for key, kind in shape.items():
        assert isinstance(row[key], kind), key


# JSON


@pytest.mark.parametrize("verb", SHAPES)
def test_json_lists_have_the_promised_shape(command: Command, plugin: str, verb: str) -> None:
    rows = command(app, verb, "--plugin", plugin, "--json").json
    assert rows
    for row in rows:
        assert_shape(row, SHAPES[verb])


def test_list_shows_the_implementations_in_their_order(command: Command, folder: Path) -> None:
    for name, priority in (("late", 90), ("early", 10), ("among", 50), ("besides", 50)):
        (folder / f"{name}.py").write_text(
            "from apt_core import hookimpl\n\n"
            f"@hookimpl(priority={priority})\ndef on_step_end(step): pass\n"
        )
    rows = command(app, "list", "--plugin", "late.py,early.py", "--plugin", "besides.py,among.py",
                   "--json").json  # fmt: skip
    seen = [(row["position"], row["plugin"], row["priority"]) for row in rows]
    assert seen == [(1, "early", 10), (2, "among", 50), (3, "besides", 50), (4, "late", 90)]
    assert all((row["file"], row["line"]) == (f"{row['plugin']}.py", 3) for row in rows)


def test_list_marks_wrappers_and_follows_the_priorities_of_the_profile(
    command: Command, plugin: str
) -> None:
    Path("mine.yaml").write_text(f"plugins: [{{name: {plugin}, priority: 7}}]\n")
    rows = command(app, "list", "-p", "mine", "--json").json
    found = {row["hook"]: (row["wrapper"], row["priority"]) for row in rows}
    assert found["on_epoch_start"] == (True, 7) and found["on_step_end"] == (False, 7)
    shown = command(app, "list", "-p", "mine").out
    assert "sample (wrapper)" in shown


def test_what_a_key_activates_is_listed_as_active(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("APT_DISABLE_PLUGIN_AUTOLOAD")
    Path("mine.yaml").write_text(
        "model: {attention_name: linear_causal}\nmonitoring: {tensorboard: {enabled: true}}\n"
    )
    rows = command(app, "plugins", "-p", "mine", "--json").json
    active = {row["name"] for row in rows if row["state"] == "active"}
    # Without its library the plugin is broken, as it is in a run.
    tracker = {"tensorboard"} if importlib.util.find_spec("tensorboard") else set()
    assert active == {"linear_attn", *tracker}
    assert {row["plugin"] for row in command(app, "list", "-p", "mine", "--json").json} == active
    left = command(app, "plugins", "-p", "mine", "--plugin", "no:tensorboard", "--json").json
    assert {row["state"] for row in left if row["name"] == "tensorboard"} == {"blocked"}


def test_plugins_tells_the_state_of_each(command: Command, plugin: str) -> None:
    Path("bad.py").write_text("import no_such_thing\n")
    Path("mine.yaml").write_text(
        f"plugins: [{plugin}, bad.py, gone]\nschedules: {{enable_sample_at_epoch: 2}}\n"
    )
    rows = {row["name"]: row for row in command(app, "plugins", "-p", "mine.yaml",
                                                "--plugin", "no:gone", "--json").json}  # fmt: skip
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"sample": "dormant", "bad": "broken", "gone": "blocked"}
    assert (rows["sample"]["version"], rows["sample"]["priority"]) == ("3.1", None)
    (failure,) = rows["bad"]["failures"]
    assert failure["hook"] == "import" and failure["where"] == "bad.py:1"
    assert "no_such_thing" in failure["error"]


def test_providers_tells_what_is_usable_and_why_not(command: Command, plugin: str) -> None:
    rows = command(app, "providers", "norm", "--plugin", plugin, "--json").json
    core, sample = rows[0], rows[-1]
    assert (core["name"], core["default"], core["usable"]) == ("rmsnorm", True, True)
    assert (sample["name"], sample["default"], sample["usable"]) == ("sample_norm", False, False)
    assert "no-such-package is not installed" in sample["reason"]
    assert (sample["section"], sample["settings"]) == ("sample", {"strength": 0.5})
    shown = command(app, "providers", "norm", "--plugin", plugin).out
    assert "  sample      strength=0.5\n" in shown and "  model.norm  eps=1e-08\n" in shown


def test_providers_survives_settings_that_cannot_be_read(command: Command, folder: Path) -> None:
    (folder / "offer.py").write_text(
        "from apt_core import ProviderSpec, hookimpl\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('ffn', 'mine', 'x:y', config='no_such_module:Settings')]\n"
    )
    rows = command(app, "providers", "ffn", "--plugin", "offer.py", "--json").json
    (row,) = [row for row in rows if row["name"] == "mine"]
    assert row["settings"] == {} and "settings cannot be read" in row["reason"]


def test_usable_is_null_where_only_torch_could_tell(command: Command, folder: Path) -> None:
    (folder / "offer.py").write_text(
        "from apt_core import ProviderSpec, hookimpl\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('ffn', 'mine', 'x:y')]\n"
    )
    rows = command(app, "providers", "ffn", "--plugin", "offer.py", "--json").json
    usable = {row["name"]: row["usable"] for row in rows}
    assert usable.pop("mine") is None
    assert usable["default"] is True and set(usable.values()) == {True}


def test_providers_covers_the_kinds_in_their_order(command: Command) -> None:
    kinds = [row["kind"] for row in command(app, "providers", "--json").json]
    assert kinds == sorted(kinds, key=list(KINDS).index)
    assert {"attention", "ffn", "norm", "tokenizer", "dataset", "optimizer"} <= set(kinds)


def test_info_tells_everything_about_a_provider(command: Command, plugin: str) -> None:
    facts = command(app, "info", "norm", "sample_norm", "--plugin", plugin, "--json").json
    assert_shape(facts, INFO)
    schema = facts.pop("config")
    assert facts == {
        "kind": "norm",
        "name": "sample_norm",
        "version": "3.1",
        "plugin": "sample",
        "dependencies": ["no-such-package>=2"],
        "is_default": False,
        "conflicts": ["ffn:default"],
        "summary": "a norm",
    }
    assert schema["section"] == "sample"
    assert schema["schema"]["properties"]["strength"]["default"] == 0.5


def test_show_prints_the_contract_and_who_implements_it(command: Command, plugin: str) -> None:
    facts = command(app, "show", "on_step_end", "--plugin", plugin, "--json").json
    assert facts["signature"] == "on_step_end(step, loss, trainer)"
    assert facts["doc"].startswith("The optimizer has stepped.")
    assert [row["plugin"] for row in facts["implementations"]] == ["sample"]
    printed = command(app, "show", "on_step_end", "--plugin", plugin).out
    assert printed.startswith("on_step_end(step, loss, trainer)\n") and "sample.py:" in printed


def test_schema_holds_the_sections_of_plugins(command: Command, plugin: str) -> None:
    assert "sample" not in command(app, "schema").json["properties"]
    schema = command(app, "schema", "--plugin", plugin).json
    reference = schema["properties"]["sample"]["$ref"].rpartition("/")[2]
    assert schema["$defs"][reference]["properties"]["strength"]["description"] == "How strong."


def test_docs_prints_the_reference_of_every_hook(command: Command) -> None:
    printed = command(app, "docs")
    assert printed.code == 0 and printed.out == hook_reference()
    assert "## on_step_end\n" in printed.out


# For people


@pytest.mark.parametrize("verb", ["list", "plugins", "providers"])
def test_tables_are_whole_in_a_pipe(command: Command, folder: Path, plugin: str, verb: str) -> None:
    deep = folder / "/".join(["a_folder_with_a_rather_long_name"] * 5)
    deep.mkdir(parents=True)
    long = "a summary that goes on " * 10
    text = Path(plugin).read_text().replace("everything that a plugin can declare", long.strip())
    (deep / "sample.py").write_text(text)
    reference = str(deep.relative_to(folder) / "sample.py")
    rows = command(app, verb, "--plugin", reference, "--json").json
    printed = command(app, verb, "--plugin", reference)
    assert (printed.code, printed.err) == (0, "")
    assert len(printed.out.splitlines()) == len(rows) + 1
    assert "…" not in printed.out
    for row in rows:
        for key in {"hook", "plugin", "name", "summary", "reason", "file"} & row.keys():
            assert row[key] in printed.out


def test_info_reads_as_lines(command: Command, plugin: str) -> None:
    printed = command(app, "info", "norm", "sample_norm", "--plugin", plugin).out
    assert "dependencies: no-such-package>=2\n" in printed
    assert "config: sample\n  strength (number; default 0.5): How strong.\n" in printed


def test_list_says_so_when_nobody_implements_anything(command: Command) -> None:
    assert "no plugin implements a hook" in command(app, "list").out
    everything = command(app, "list", "--all").out
    assert "on_step_end" in everything and "apt_loss_terms" in everything


def test_a_plugin_that_cannot_be_loaded_is_no_error_of_a_listing(
    command: Command, folder: Path
) -> None:
    (folder / "bad.py").write_text("raise SystemExit(9)\n")
    for verb in ("list", "plugins", "providers", "schema"):
        assert command(app, verb, "--plugin", "bad.py").code == 0
    assert "sys.exit(9)" in command(app, "plugins", "--plugin", "bad.py").out


def test_listings_say_what_is_wrong_with_providers_that_they_cannot_show(
    command: Command, folder: Path
) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text(
            "from apt_core import ProviderSpec, hookimpl\n\n"
            "@hookimpl\ndef apt_register_providers():\n"
            "    return [ProviderSpec('ffn', 'mine', 'x:y')]\n"
        )
    printed = command(app, "providers", "ffn", "--plugin", "one.py,two.py")
    assert printed.code == 0
    assert "ffn:mine is registered by both 'one' and 'two'" in printed.err


# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "on_step_ends"], "there is no hook 'on_step_ends' (did you mean 'on_step_end'?)"),
        (["show", "zzz"], "'apt-hooks list --all' shows every hook"),
        (["providers", "atention"], "there is no kind 'atention' (did you mean 'attention'?)"),
        (["info", "atention", "x"], "there is no kind 'atention' (did you mean 'attention'?)"),
        (["info", "attention", "tva_defalt"], "did you mean 'tva_default'?"),
        (["info", "norm", "zzz"], "there are: rmsnorm"),
        (["list", "-p", "tiny_debgu"], "did you mean 'tiny_debug'?"),
        (["lst"], "No such command 'lst'"),
        (["list", "--jsno"], "--jsno"),
        (["show"], "Missing argument"),
        (["enable", "x"], "--profile"),
        (["enable", "x", "-p", "tiny_debgu"], "did you mean 'tiny_debug'?"),
    ],
)
def test_bad_input_ends_with_2_and_one_block_on_stderr(
    command: Command, arguments: list[str], said: str
) -> None:
    done = command(app, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and said in done.err
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback_before_the_error(command: Command) -> None:
    lines = command(app, "show", "zzz", "--debug").err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: there is no hook")


def test_no_listing_imports_torch_and_a_closed_pipe_is_no_error(folder: Path, plugin: str) -> None:
    code = (
        "import os, sys\n"
        "from apt_core.cli.hooks import app\n"
        "from apt_core.cli.plugin_info import list_app\n"
        "from apt_core.cli.run_command import run_command\n"
        "lists = ('list', 'plugins', 'providers', 'schema')\n"
        f"verbs = [[verb, '--plugin', {plugin!r}] for verb in lists]\n"
        "verbs += [['docs'], ['info', 'norm', 'rmsnorm'], ['show', 'on_step_end'], ['--help']]\n"
        "codes = [run_command(app, 'apt-hooks', verb) for verb in verbs]\n"
        "codes.append(run_command(list_app, 'plugin-list', []))\n"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)\n"
        "read, write = os.pipe()\n"
        "os.close(read)\n"
        "os.dup2(write, 1)\n"
        "sys.exit(run_command(app, 'apt-hooks', ['docs']))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(root)!r})\n{code}"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, f"{[0] * 9} False\n")


def test_schema_prints_tables_for_people(command: Command, plugin: str) -> None:
    printed = command(app, "schema", "--markdown", "--plugin", plugin)
    assert printed.code == 0
    assert "### sample\n" in printed.out and "| `strength` | number | `0.5` | How strong. |" in (
        printed.out
    )
    assert "| `d_model` | whole number ≥ 1 | `128` | Width of the residual stream. |" in printed.out


def test_without_arguments_the_help_is_shown(command: Command) -> None:
    printed = command(app)
    assert (printed.code, printed.err) == (0, "") and "Usage: apt-hooks" in printed.out
