"""``apt-new plugin``: the package of a plugin, whose tests pass as it is."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import apt_core
from apt_core import distributions
from apt_core.cli.new import app
from apt_core.declarations import declared_by
from apt_core.discovery import installed_plugins
from apt_core.starting.plugin_package import PACKAGE_KINDS, TEMPLATES, plugin_package

if TYPE_CHECKING:
    from tests.cli.conftest import Command

pytestmark = pytest.mark.long

ROOT = Path(apt_core.__file__).parents[1]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """``install(package, name)``: the package is found as an installed one is."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.delenv("APT_DISABLE_PLUGIN_AUTOLOAD")
    path = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))

    def call(package: Path, name: str) -> None:
        monkeypatch.syspath_prepend(str(package / "src"))
        monkeypatch.syspath_prepend(str(site))
        source = str(package / "src")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ["PYTHONPATH"]]))
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        (info := site / f"{project['name'].replace('-', '_')}-0.1.0.dist-info").mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        point = project["entry-points"]["apt.plugins"][name]
        (info / "entry_points.txt").write_text(f"[apt.plugins]\n{name} = {point}\n")

    return call


@pytest.mark.parametrize("kind", PACKAGE_KINDS)
def test_every_kind_is_a_package_that_declares_what_it_should(
    command: Command, folder: Path, install: Callable[[Path, str], None], kind: str
) -> None:
    name = f"newly_{kind}"
    outcome = command(app, "plugin", f"Newly-{kind}", "--kind", kind, prog="apt-new")
    assert (outcome.code, outcome.err) == (0, "")
    written = {str(path.relative_to(folder / name)) for path in (folder / name).rglob("*")
               if path.is_file()}  # fmt: skip
    assert written >= {
        "pyproject.toml", "tox.ini", "README.md", f"src/apt_{name}/plugin.py",
        f"src/apt_{name}/__init__.py", f"src/apt_{name}/py.typed", "tests/test_plugin.py",
    }  # fmt: skip
    for path in (folder / name).rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "my_plugin" not in text, path
            if path.suffix == ".py":
                ast.parse(text)
    install(folder / name, name)
    declared = declared_by(name, installed_plugins())
    assert declared.problem is None and declared.record.dist == f"apt-{name.replace('_', '-')}"
    (section,) = declared.sections
    assert section.path == name and section.model is not None
    assert all((spec.name, spec.section) == (name, name) for spec in declared.providers)
    assert bool(declared.providers) == (kind in ("attention", "ffn", "data"))


@pytest.mark.parametrize("kind", PACKAGE_KINDS)
def test_its_tests_pass(
    command: Command, folder: Path, install: Callable[[Path, str], None], forked: None, kind: str
) -> None:
    """The first of them, what every plugin promises, is that of ``apt-hooks check``."""
    assert command(app, "plugin", "entropy", "--kind", kind, prog="apt-new").code == 0
    install(folder / "entropy", "entropy")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not promises"],
        cwd=folder / "entropy",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_every_template_is_a_kind() -> None:
    folders = {path.name for path in TEMPLATES.iterdir() if (path / "plugin.py").exists()}
    assert folders == PACKAGE_KINDS.keys()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("2fast", "it is no name of a Python module"),
        ("größe", "it is no name of a Python module"),
        ("a/b", "it is no name of a Python module"),
        ("../up", "it is no name of a Python module"),
        ("class", "it is a word of Python"),
        ("match", "it is a word of Python"),
        ("json", "standard library"),
        ("pluggy", "a module of this name is installed"),
        ("core", "it means something else in APT"),
        ("training", "it means something else in APT"),
        ("on_step_end", "it means something else in APT"),
        ("attention", "it means something else in APT"),
        ("x" * 61, "more than 60 characters"),
        ("\x1b[31m", "it is no name of a Python module"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    command: Command, folder: Path, name: str, says: str
) -> None:
    outcome = command(app, "plugin", name, prog="apt-new")
    assert (outcome.code, outcome.out) == (2, "") and says in outcome.err
    assert "\x1b" not in outcome.err and not [*folder.iterdir()]


def test_the_name_of_an_installed_plugin_is_taken(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = type("Entry", (), {"dist": "apt-other"})()
    monkeypatch.setattr(
        "apt_core.starting.plugin_package.installed_plugins", lambda: {"moe": entry}
    )
    outcome = command(app, "plugin", "apt-moe", prog="apt-new")
    assert outcome.code == 2 and "installed, by apt-other" in outcome.err


def test_nothing_is_overwritten_unless_it_is_asked_for(command: Command, folder: Path) -> None:
    assert command(app, "plugin", "mine", prog="apt-new").code == 0
    readme = folder / "mine" / "README.md"
    readme.write_text("my own")
    outcome = command(app, "plugin", "mine", prog="apt-new")
    assert outcome.code == 2 and "mine/README.md: exists already (--force" in outcome.err
    assert readme.read_text() == "my own"
    assert command(app, "plugin", "mine", "--force", prog="apt-new").code == 0
    assert readme.read_text() != "my own"
    outcome = command(app, "plugin", "other", "-o", "/proc/nothing/other", prog="apt-new")
    assert outcome.code == 2 and "/proc/nothing/other: cannot be written" in outcome.err
    outcome = command(app, "plugin", "other", "--kind", "loss_term", prog="apt-new")
    assert outcome.code == 2 and "did you mean 'loss'?" in outcome.err


def test_without_a_terminal_a_missing_name_is_named(command: Command) -> None:
    outcome = command(app, "plugin", prog="apt-new")
    assert (outcome.code, outcome.out) == (2, "") and "NAME is missing" in outcome.err


def test_on_a_terminal_it_asks(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["2fast\n", "mine\n", "what\n", "loss\n"])
    terminal = type("Terminal", (), {"isatty": lambda self: True,
                                     "readline": lambda self: next(answers, "")})()  # fmt: skip
    monkeypatch.setattr("apt_core.cli.new.is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    outcome = command(app, "plugin", prog="apt-new")
    assert outcome.code == 0 and "it is no name of a Python module" in outcome.out
    assert "negative_entropy" in (folder / "mine/src/apt_mine/plugin.py").read_text()
    outcome = command(app, "plugin", prog="apt-new")
    assert outcome.code == 2 and "the input has ended" in outcome.err


@pytest.mark.parametrize(
    ("told", "requirement"),
    [
        ({"dir_info": {"editable": True}, "url": "file:///a%20b"}, "-e file:///a%20b"),
        ({"url": "https://x.org/apt.whl", "archive_info": {}}, "apt-kernel @ https://x.org/apt.whl"),
        ({"url": "https://x.org/apt", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
         "apt-kernel @ git+https://x.org/apt@abc"),
        ({"url": "file:///gone/apt.whl", "archive_info": {}}, "apt-kernel==1.2"),
        ({}, "apt-kernel==1.2"),
        ([], "apt-kernel==1.2"),
    ],
)  # fmt: skip
def test_its_tests_are_run_with_the_apt_that_is_here(
    monkeypatch: pytest.MonkeyPatch, told: object, requirement: str
) -> None:
    dist = type("Dist", (), {"read_text": lambda self, name: json.dumps(told)})()
    monkeypatch.setattr(distributions, "distribution", lambda name: dist)
    monkeypatch.setattr(distributions, "version", lambda name: "1.2")
    assert distributions.apt_requirement() == requirement
    tox = plugin_package("mine")["tox.ini"]
    assert f"{{env:APT_KERNEL:{requirement}}}" in tox
