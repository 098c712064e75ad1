from __future__ import annotations

import base64
import hashlib
import re
import shutil

import pytest

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&--></pre>"


def test_the_head_says_how_the_run_ended_and_its_figures(make_run, page):
    text = page(make_run()).text
    for shown in ("a_profile", "finished", "2.4175", "25,600", "1:05", "the sample text", "Once "):
        assert shown in text


def test_a_failed_run_shows_its_error(make_run, page):
    shown = page(make_run(status="failed", error="TrainingError: 5 steps in a row"))
    assert "TrainingError: 5 steps in a row" in shown.text
    assert "status bad" in shown.values("class")


def test_a_fallback_is_shown_with_its_reason(make_run, page):
    shown = page(make_run())
    text = shown.text
    assert "flash_v2" in text and "tva_default" in text and "no GPU here" in text
    assert "<td>ffn</td><td>vft</td>" in shown.html


def test_failures_of_plugins_are_in_the_table_and_the_timeline(make_run, page):
    failure = {"hook": "on_step_end", "step": 40, "error": "ValueError: no", "where": "mine.py:7"}
    plugin = {"name": "mine", "state": "quarantined", "failures": [failure]}
    shown = page(make_run(plugins=[plugin]))
    assert "on_step_end at step 40, mine.py:7: ValueError: no" in shown.text
    assert "failed at step 40: in on_step_end: ValueError: no" in shown.text
    assert "event cross" in shown.values("class")


def test_known_metrics_have_names_and_unknown_ones_are_grouped_by_plugin(make_run, make_rows, page):
    more = {"grad_norm": 1.0, "tokens_per_s": 900.0, "loss/moe.balance": 0.1, "moe/load": 1.2}
    more |= {"schedule/moe_capacity": 1.5, "mystery": 3.0}
    shown = page(make_run(make_rows(50, **more)))
    assert {
        "Learning rate",
        "Gradient norm, before clipping",
        "Target tokens per second",
        "loss/moe.balance",
        "load",
        "schedule/moe_capacity",
        "mystery",
    } <= set(shown.titles)
    for group in ("Terms of the loss", "Metrics of moe", "Scheduled parameters", "Other metrics"):
        assert group in shown.text


def test_the_time_of_a_step_is_split_by_part_and_by_plugin(make_run, make_rows, page):
    more = {"time/data_ms": 1.0, "time/forward_backward_ms": 6.0, "time/optimizer_ms": 2.0}
    more |= {"time/hooks_ms": 1.0, "time/hooks/moe_ms": 0.75, "time/step_ms": 10.0}
    more |= {"time/loss_terms/moe_ms": 1.5}
    metrics = make_rows(50, **more)
    for row in metrics[25:]:  # enabled in the middle of the run
        row["time/hooks/late_ms"] = 0.2
    shown = page(make_run(metrics))
    (stacked,) = [chart for chart in shown.charts if chart.get("stacked")]
    names = [series["name"] for series in stacked["series"]]
    assert names == ["data", "forward backward", "optimizer", "hooks"]
    assert "60.0%" in shown.text and "7.5%" in shown.text and "hooks of moe" in shown.text
    assert "time/step_ms" not in names
    table = re.findall(
        r"<td>([^<]+)</td><td class=.num.>([^<]+)</td><td class=.num.>([^<]+)%", shown.html
    )
    split = {label: float(ms) for label, ms, _ in table}
    assert split == {
        "data": 1.0,
        "forward backward": 6.0,
        "loss terms of moe": 1.5,
        "the rest of forward backward": 4.5,
        "optimizer": 2.0,
        "hooks": 1.0,
        "hooks of moe": 0.75,
        "hooks of late": 0.1,
        "the rest of hooks": 0.15,
    }
    assert sum(float(share) for label, _, share in table if " of " not in label) == 100.0


def test_the_curve_is_the_cross_entropy_and_the_sum_is_among_the_terms(make_run, make_rows, page):
    """Also of rows that do not have it yet."""
    metrics = make_rows(6, **{"loss/moe.balance": 0.5})
    for row in metrics[3:]:
        row["loss/cross_entropy"] = row["loss"] - 0.5
    shown = page(make_run(metrics))
    (losses, _) = shown.charts[0]["series"], shown.charts[1]
    expected = [row["loss"] - 0.5 for row in metrics]
    assert [series["name"] for series in losses] == ["training"]
    assert losses[0]["y"] == pytest.approx(expected)
    assert {"Loss with all terms", "loss/moe.balance"} <= set(shown.titles)
    assert "loss/cross_entropy" not in shown.titles
    assert f"training loss{expected[-1]:g}" in shown.text


