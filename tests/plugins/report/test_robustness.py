from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from apt_plugins.report.metrics import Series
from apt_plugins.report.page import build_report, write_report
from apt_plugins.report.thinning import smoothed, thin


def test_a_row_that_was_cut_off_is_left_out_and_said(make_run, page):
    shown = page(make_run(tail='{"step": 101, "loss": 1.'))
    assert "the last row of metrics.jsonl is cut off" in shown.text
    assert shown.charts[0]["series"][0]["x"][-1] == 100


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        "7",
        '{"loss": 1}',
        '{"step": "5", "loss": 1}',
        '{"step": -1, "loss": 1}',
        '{"step": 1e999}',
        '{"step": true}',
        '{"step": 1' + "0" * 400 + "}",
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_line_that_is_no_row_costs_nothing_but_itself(make_run, page, line):
    shown = page(make_run(tail=line + "\n"))
    assert "1 lines of metrics.jsonl cannot be read" in shown.text
    assert shown.charts[0]["series"][0]["x"][-1] == 100


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", 1e300, -1e300, 10**400, float("nan"), float("inf")]
)
def test_values_that_are_not_finite_are_gaps_that_are_seen(make_run, make_rows, page, value):
    metrics = make_rows(60)
    metrics[29]["loss"] = value
    shown = page(make_run(metrics))
    assert "1 values are not finite" in shown.text
    assert "not finite at step 30" in shown.text
    assert 30 not in shown.charts[0]["series"][0]["x"]


def crosses(shown, chart):
    """What the crosses of a chart stand for."""
    figure = shown.html.partition(f'data-chart="{chart}"')[2].partition("</svg>")[0]
    return re.findall("<title>not finite at (.*?)</title>", figure)


def test_losses_none_of_which_is_finite_are_shown_row_by_row(make_run, make_rows, page):
    values = ["nan", "inf", 1e300, "-inf"] * 5
    metrics = [{**row, "loss": v} for row, v in zip(make_rows(20), values, strict=True)]
    shown = page(make_run(metrics, figures={"loss": "nan", "val_loss": "inf"}))
    assert "No step was logged" not in shown.text
    told = ["nan", "inf", "1e300", "-inf"] * 5
    assert crosses(shown, 0) == [f"step {n}: {text}" for n, text in enumerate(told, 1)]
    assert "20 values are not finite (crosses)" in shown.text
    assert "never finite in 20 rows, last -inf at step 20" in shown.text
    assert "training loss-inf" in shown.text and "held-out lossinf" in shown.text


def test_the_last_value_is_the_last_one_finite_or_not(make_run, make_rows, page):
    metrics = make_rows(20)
    metrics[-1]["loss"] = "nan"
    text = page(make_run(metrics)).text
    assert "last nan at step 20 (finite last at step 19: 2.15), lowest 2.15 at step 19" in text
    assert "training lossnanat step 20, lowest 2.15" in text


def test_a_metric_that_is_never_finite_is_listed(make_run, make_rows, page):
    more = {
        "mine/bad": "nan",
        "mine/load_min": "inf",
        "mine/load_max": "inf",
        "time/data_ms": "inf",
    }
    shown = page(make_run(make_rows(3, **more)))
    assert {"bad", "load, quantiles"} <= set(shown.titles)
    assert "never finite in 3 rows, last nan at step 3" in shown.text
    assert "min: never finite in 3 rows, last inf at step 3" in shown.text


def test_no_value_that_is_not_finite_is_lost_in_a_long_run(make_run, make_rows, page):
    metrics = make_rows(5000)
    for row in metrics[1000:]:
        row["loss"] = "nan"
    found = crosses(page(make_run(metrics)), 0)
    counts = [
        int(label.split()[0].replace(",", "")) if " steps " in label else 1 for label in found
    ]
    assert sum(counts) == 4000 and len(found) > 200
    assert "to 5,000: nan" in found[-1]


def test_rows_without_a_loss_are_counted(make_run, page):
    shown = page(make_run([{"step": n, "loss": None, "lr": "x"} for n in range(4)]))
    assert "4 rows were logged, none of them with a loss." in shown.text


@pytest.mark.parametrize(
    "values",
    [
        ["nan"] * 5,
        [0.0] * 5,
        [1e-320] * 5,
        [3.0],
        [-0.0, -5.0, -1e-320, 5e-324, -3.0, 1e-300],
        [-5.0, -4.0],
        [10**400, -(10**400), 1e308, -1e308],
        [1e30, -1e30],
        [1.0, 1.0 + 1e-15],
        [1e20, 1e20],
        [1e-30, 1e30, 1.0, 5.0, 7.0, 8.0],
        [True, None, "text", [1], {"a": 1}],
    ],
)
def test_any_values_make_a_page(make_run, values):
    names = ("loss", "mine/x", "time/forward_ms", "memory_mb", "tokens_per_s", "mfu", "seconds")
    metrics = [{"step": n, **dict.fromkeys(names, v)} for n, v in enumerate(values)]
    assert "</html>" in build_report(make_run(metrics))


def test_a_run_without_rows_is_a_page(make_run, page):
    shown = page(make_run([], status="running"))
    assert "No step was logged." in shown.text
    assert shown.charts == []


