"""``python -m apt_core plugin-list`` and ``plugin-info``, and how verbs are found."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from apt_core import __main__
from apt_core.cli.hooks import app
from apt_core.cli.plugin_info import info_app, list_app

if TYPE_CHECKING:
    from tests.cli.conftest import Command


def test_plugin_list_shows_names_by_kind_with_their_defaults(command: Command) -> None:
    printed = command(list_app)
    assert printed.code == 0
    assert printed.out.startswith("attention:\n  - tva_default (default)\n")
    assert "dataset:\n  - text_default (default)\n  - csv\n" in printed.out


def test_plugin_list_and_info_print_what_apt_hooks_does(command: Command) -> None:
    assert command(list_app, "--json").json == command(app, "providers", "--json").json
    kind = ("--kind", "dataset")
    assert command(list_app, *kind).out == command(app, "providers", "dataset").out
    assert (
        command(list_app, *kind, "--json").json
        == command(app, "providers", "dataset", "--json").json
    )
    provider = ("attention", "tva_default")
    assert command(info_app, *provider).out == command(app, "info", *provider).out
    assert (
        command(info_app, *provider, "--json").json
        == command(app, "info", *provider, "--json").json
    )


def test_plugin_info_has_the_facts_of_the_default(command: Command) -> None:
    facts = command(info_app, "attention", "tva_default", "--json").json
    assert (facts["plugin"], facts["is_default"], facts["dependencies"]) == ("core", True, [])
    assert {"r", "s", "tau"} <= facts["config"]["schema"]["properties"].keys()


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        (list_app, ["--kind", "atention"], "did you mean 'attention'?"),
        (info_app, ["attention", "tva_defalt"], "did you mean 'tva_default'?"),
        (info_app, ["attention"], "Missing argument"),
    ],
)
def test_bad_input_ends_with_2(
    command: Command, verb: object, arguments: list[str], said: str
) -> None:
    done = command(verb, *arguments)
    assert done.code == 2 and said in done.err


# Verbs


def verb(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["apt_core", *arguments])
    try:
        __main__.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("hooks", "providers", "ffn"),
        ("apt-hooks", "providers", "ffn"),
        ("plugin-list", "--kind", "ffn"),
    ],
)
def test_every_command_is_a_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert verb(monkeypatch, *arguments) == 0
    assert "SwiGLU" not in (out := capsys.readouterr().out) and "default" in out


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert verb(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}\n" in printed for name in __main__.VERBS)


def test_a_misspelt_verb_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == ("error: there is no verb 'trian' (did you mean 'train'?)\n")
