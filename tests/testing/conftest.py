"""Plugins as files, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

IMPORTS = "import torch\nfrom torch import nn\n\nfrom apt_core import ProviderSpec, hookimpl\n\n"

WritePlugin = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def write(folder: Path) -> WritePlugin:
    """``write(source, name="mine")``: the path of a plugin with the usual imports."""

    def write_plugin(source: str, name: str = "mine") -> str:
        path = folder / f"{name}.py"
        path.write_text(IMPORTS + source, encoding="utf-8")
        return str(path)

    return write_plugin
