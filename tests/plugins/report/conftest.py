"""Folders of runs as the trainer leaves them, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]
MANIFEST: dict[str, Any] = {
    "started": "2026-11-23T16:59:17Z",
    "ended": "2026-11-23T17:09:17Z",
    "status": "finished",
    "profile": "a_profile",
    "device": "cpu",
    "versions": {"apt": "0.1.0", "torch": "2.13.0"},
    "providers": [
        {"kind": "attention", "asked": "flash_v2", "used": "tva_default", "reason": "no GPU here"},
        {"slot": "ffn", "asked": "vft", "used": "vft", "reason": "as earlier versions wrote it"},
    ],
    "plugins": [],
    "step": 100,
    "figures": {"steps": 100, "tokens": 25600, "seconds": 65.0, "val_loss": 2.4175},
    "sample": "the sample text",
}


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and the text outside of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]

    @property
    def charts(self) -> list[dict[str, Any]]:
        """What the page's script shows under the pointer; charts for a phone, which have the values
        of others, left out."""
        charts: list[dict[str, Any]] = json.loads(self.scripts[0])
        return [chart for chart in charts if type(chart["series"]) is list]

    @property
    def titles(self) -> list[str]:
        return [label.partition(". ")[0] for label in self.values("aria-label")]


def rows(count: int, **more: float) -> list[dict[str, Any]]:
    return [
        {"step": n, "epoch": 1, "tokens": 256 * n, "loss": 5 - 3 * n / count, "lr": 1e-3, **more}
        for n in range(1, count + 1)
    ]


@pytest.fixture
def page() -> Callable[[Path], Page]:
    from apt_plugins.report.page import build_report

    return lambda folder: Page(build_report(folder))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(rows, manifest={…}, events=[…], tail="…")``: a folder; None leaves a file out."""

    def make(
        metrics: Iterable[Mapping[str, Any]] | None = None,
        *,
        manifest: Mapping[str, Any] | None = MANIFEST,
        profile: str | None = "name: a_profile\nevaluation: {sample_prompt: 'Once '}\n",
        events: Iterable[Mapping[str, Any]] | None = (),
        tail: str = "",
        **changes: Any,
    ) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        lines = [json.dumps(row) + "\n" for row in (rows(100) if metrics is None else metrics)]
        (folder / "metrics.jsonl").write_text("".join(lines) + tail, encoding="utf-8")
        if manifest is not None:
            text = json.dumps({**manifest, **changes})
            (folder / "manifest.json").write_text(text, encoding="utf-8")
        if profile is not None:
            (folder / "profile.yaml").write_text(profile, encoding="utf-8")
        if events is not None:
            lines = [json.dumps(row) + "\n" for row in events]
            (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    return rows
