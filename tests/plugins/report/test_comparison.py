"""The page on several runs: whose curve is whose, what differs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt_core.cli.run_command import run_command
from apt_plugins.report.command import app
from tests.plugins.report.conftest import MANIFEST, Page, rows


def write(folder: Path, *, profile: str, tokens: int = 256, count: int = 100) -> Path:
    folder.mkdir(parents=True)
    lines = rows(count)
    for row in lines:
        row["tokens"] = tokens * row["step"]
    lines.append({"step": count, "val_loss": 2.0 + count / 1000, "val_bpb": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    figures = {"steps": count, "val_loss": 2.0 + count / 1000}
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "figures": figures}))
    (folder / "events.jsonl").write_text("")
    (folder / "profile.yaml").write_text(profile)
    return folder


def compared(*folders: Path) -> Page:
    from apt_plugins.report.comparison import build_comparison

    return Page(build_comparison(folders))


def test_figures_curves_and_differing_settings_stand_side_by_side(tmp_path: Path) -> None:
    one = write(tmp_path / "one", profile="model: {d_model: 64, num_layers: 2}\n")
    two = write(tmp_path / "two", profile="model: {d_model: 128, num_layers: 2}\n", count=60)
    page = compared(one, two)
    assert "2 runs compared" in page.text and "<strong>2.06</strong>" in page.html
    assert "<td>model.d_model</td><td>64</td><td>128</td>" in page.html
    assert "model.num_layers" not in page.text
    training, held_out = page.charts[:2]
    assert [series["name"] for series in training["series"]] == ["one", "two"]
    assert [series["color"] for series in training["series"]] == [0, 1]
    assert held_out["series"][1]["y"] == [2.06]
    assert not any(title.startswith("Held-out loss over tokens") for title in page.titles)


def test_runs_that_see_more_in_a_step_are_compared_over_tokens_too(tmp_path: Path) -> None:
    one = write(tmp_path / "a" / "run", profile="name: x\n")
    two = write(tmp_path / "b" / "run", profile="name: x\n", tokens=512)
    page = compared(one, two)
    (over,) = [chart for chart in page.charts if chart.get("unit") == "tokens"]
    assert [series["x"] for series in over["series"]] == [[25600], [51200]]
    assert [series["name"] for series in over["series"]] == ["a/run", "b/run"]
    assert "None: the profiles are the same." in page.text


def test_secrets_and_markup_of_profiles_are_not_shown(tmp_path: Path) -> None:
    one = write(tmp_path / "one", profile="a: {api_key: hunter2hunter2}\nb: '<i>x</i>'\n")
    two = write(tmp_path / "two", profile="a: {api_key: other4other4}\n")
    page = compared(one, two)
    assert "hunter2" not in page.html and "<i>x</i>" not in page.html and "&lt;i&gt;" in page.html


def test_runs_without_rows_are_a_page(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    page = compared(*folders)
    assert "No step was logged in any of the runs." in page.text
    assert "one: there is no manifest.json" in page.text


def test_the_command_compares_and_refuses_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(write(tmp_path / f"run{n}", profile="name: x\n", count=9).name) for n in range(9)]
    assert run_command(app, "apt-report", names[:2]) == 0
    assert capsys.readouterr().out == "comparison.html\n" and Path("comparison.html").exists()
    assert run_command(app, "apt-report", [*names, "./run1", "missing"]) == 2
    told = capsys.readouterr().err
    for problem in ("missing", "named twice", "11 runs are named, and a page compares at most 8"):
        assert problem in told
