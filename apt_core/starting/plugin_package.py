"""Writes the package of a plugin, whose tests pass as it is.

The code is that of a template (:mod:`apt_core.starting.templates`) with another name; what is
around it is written here.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from apt_core import __version__
from apt_core.config import Config
from apt_core.discovery import installed_plugins
from apt_core.distributions import apt_requirement
from apt_core.errors import ConfigError, Problem, did_you_mean
from apt_core.files import read_file
from apt_core.hookspecs import POLICIES
from apt_core.kinds import KINDS
from apt_core.plugin_names import normalized_name
from apt_core.types import CORE

TEMPLATES = Path(__file__).parent / "templates"
NAME = "my_plugin"
"""What stands for the name in the templates."""

PACKAGE_KINDS: Mapping[str, str] = {
    "hook": "observes a run, keeps state, reports a figure",
    "tracker": "takes the metrics of a run elsewhere",
    "loss": "adds a term to the loss, with a weight that a schedule moves",
    "attention": "an attention layer",
    "ffn": "a feed-forward layer",
    "data": "a source of documents",
}
"""The kinds of packages, each a folder of TEMPLATES, with what their plugins do."""

TRIED_WITH = {
    "attention": "--model.attention_name {name}",
    "ffn": "--model.ffn_name {name}",
    "data": "--data.loader {name} --data.train_path texts.csv",
}
"""The options that use a plugin, where ``--plugin`` alone does not."""

LONGEST_NAME = 60
MAX_TEMPLATE = 2**18


def plugin_package(name: str, kind: str = "hook") -> dict[str, str]:
    """The files of the package of a plugin, by their paths in its folder.

    Raises ConfigError for a kind that there is not, and for a name that no plugin can have, or that
    another one has.
    """
    if kind not in PACKAGE_KINDS:
        hint = did_you_mean(kind, PACKAGE_KINDS) or f"kinds are {', '.join(PACKAGE_KINDS)}"
        raise ConfigError(f"there is no kind {kind!r} of plugin", "--kind", hint=hint)
    name = checked_name(name)
    package = f"apt_{name}"
    files = {
        "pyproject.toml": _pyproject(name, kind),
        "tox.ini": _tox(),
        "README.md": _readme(name, kind),
        ".gitignore": "__pycache__/\n*.egg-info/\n.tox/\nbuild/\ndist/\nruns/\n",
        f"src/{package}/py.typed": "",
    }
    for template in sorted((TEMPLATES / kind).glob("*.py")):
        code = read_file(template, MAX_TEMPLATE).decode().replace(NAME, name)
        tests = template.name == "tests.py"
        path = "tests/test_plugin.py" if tests else f"src/{package}/{template.name}"
        files[path] = code
    return files


def checked_name(name: str) -> str:
    """The normalised name, which is that of a section of the profile and ends the name of a module
    too. Raises ConfigError where it cannot be, or is taken."""
    plain = normalized_name(name).removeprefix("apt_")
    problem, hint = "", "a letter, then letters, digits and underscores, in ASCII"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", plain):
        problem = "it is no name of a Python module"
    elif len(plain) > LONGEST_NAME:
        problem, hint = f"it has more than {LONGEST_NAME} characters", ""
    elif keyword.iskeyword(plain) or keyword.issoftkeyword(plain):
        problem, hint = "it is a word of Python", ""
    elif plain == CORE or plain in Config.model_fields or plain in KINDS or plain in POLICIES:
        problem, hint = "it means something else in APT", ""
    elif entry := installed_plugins().get(plain):
        problem, hint = f"a plugin of this name is installed, by {entry.dist}", "choose another"
    elif plain in sys.stdlib_module_names:
        problem, hint = "it is a module of Python's standard library", "choose another"
    elif _is_module(plain) or _is_module(f"apt_{plain}"):
        problem, hint = "a module of this name is installed", "choose another"
    if problem:
        raise ConfigError(f"{name!r} cannot be the name of a plugin: {problem}", "NAME", hint=hint)
    return plain


def _is_module(name: str) -> bool:
    """Whether a module of this name is installed; a folder without code is none."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return True
    return spec is not None and spec.origin is not None


def write_package(folder: Path, files: Mapping[str, str], *, force: bool = False) -> None:
    """Write the files into ``folder``, which is made. Raises ConfigError for those that are there
    already, unless ``force`` replaces them, and where they cannot be written."""
    there = [path for path in files if (folder / path).exists()]
    if there and not force:
        raise ConfigError(
            Problem("exists already", str(folder / path), hint="--force replaces it")
            for path in there
        )
    try:
        for path, text in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot be written: {reason}", str(folder)) from error


def _pyproject(name: str, kind: str) -> str:
    least = ".".join(__version__.split(".")[:2])
    return f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "apt-{name.replace("_", "-")}"
version = "0.1.0"
description = "A plugin of APT: {PACKAGE_KINDS[kind]}"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["apt-kernel>={least}"]

[project.entry-points."apt.plugins"]
{name} = "apt_{name}.plugin"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
"*" = ["py.typed"]

[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = ["--import-mode=importlib"]
"""


def _tox() -> str:
    return f"""\
[tox]
requires =
    tox>=4.23
env_list = py

[testenv]
description = the tests, in an environment of their own
pass_env =
    PIP_*
deps =
    pytest>=8
    # APT as it is installed where this was written. With APT_KERNEL another one is taken; without
    # this line the one of the package index, as the package itself demands it.
    {{env:APT_KERNEL:{apt_requirement()}}}
set_env =
    # A tiny run is faster with one thread.
    OMP_NUM_THREADS = 1
commands =
    pytest {{posargs}}
"""


def _readme(name: str, kind: str) -> str:
    use = TRIED_WITH.get(kind, "--plugin {name}").format(name=name)
    return f"""\
# apt-{name.replace("_", "-")}

A plugin of APT: {PACKAGE_KINDS[kind]}.

    pip install -e .
    apt-train -p tiny_debug {use}
    apt-hooks check {name}
    apt-hooks explain {name}

The settings are the section `{name}` of the profile; `src/apt_{name}/plugin.py` declares them.
`tox` runs the tests in an environment of its own, `pytest` in the present one.
"""