@pytest.mark.parametrize("figures", [{}, {"val_step": 20}])
def test_figures_of_another_step_than_the_last_say_so(make_run, make_rows, page, figures):
    metrics = [*make_rows(30), {"step": 20, "val_loss": 2.5}, {"step": 10, "val_loss": "nan"}]
    figures = {"val_loss": 2.5, **figures}
    folder = make_run(metrics, step=33, status="interrupted", figures=figures)
    tiles = dict(
        re.findall(r"<li><span>(.*?)</span><strong>.*?</strong><small>(.*?)<", page(folder).html)
    )
    assert tiles["held-out loss"] == "at step 20, lowest 2.5"
    assert tiles["training loss"] == "at step 30, lowest 2"


def test_scores_of_a_part_of_the_held_out_text_are_no_points_of_the_curve_of_the_whole(
    tmp_path, make_run, make_rows, page
):
    scored = [(10, 3.0, 500), (20, 2.5, 500), (30, 2.75, 9000)]
    metrics = [
        *make_rows(30),
        *({"step": n, "val_loss": loss, "val_ppl": 9.0, "val_tokens": t} for n, loss, t in scored),
    ]
    shown = page(make_run(metrics, step=30, figures={"val_loss": 2.75, "val_step": 30}))
    named = {series["name"]: (series["x"], series["y"]) for series in shown.charts[0]["series"]}
    assert named["held out, 500 tokens"] == ([10, 20], [3.0, 2.5])
    assert named["held out, 9,000 tokens"] == ([30], [2.75])
    assert ">lowest 2.75<" in shown.html
    shutil.rmtree(tmp_path / "run")
    one = [{**row, "val_tokens": 500} if "val_tokens" in row else row for row in metrics]
    names = [series["name"] for series in page(make_run(one)).charts[0]["series"]]
    assert names == ["training", "held out"]
    shutil.rmtree(tmp_path / "run")
    odd = [
        {**row, "val_tokens": "nan"} if row.get("val_tokens") == 9000 else row for row in metrics
    ]
    assert "held out" in [s["name"] for s in page(make_run(odd)).charts[0]["series"]]


def test_the_values_under_the_pointer_are_those_of_the_rows(make_run, page):
    losses = page(make_run()).charts[0]["series"]
    assert [series["name"] for series in losses] == ["training"]
    assert losses[0]["x"] == list(range(1, 101))
    assert losses[0]["y"][:2] == [4.97, 4.94]


def test_hostile_text_stays_text(make_run, make_rows, page):
    metrics = make_rows(5, **{f"{HOSTILE}/{HOSTILE}": 1.0, HOSTILE: 2.0})
    metrics.append({"step": 5, "sample": HOSTILE})
    rows = [{"kind": HOSTILE, "asked": HOSTILE, "used": "x", "reason": HOSTILE}]
    failure = {"hook": HOSTILE, "step": 3, "error": HOSTILE, "where": HOSTILE}
    folder = make_run(
        metrics,
        profile=f"# {HOSTILE}\n",
        tail="{" + HOSTILE,
        events=[
            {"step": 2, "kind": kind, **dict.fromkeys(("plugin", "message", "error"), HOSTILE)}
            for kind in (HOSTILE, "enabled", "failed")
        ],
        status=HOSTILE,
        profile_name=HOSTILE,
        error=HOSTILE,
        sample=HOSTILE,
        providers=rows,
        inactive_keys=[{"key": HOSTILE, "reason": HOSTILE}],
        failed_checkpoints=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        data={HOSTILE: HOSTILE},
        timeline=[{"plugin": HOSTILE, "event": HOSTILE, "step": 2, HOSTILE: HOSTILE}],
        plugins=[{"name": HOSTILE, "state": HOSTILE, "dist": HOSTILE, "failures": [failure]}],
    )
    shown = page(folder)
    assert [tag for tag, _ in shown.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in shown.elements]
    assert not any(name.startswith("on") for _, attrs in shown.elements for name in attrs)
    assert shown.text.count("<script>alert('x')") > 10


def test_control_characters_and_what_reorders_text_are_made_visible(make_run, page):
    html = page(make_run(sample="bell \x07 nul \x00 reversed \u202e lone \ud800 \u4f60\u597d")).html
    assert "bell \u2407 nul \u2400 reversed \ufffd lone \ufffd \u4f60\u597d" in html
    assert html.encode("utf-8")


def test_nothing_is_loaded_from_anywhere(make_run, make_rows, page):
    shown = page(make_run(make_rows(200, grad_norm=1.0, **{"time/data_ms": 1.0})))
    assert {tag for tag, _ in shown.elements}.isdisjoint(
        {"img", "iframe", "object", "embed", "audio", "video", "base", "form", "use", "image"}
    )
    assert shown.values("href") == ["data:,"]
    for attribute in ("src", "srcset", "data", "action", "style", "xlink:href"):
        assert shown.values(attribute) == []
    (css,) = shown.styles
    assert "url(" not in css and "@import" not in css and "@font-face" not in css
    script = shown.scripts[1]
    for call in ("fetch", "XMLHttpRequest", "import", "sendBeacon", "WebSocket", "innerHTML"):
        assert call not in script