def test_a_run_that_was_killed_says_that_no_end_is_recorded(make_run, page):
    shown = page(make_run(status="running"))
    assert (
        "No end is recorded: it is running, or was killed; the last row was written" in shown.text
    )


def test_an_empty_folder_names_what_is_missing(tmp_path, page):
    text = page(tmp_path).text
    for name in ("manifest.json", "metrics.jsonl", "profile.yaml"):
        assert f"there is no {name}" in text


@pytest.mark.parametrize("manifest", ["", "{", "[]", "null", "[" * 100_000])
def test_a_manifest_that_cannot_be_read_is_said(make_run, page, manifest):
    folder = make_run()
    (folder / "manifest.json").write_text(manifest)
    shown = page(folder)
    assert "manifest.json cannot be read" in shown.text
    assert shown.charts


def test_manifest_entries_of_other_types_are_left_out(make_run):
    wrong = [7, "text", None, [1, None, "x"], {"a": 1}]
    keys = ("providers", "plugins", "timeline", "switches", "figures", "versions", "data",
            "inactive_keys", "failed_checkpoints", "checkpoint_dir", "sample", "error", "step",
            "status", "parameters")  # fmt: skip
    folder = make_run()
    for value in wrong:
        (folder / "manifest.json").write_text(json.dumps(dict.fromkeys(keys, value)))
        assert "</html>" in build_report(folder)


@pytest.mark.parametrize(
    "value",
    [1e308, -0.0, -5, 10**400, -(10**400), 1e-320, "-inf", "nan"],
    ids=lambda value: str(value)[:8],
)
def test_figures_of_any_size_make_a_page(make_run, value):
    folder = make_run()
    manifest = json.loads((folder / "manifest.json").read_text())
    figures = ("val_loss", "val_step", "val_loss_start", "tokens", "seconds", "part_seconds", "mfu")
    manifest.update(step=value, parameters=value, figures=dict.fromkeys(figures, value))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "</html>" in build_report(folder)


@pytest.mark.parametrize("profile", ["a: [", "- 1", "x: !!python/object:os.system {}", "\x00"])
def test_a_profile_that_is_no_mapping_is_shown_as_it_is(make_run, profile):
    assert "</html>" in build_report(make_run(profile=profile))


def test_bytes_that_are_no_text_are_replaced(make_run):
    folder = make_run(events=[{}])
    for name in ("events.jsonl", "profile.yaml", "metrics.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b"\xff\xfe\x80\n")
    assert "</html>" in build_report(folder)


def test_checkpoints_are_listed_once_they_are_complete(make_run, page):
    folder = make_run()
    for name, complete in (("step-00000050", True), ("step-00000099", False)):
        path = folder / "checkpoints" / name
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"x" * 2**20)
        if complete:
            (path / "manifest.json").write_text("{}")
    shown = page(folder)
    assert "step-00000050" in shown.text and "step-00000099" not in shown.text


def test_thinning_keeps_every_spike_the_ends_and_the_gaps():
    rng = np.random.default_rng(0)
    places, values = np.linspace(0, 1, 100_000), rng.normal(size=100_000)
    spikes = rng.choice(100_000, 50, replace=False)
    values[spikes] = (100 + np.arange(50)) * np.where(np.arange(50) % 2, 1, -1)
    values[777] = np.nan
    kept = thin(places, values, 300)
    assert kept.size <= 3 * 300 + 2
    assert (np.diff(kept) > 0).all()
    assert {0, 99_999, 777} <= set(kept.tolist())
    bucket = np.minimum((places * 300).astype(int), 299)
    for number in range(300):
        own = np.flatnonzero(bucket == number)
        ends = {int(own[np.nanargmin(values[own])]), int(own[np.nanargmax(values[own])])}
        assert ends <= set(kept.tolist())


def test_few_points_are_not_thinned():
    assert thin(np.linspace(0, 1, 20), np.zeros(20), 10).tolist() == list(range(20))


def test_a_running_mean_of_a_line_is_the_line_inside_and_leaves_out_gaps():
    y = np.arange(1000.0)
    y[500] = np.nan
    mean = smoothed(Series("a", np.arange(1000.0), y))
    assert 500 not in mean.x
    np.testing.assert_allclose(mean.y[20:480], np.arange(20.0, 480.0))


def test_a_long_run_with_many_metrics_stays_a_small_page_that_shows_its_spike(
    make_run, make_rows, page
):
    metrics = make_rows(3000)
    for number, row in enumerate(metrics):
        row |= {f"plugin{k}/metric": (number * 7919 * (k + 1)) % 1000 / 999 for k in range(150)}
    metrics[1234]["loss"] = 77.0
    metrics[1234]["plugin3/metric"] = 88.0
    shown = page(make_run(metrics))
    assert len(shown.html.encode()) < 2_000_000
    assert "31 more metrics are in metrics.jsonl and not drawn" in shown.text
    spikes = [s for c in shown.charts for s in c["series"] if max(s["y"]) in (77.0, 88.0)]
    assert {s["x"][s["y"].index(max(s["y"]))] for s in spikes} == {1235}
    assert len(spikes) == 3


def test_a_failed_write_leaves_the_earlier_page_and_nothing_else(make_run, monkeypatch):
    folder = make_run()
    path = write_report(folder)
    before = path.read_bytes(), sorted(folder.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(folder)
    assert (path.read_bytes(), sorted(folder.iterdir())) == before
