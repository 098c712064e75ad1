"""What the plugin promises, in runs of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt_core import ConfigError
from apt_core.testing import check_plugin, tiny_run


def chosen(path: Path, column: str) -> dict[str, str]:
    """The keys that read a file."""
    return {
        "data.train_path": str(path),
        "data.loader": "my_plugin",
        "my_plugin.column": column,
    }


def test_it_keeps_what_every_plugin_promises() -> None:
    assert [finding for finding in check_plugin("my_plugin") if not finding.ok] == []


def test_it_trains_on_the_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = "".join(f"{n},line {n} of a small file\n" for n in range(60))
    path.write_text(f"number,said\n{rows}", encoding="utf-8")
    run = tiny_run(steps=2, overrides=chosen(path, "said"))
    assert run.manager.has_plugin("my_plugin") and any("loss" in row for row in run.metrics)
    with pytest.raises(ConfigError, match="has no column 'text'"):
        tiny_run(steps=2, overrides=chosen(path, "text"))
