"""Every example keeps the promises of a plugin, and does what it says in a real run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.declarations import declared_by
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.testing import check_plugin, tiny_run

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LOGGER, WINDOW, Z_LOSS = (str(path) for path in EXAMPLES)


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
def test_every_example_passes_the_checks_of_a_plugin(example: Path) -> None:
    # The lengths that are tried go beyond the window, whatever that is.
    narrow = {"window_attention.window": 4} if example.stem == "window_attention" else {}
    findings = check_plugin(str(example), overrides=narrow)
    assert [finding for finding in findings if not finding.ok] == []


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
