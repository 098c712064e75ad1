"""Every example keeps the promises of a plugin, and does what it says in a real run."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.declarations import declared_by
from apt_core.inference import generate
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.runs import open_run
from apt_core.testing import check_plugin, tiny_run, tiny_session
from apt_core.types import GenerationRequest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PATH = {path.stem: str(path) for path in EXAMPLES}
LOGGER, WINDOW, Z_LOSS = (PATH[name] for name in ("loss_logger", "window_attention", "z_loss"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def train(*options: str) -> list[dict]:
    """Five steps of tiny_debug through the command; returns the rows of the metrics."""
    quick = ("--training.max_steps", "5", "--training.log_every_steps", "1")
    quick += ("--evaluation.eval_freq", "0", "--evaluation.eval_batches", "1")
    quick += ("--evaluation.sample_tokens", "0", "--training.max_epochs", "1")
    Path("text.txt").write_text("A short text, again and again: 0 1 2 3 4 5 6 7 8 9.\n\n" * 99)
    quick += ("--data.train_path", "text.txt")
    code = run_command(app, "apt-train", ["-p", "tiny_debug", "--output", "run", *quick, *options])
    assert code == 0
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.long
def test_every_example_passes_the_checks_of_a_plugin(example: Path) -> None:
    # The lengths that are tried go beyond the window, whatever that is.
    narrow = {"window_attention.window": 4} if example.stem == "window_attention" else {}
    findings = check_plugin(str(example), overrides=narrow, processes=1)
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_says_how_to_run_it_and_is_short(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    document = ast.get_docstring(ast.parse(text)) or ""
    assert re.search(rf"^apt-[a-z]+ .*--plugin examples/{example.name}", document, re.M)
    code = [line for line in text.replace(document, "").splitlines() if line.strip()]
    assert len(code) <= 55
    listed = (example.parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert f"`examples/{example.name}`" in listed


def test_the_logger_writes_the_losses_of_the_run() -> None:
    rows = train("--plugin", LOGGER, "--loss_logger.path", "mine.csv")
    with Path("mine.csv").open(newline="") as file:
        head, *written = csv.reader(file)
    assert head == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in written] == [
        (row["step"], row["loss"]) for row in rows
    ]


def test_the_logger_of_a_resumed_run_writes_what_an_uninterrupted_one_does(folder: Path) -> None:
    fit = {"training.log_every_steps": 1, "loss_logger.path": "whole.csv"}
    tiny_run(LOGGER, steps=6, overrides=fit)
    fit["loss_logger.path"] = "parts.csv"
    stop = {**fit, "training.max_steps": 6}
    stopper = folder / "stopper.py"
    stopper.write_text(
        "from apt_core import hookimpl\n\n"
        "@hookimpl\ndef on_step_end(step, trainer):\n"
        "    if step == 3:\n        trainer.request_stop('half of it')\n"
    )
    tiny_run(LOGGER, str(stopper), overrides=stop, output=folder / "run")
    assert len(Path("parts.csv").read_text().splitlines()) == 4
    tiny_run(LOGGER, overrides=stop, output=folder / "run", resume=True)
    assert Path("parts.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_the_window_attention_trains_and_is_what_the_manifest_names() -> None:
    options = ("--model.attention_name", "window", "--window_attention.window", "8")
    train("--plugin", WINDOW, "--strict", *options)
    providers = json.loads(Path("run/manifest.json").read_text())["providers"]
    used = {row["kind"]: (row["used"], row["reason"]) for row in providers}
    assert used["attention"] == ("window", "")


@pytest.mark.parametrize("mask", [None, torch.ones(10, 10, dtype=torch.bool)])
def test_the_window_is_all_that_a_token_sees(mask: torch.Tensor | None) -> None:
    manager = PluginManager()
    declared_by(WINDOW, {}, manager)
    registry = Registry(manager)
    layer = registry.get("attention", "window", {"window": 3}).create_layer(32, 4, max_seq_len=16)
    x = torch.randn(1, 10, 32, requires_grad=True)
    layer(x, mask=mask)[:, 7].square().sum().backward()
    assert x.grad.abs().sum(-1)[0].nonzero().flatten().tolist() == [5, 6, 7]


def test_the_loss_term_is_switched_on_by_the_schedule_and_its_weight_follows() -> None:
    rows = train(
        *("--plugin", Z_LOSS, "--schedules.enable_z_loss_at_step", "3"),
        *("--schedules.z_loss_weight", "{start: 0, end: 1e-3, by: step, until: 5}"),
    )
    terms = [row.get("loss/z_loss.z") for row in rows]
    assert terms[:3] == [None, None, 0.0]
    assert 0 < terms[3] < terms[4] and terms[4] == pytest.approx(2 * terms[3], rel=0.05)


def test_the_tracker_has_every_figure_once_after_a_resume_too(folder: Path) -> None:
    plugin, stop = PATH["sqlite_tracker"], {"training.log_every_steps": 1, "training.max_steps": 4}
    stopper = folder / "stopper.py"
    stopper.write_text(
        "from apt_core import hookimpl\n\n"
        "@hookimpl\ndef on_step_end(step, trainer):\n"
        "    if step == 2:\n        trainer.request_stop('half of it')\n"
    )
    tiny_run(plugin, str(stopper), overrides=stop, output=folder / "run")
    tiny_run(plugin, overrides=stop, output=folder / "run", resume=True)
    with closing(sqlite3.connect("metrics.db")) as database:
        kept = database.execute("SELECT step, name, value FROM metrics ORDER BY step").fetchall()
    rows = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [(step, value) for step, name, value in kept if name == "loss"] == losses
    assert len(losses) == 4


def test_the_source_trains_on_what_functions_say(folder: Path) -> None:
    from apt_core.cli.data import app as data_app

    options = ["-p", "tiny_debug", "--plugin", PATH["docstrings"], "--data.loader", "docstrings"]
    assert run_command(data_app, "apt-data", ["stats", *options, "--json"]) == 0


def test_the_regulariser_follows_its_schedule_and_is_left_out_at_nought() -> None:
    ramp = "{start: 0.1, end: 0, by: step, until: 4}"
    rows = train(*("--plugin", PATH["confidence_penalty"], "--schedules.confidence_weight", ramp))
    terms = [row.get("loss/confidence_penalty.negative_entropy") for row in rows]
    assert terms[0] < terms[1] < terms[2] < 0 and terms[4] is None


def test_the_decoder_aims_at_a_surprise_and_draws_by_the_seed() -> None:
    session = tiny_session(PATH["mirostat"], overrides={"mirostat.surprise": 9.0})
    texts = [
        generate(session, GenerationRequest("The", max_new_tokens=20, seed=seed)).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    plugin = session.manager.get_plugin("mirostat")
    decoder = plugin.Mirostat(plugin.Settings(surprise=2.0), seed=0)
    logits = -1.2 * torch.arange(1, 257).log()  # as words have them
    bits = -logits.log_softmax(-1) / math.log(2)
    drawn = [float(bits[decoder.choose(None, logits)]) for _ in range(400)]
    assert sum(drawn[100:]) / 300 == pytest.approx(2.0, abs=0.3)


def test_the_task_scores_by_letters_and_as_a_whole() -> None:
    manager = PluginManager()
    declared_by(PATH["spelling"], {}, manager)
    task = Registry(manager).get("task", "spelling")
    item = task.items()[0]
    whole = task.score(item, f" {item.answer}")
    assert whole == {"letters": 1.0, "exact_match": 1.0}
    half = task.score(item, item.answer[: len(item.answer) // 2])
    assert 0 < half["letters"] < 1 and half["exact_match"] == 0


def test_the_transform_changes_no_output_and_its_gains_are_trained() -> None:
    options = ("--plugin", PATH["layer_scale"], "--strict")
    train(*options, "--schedules.enable_layer_scale_at_step", "3")
    (switch,) = json.loads(Path("run/manifest.json").read_text())["switches"]
    assert switch["loss_before"] == switch["loss_after"]
    session = open_run(Path("run"), plugins=[PATH["layer_scale"]])
    gains = [p for name, p in session.model.named_parameters() if name.endswith("ffn.gain")]
    assert len(gains) == 2 and all((gain != 1).any() for gain in gains)
