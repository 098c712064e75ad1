"""Plugins as files in a folder of their own, and what checks find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

IMPORTS = "import torch\nfrom torch import nn\n\nfrom apt_core import ProviderSpec, hookimpl\n\n"

WritePlugin = Callable[..., str]
FailedChecks = Callable[..., set[str]]


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


@pytest.fixture
def failed_checks() -> FailedChecks:
    """``failed_checks(kind, provider, expected)``: the names of the checks that fail.

    What takes longer than all the rest is tried where it is ``expected`` to fail.
    """
    from apt_core.testing.conformance import LeftOut, checks_of

    def failed(kind: str, provider: Any, expected: set[str]) -> set[str]:
        found = set()
        for check in checks_of(kind, provider):
            if check.name in {"compile", "no host sync"} - expected:
                continue
            try:
                check.run()
            except LeftOut:
                continue
            except Exception:
                found.add(check.name)
        return found

    return failed
