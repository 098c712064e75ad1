"""The pages in a browser: at three widths, light and dark, nothing overflows, nothing is asked for
from elsewhere, and axe finds no fault of contrast or labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.browser import Page, opened_page, program
from tests.plugins.report.conftest import MANIFEST, rows

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(program() is None, reason="no Chromium is installed"),
]
WIDTHS = (390, 820, 1440)
LONG = "a_name_that_goes_on_and_on_" * 3


def write_run(folder: Path, **manifest: Any) -> Path:
    """A run of which every part of the page has something to show."""
    failure = {"hook": "on_step_end", "step": 40, "error": f"OSError: /{LONG}/x", "where": "m.py:7"}
    metrics = rows(120, grad_norm=1.0, tokens_per_s=9e3, **{f"{LONG}/{LONG}": 0.5})
    for n, row in enumerate(metrics):
        row |= {"time/data_ms": 1.0, "time/forward_backward_ms": 6.0 + n % 3}
    metrics[60]["loss"] = "nan"
    metrics += [{"step": n, "val_loss": 4 - n / 50, "val_bpb": 5 - n / 50} for n in (40, 80, 120)]
    events = [
        {"step": 30, "kind": "enabled", "plugin": LONG, "epoch": 1},
        {"step": 40, "kind": "failed", "plugin": LONG, "message": failure["error"], **failure},
        {"step": 115, "kind": "quarantined", "plugin": LONG, "message": failure["error"]},
    ]
    folder.mkdir()
    for name, lines in (("metrics.jsonl", sorted(metrics, key=lambda r: r["step"])),
                        ("events.jsonl", events)):  # fmt: skip
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    plugins = [{"name": LONG, "state": "quarantined", "reason": LONG, "failures": [failure]}]
    data = {"sha256": "f" * 64, "counts": {"train": 70, "val": 7}, "description": "テキスト"}
    whole = {**MANIFEST, "plugins": plugins, "data": data, "sample": LONG * 5, **manifest}
    (folder / "manifest.json").write_text(json.dumps(whole))
    (folder / "profile.yaml").write_text(f"name: {LONG}\ntraining: {{seed: {len(str(folder))}}}\n")
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from apt_plugins.report.comparison import write_comparison
    from apt_plugins.report.page import write_report

    home = tmp_path_factory.mktemp("pages")
    one = write_run(home / "one", status="failed", error=f"TrainingError: {LONG}")
    other = write_run(home / f"other_{LONG}")
    empty = home / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    return {
        "run": write_report(one, home / "run.html"),
        "empty": write_report(empty, home / "empty.html"),
        "several": write_comparison([one, other, empty], home / "several.html"),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    pytest.importorskip("aiohttp", reason="the browser is driven by its WebSocket")
    with opened_page("about:blank", tmp_path_factory.mktemp("browser")) as page:
        yield page


def visit(browser: Page, path: Path) -> None:
    browser.requests.clear()
    browser.complaints.clear()
    browser.call("Page.navigate", url=path.as_uri())
    browser.until(f"document.readyState === 'complete' && location.href === '{path.as_uri()}'")


@pytest.mark.parametrize("name", ["run", "empty", "several"])
def test_a_page_fits_any_width_and_asks_for_nothing(
    browser: Page, pages: dict[str, Path], name: str
) -> None:
    visit(browser, pages[name])
    for width in WIDTHS:
        for theme in ("light", "dark"):
            browser.show(width, theme)
            # A phone zooms out to show what is wider than it.
            assert browser.js(
                "[innerWidth, document.documentElement.scrollWidth <= innerWidth]"
            ) == [width, True]
            cut_off = browser.js(
                "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && "
                "!e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)"
                ".map(e => e.outerHTML.slice(0, 200))"
            )
            assert cut_off == [], width
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.complaints == []


def test_the_pointer_and_the_keys_show_values_on_either_chart(
    browser: Page, pages: dict[str, Path]
) -> None:
    visit(browser, pages["run"])
    for width in (390, 1440):
        browser.show(width, "light")
        chart = "[...document.querySelectorAll('svg[data-chart]')].find(e => e.checkVisibility())"
        browser.js(f"{chart}.focus()")
        key = "new KeyboardEvent('keydown', {key: 'ArrowRight'})"
        browser.js(f"{chart}.dispatchEvent({key})")
        told = browser.until("!document.getElementById('tip').hidden && tip.textContent")
        assert told.startswith("step ") and "training" in told and "held out" in told
        assert browser.js(
            "(b => b.left >= 0 && b.right <= innerWidth)(tip.getBoundingClientRect())"
        )


@pytest.mark.parametrize("name", ["run", "empty", "several"])
def test_axe_finds_no_fault(browser: Page, pages: dict[str, Path], name: str) -> None:
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python brings axe-core along")
    visit(browser, pages[name])
    browser.js((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8") + "; 1")
    for width, theme in ((1440, "light"), (390, "dark"), (390, "light"), (1440, "dark")):
        browser.show(width, theme)
        browser.js(
            "window.found = ''; axe.run().then(all => { window.found = JSON.stringify("
            "all.violations.map(f => [f.id, f.help, f.nodes.slice(0, 3).map(n => n.html)])) })"
        )
        faults = json.loads(browser.until("found"))
        assert faults == [], (width, theme)
