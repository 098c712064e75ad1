"""What is built from this tree is complete: modules, profiles, commands, plugins."""

from __future__ import annotations

import configparser
import email
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml

import apt_core

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("apt_core", "apt_plugins", "profiles")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that nothing is left behind in the tree."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    built = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def _dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode("utf-8")


def _metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_string(_dist_info(wheel, "METADATA"))


def _entry_points(wheel: zipfile.ZipFile, group: str) -> dict[str, str]:
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(_dist_info(wheel, "entry_points.txt"))
    return dict(parser[group])


def test_the_wheel_has_every_module_and_profile_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "*.json", "*.css", "*.html", "*.j2", "*.js", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"profiles/__init__.py", "profiles/tiny_debug.yaml", "apt_core/py.typed"} <= packed


def test_every_shipped_plugin_has_an_entry_point_that_names_its_module(
    wheel: zipfile.ZipFile,
) -> None:
    plugins = {path.parent.name for path in (ROOT / "apt_plugins").glob("*/plugin.py")}
    declared = _entry_points(wheel, "apt.plugins")
    assert declared == {name: f"apt_plugins.{name}.plugin" for name in plugins}


def test_the_commands_name_functions_that_exist_and_none_is_called_apt(
    wheel: zipfile.ZipFile,
) -> None:
    commands = _entry_points(wheel, "console_scripts")
    assert {
        "apt-train",
        "apt-hooks",
        "apt-data",
        "apt-eval",
        "apt-generate",
        "apt-chat",
    } <= commands.keys()
    assert "apt" not in commands
    for target in commands.values():
        module, _, function = target.partition(":")
        assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_the_version_is_stated_once(wheel: zipfile.ZipFile) -> None:
    assert _metadata(wheel)["Version"] == apt_core.__version__
    stated = re.compile(rf"""version\w*\s*=\s*["']?{re.escape(apt_core.__version__)}\b""")
    places = [ROOT / "setup.cfg", ROOT / "pyproject.toml", ROOT / "docs" / "conf.py"]
    # Packages that apt-new begins have a version of their own.
    places += (p for p in (ROOT / "apt_core").rglob("*.py") if "starting" not in p.parts)
    assert [path.name for path in places if stated.search(path.read_text())] == ["__init__.py"]


def test_the_citation_names_this_version_and_no_person() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == apt_core.__version__ and cited["license"] == "MIT"
    assert cited["authors"] == [{"name": "The APT developers"}]


def test_all_extras_of_optional_plugins_install_without_cuda(wheel: zipfile.ZipFile) -> None:
    needs_all = [
        line for line in _metadata(wheel).get_all("Requires-Dist", []) if 'extra == "all"' in line
    ]
    assert "all" in _metadata(wheel).get_all("Provides-Extra", [])
    assert not any(line.startswith("flash-attn") for line in needs_all)


def test_every_direct_dependency_is_pinned_by_the_constraints(wheel: zipfile.ZipFile) -> None:
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    needed = {
        re.match(r"[\w.-]+", line)[0].lower()  # type: ignore[index]
        for line in _metadata(wheel).get_all("Requires-Dist", [])
        if not re.search(r"""extra == ["'](flash|linear)""", line)
    }
    assert needed - {"apt-kernel"} <= pins.keys()


def test_the_audit_fails_on_an_advisory_and_calls_no_pin_clean_that_it_could_not_look_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("advisories", ROOT / ".ci" / "advisories.py")
    assert spec and spec.loader
    advisories = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(advisories)
    unknown = {"name": "mirror-only", "skip_reason": "not found"}
    clean = {"name": "a", "version": "1", "vulns": []}
    advisory = {"id": "CVE-2026-1", "fix_versions": ["1.1"]}

    assert advisories.report([unknown]) == 0
    assert "0 of 1 pins" in capsys.readouterr().out
    assert advisories.report([clean, unknown]) == 0
    assert "1 of 2 pins" in capsys.readouterr().out
    assert advisories.report([clean, {"name": "b", "version": "1", "vulns": [advisory]}]) == 1
    assert "b 1: CVE-2026-1, fixed in 1.1" in capsys.readouterr().out
