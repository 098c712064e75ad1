"""Plugins for tests of the kernel: of functions, of source text, installed, all from an empty
folder with no plugin of this environment in sight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apt_core import hookimpl
from apt_core.discovery import load
from apt_core.distributions import Offer, offers
from apt_core.errors import Problem
from apt_core.plugin_manager import PluginManager


class Plugin:
    """A plugin object whose attributes are the given functions, marked where they are not."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            marked = function if hasattr(function, "apt_impl") else hookimpl(function)
            setattr(self, name, marked)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder. What is imported from here is forgotten after the test."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("APT_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def plugin_of() -> type[Plugin]:
    return Plugin


@pytest.fixture
def manager() -> PluginManager:
    return PluginManager()


@pytest.fixture
def write(folder: Path) -> Callable[[str, str], Path]:
    """``write("mine.py", source)`` into the working folder."""

    def call(name: str, source: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return path

    return call


@pytest.fixture
def load_source(write: Callable[[str, str], Path]) -> Callable[..., Any]:
    """``load_source("mine", source)``: the module that a file of this content is."""
    return lambda name, source: load(str(write(f"{name}.py", source)), {})[0]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``install("moe", source)``: a distribution ``apt-moe`` with a plugin ``moe``, and nothing
    else installed. ``dist`` names another distribution, ``module`` another module, and
    ``attribute`` what the entry point names in it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    names: set[str] = set()

    def only_ours(group: str, problems: list[Problem]) -> list[Offer]:
        return [offer for offer in offers(group, problems) if offer.dist in names]

    monkeypatch.delenv("APT_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.setattr("apt_core.discovery.offers", only_ours)

    def call(
        name: str, source: str, *, dist: str = "", module: str = "", attribute: str = ""
    ) -> None:
        dist, module = dist or f"apt-{name}", module or f"apt_installed_{name}"
        names.add(dist)
        (site / f"{module}.py").write_text(source, encoding="utf-8")
        info = site / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        points = info / "entry_points.txt"
        before = points.read_text() if points.exists() else "[apt.plugins]\n"
        points.write_text(f"{before}{name} = {module}{attribute and ':'}{attribute}\n")

    return call


@pytest.fixture
def listing_of() -> Callable[[PluginManager], SimpleNamespace]:
    """What the listing functions read of a listing, for a manager alone."""
    return lambda manager: SimpleNamespace(manager=manager)