def test_the_policy_admits_the_pages_own_style_and_script_alone(make_run, page):
    shown = page(make_run())
    (policy,) = [c for c in shown.values("content") if "default-src" in c]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"

    def named(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["style-src"] == named(shown.styles[0])
    assert rules["script-src"] == named(shown.scripts[1])


def test_quantiles_of_one_figure_share_a_chart(make_run, make_rows, page):
    more = {"moe/load_min": 0.1, "moe/load_p50": 1.0, "moe/load_max": 2.5, "moe/drop_max": 0.5}
    shown = page(make_run(make_rows(50, **more)))
    assert {"load, quantiles", "drop_max"} <= set(shown.titles)
    assert "load_p50" not in shown.titles


def test_every_chart_tells_its_values_in_words_too(make_run, page):
    shown = page(make_run())
    labels = [
        attrs.get("aria-label") for tag, attrs in shown.elements if attrs.get("role") == "img"
    ]
    assert labels and all(labels)
    assert "last 2, lowest 2 at step 100, highest 4.97 at step 1" in shown.text
    assert ("html", {"lang": "en"}) in shown.elements


def test_the_page_of_a_folder_is_always_the_same(make_run, page):
    folder = make_run()
    assert page(folder).html == page(folder).html


def event(step, kind, plugin="", **data):
    return {"step": step, "kind": kind, "plugin": plugin, **data}


EVENTS = [
    event(20, "enabled", "moe", epoch=1),
    event(60, "enabled", "voter", epoch=1),
    event(60, "failed", "voter", hook="on_step_end", error="ValueError: x"),
    event(40, "resumed", checkpoint="checkpoints/step-00000040"),
    event(41, "enabled", "moe", epoch=1),
    event(80, "disabled", "moe", epoch=2),
    event(80, "deleted", checkpoint="step-00000040"),
    event(81, "of a later version", message="what it says"),
]


def switches(shown):
    cells = re.findall(r"<tr><td[^>]*>([\d,]+)</td><td[^>]*>.*?</td><td>(.*?)</td><td>(.*?)</td>",
                       shown.html)  # fmt: skip
    return [(int(step), plugin, kind) for step, plugin, kind in cells]


@pytest.mark.parametrize("timeline", [[], [{"plugin": "moe", "event": "enabled", "step": 20}]])
def test_the_timeline_goes_on_after_a_resume_without_what_was_lost(make_run, page, timeline):
    shown = page(make_run(events=EVENTS, timeline=timeline))
    assert switches(shown) == [
        (20, "moe", "enabled"),
        (40, "", "resumed"),
        (80, "moe", "disabled"),
        (81, "", "of a later version"),
    ]
    assert "moe enabled" in shown.text and "voter" not in shown.text
    assert "from checkpoints/step-00000040" in shown.text and "what it says" in shown.text
    assert "events.jsonl" not in shown.text


def test_a_run_without_events_is_told_by_its_manifest_and_its_log_is_not_read(make_run, page):
    folder = make_run(
        events=None, timeline=[{"plugin": "moe", "event": "enabled", "epoch": 1, "step": 20}]
    )
    line = "2026-11-23 16:59:17,1 INFO apt.training: enabled voter (epoch 1, step 30)\n"
    (folder / "log.txt").write_text(line)
    shown = page(folder)
    assert switches(shown) == [(20, "moe", "enabled")]
    assert (
        "there is no events.jsonl" in shown.text
        and "only the events of manifest.json" in shown.text
    )


def test_what_is_told_by_events_and_manifest_is_told_once(make_run, page):
    losses = {"loss_before": 1.0, "loss_after": 1.25}
    failure = {"hook": "on_step_end", "step": 30, "error": "ValueError: x"}
    folder = make_run(
        events=[
            event(20, "enabled", "moe", epoch=1),
            event(20, "switched", "moe", epoch=1, **losses),
            {"kind": "failed", "plugin": "voter", **failure},
        ],
        timeline=[{"plugin": "moe", "event": "enabled", "epoch": 1, "step": 20}],
        switches=[{"plugin": "moe", "epoch": 1, "step": 20, **losses}],
        plugins=[{"name": "voter", "state": "active", "failures": [failure]}],
    )
    shown = page(folder)
    assert switches(shown) == [
        (20, "moe", "enabled"),
        (20, "moe", "transformed the model"),
    ]
    # In the table, and in the timeline of either width.
    assert shown.text.count("in on_step_end: ValueError: x") == 3
    assert shown.text.count("loss 1 before, 1.25 after") == 3  # in the table and the timeline


def test_nothing_is_shown_of_other_folders(make_run, page, tmp_path):
    (tmp_path / "key").write_text("a private key")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-00000009").mkdir(parents=True)
    (elsewhere / "step-00000009/manifest.json").write_text("{}")
    folder = make_run(checkpoint_dir=str(elsewhere))
    (folder / "profile.yaml").unlink()
    (folder / "profile.yaml").symlink_to(tmp_path / "key")
    shown = page(folder)
    assert "a private key" not in shown.html and "step-00000009" not in shown.text
    assert "profile.yaml cannot be read" in shown.text
