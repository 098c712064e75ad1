"""Tasks in a training: they change no bit of it, and cost it nothing when they fail."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from apt_core import ProviderSpec, hookimpl
from apt_core.errors import ConfigError, PluginError
from apt_core.evaluation.tasks import questions
from apt_core.providers import Question, QuestionTask
from apt_core.runs import open_run
from apt_core.runs.compare import compare_runs
from apt_core.runs.scores import read_evaluation
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_core.training.tasks import TaskScores
from apt_core.types import GenerationResult

TASKS = {
    "evaluation.tasks": ["arithmetic", "completion", "held_out", "drawing"],
    "evaluation.task_items": 5,
    "evaluation.eval_freq": 3,
    "model.dropout": 0.1,
}


PLAIN = {key: value for key, value in TASKS.items() if "task" not in key}


class Drawing(QuestionTask):
    """Draws from every generator there is, and leaves the process changed."""

    metrics: ClassVar = {"length": "lower"}
    max_new_tokens = 4
    temperature = 1.0
    num_samples = 2

    def items(self):
        return [Question("a"), Question("b"), Question("c")]

    def score(self, item, text):
        random.random(), np.random.rand(), torch.rand(1)
        torch.manual_seed(3)
        torch.set_grad_enabled(True)
        return {"length": len(text)}


class Plugin:
    """Offers the task, and ends or fails it."""

    def __init__(self, fault="", at=0):
        self.fault, self.at, self.trainer, self.rows = fault, at, None, []

    @hookimpl
    def apt_register_providers(self):
        return [ProviderSpec("task", "drawing", Drawing), ProviderSpec("task", "bad", self.bad)]

    def bad(self, config):
        plugin = self

        class Bad(Drawing):
            def score(self, item, text):
                if plugin.trainer is not None and plugin.trainer.step >= plugin.at:
                    if plugin.fault == "signal":
                        plugin.fault = ""
                        signal.raise_signal(signal.SIGTERM)
                    elif plugin.fault:
                        raise RuntimeError(plugin.fault)
                return super().score(item, text)

        return Bad()

    @hookimpl
    def on_evaluation_end(self, trainer, metrics):
        self.trainer = trainer
        self.rows.append(metrics)


def rows_of(run):
    return [row for row in run.metrics if "val_loss" in row]


def test_tasks_leave_the_weights_bit_identical_and_a_resume_exact(tmp_path):
    plain = tiny_run(overrides=PLAIN)
    plugin = Plugin()
    scored = tiny_run(plugin, overrides=TASKS, output=tmp_path / "whole", strict=False)
    assert scored.same_weights(plain)
    for row, before in zip(rows_of(scored), rows_of(plain), strict=True):
        assert before.items() <= row.items()
        names = {name for name in row if name.startswith(("task/", "time/"))}
        assert names == {
            *("task/arithmetic/number_match", "task/drawing/length"),
            *("task/completion/accuracy", "task/completion/accuracy_per_byte"),
            *("task/held_out/bits_per_byte", "task/held_out/perplexity"),
            *(f"time/tasks/{name}_ms" for name in TASKS["evaluation.tasks"]),
        }
        assert all(row[name] > 0 for name in names if name.startswith("time/"))
    figures = scored.result.figures
    assert figures["task/held_out/perplexity"] < figures["task/held_out/perplexity_start"]
    assert plugin.rows[-1]["task/held_out/perplexity"] == figures["task/held_out/perplexity"]

    options = {"overrides": TASKS, "output": tmp_path / "part", "strict": False}
    (tmp_path / "part.txt").write_text((tmp_path / "whole.txt").read_text())
    tiny_run(Plugin(), stop_at_step=7, **options)
    tiny_run(Plugin(), resume=True, **options)
    comparison = compare_runs(tmp_path / "whole", tmp_path / "part")
    # The first part ended with an evaluation of its last step.
    assert {difference.step for difference in comparison.differences} == {7}


def test_a_task_that_fails_is_told_and_the_run_goes_on(tmp_path, caplog):
    changes = {**TASKS, "evaluation.tasks": ["bad", "completion"]}
    plugin = Plugin("out of luck", at=3)
    run = tiny_run(plugin, overrides=changes, strict=False)
    assert run.result.status == "finished" and run.same_weights(tiny_run(overrides=PLAIN))
    rows = rows_of(run)
    assert ["task/bad/length" in row for row in rows][:3] == [True, False, False]
    assert all("task/completion/accuracy" in row for row in rows)
    (record,) = [r for r in run.manager.records.values() if r.failures]
    (failure,) = record.failures
    assert ("out of luck" in failure.error and "score" in failure.where) or failure.where
    assert "the task bad is not scored any more" in caplog.text
    with pytest.raises(PluginError, match="out of luck"):
        tiny_run(Plugin("out of luck"), overrides=changes)


def test_a_signal_ends_an_evaluation_and_the_resume_makes_it(tmp_path):
    changes = {**TASKS, "evaluation.tasks": ["bad", "completion"]}
    options = {"overrides": changes, "output": tmp_path / "run", "strict": False}
    run = tiny_run(Plugin("signal", at=3), **options)
    assert (run.result.status, run.result.step) == ("interrupted", 3)
    assert [row["step"] for row in rows_of(run)] == [0]
    run = tiny_run(Plugin(), resume=True, **options)
    assert run.result.status == "finished"
    assert [row["step"] for row in rows_of(run)][:4] == [0, 3, 6, 9]


GOOD = {6: 3, 9: 1}
"""At which steps how many of three answers are right."""


class Said:
    """An engine that answers as GOOD says."""

    def __init__(self, session, *, max_batch):
        self.right = GOOD.get(session.position.step, 0)

    def run(self, requests, *, interrupted):
        return [
            GenerationResult("x" if int(request.prompt) < self.right else "y", ())
            for request in requests
        ]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_best_checkpoint_may_follow_a_task(tmp_path, monkeypatch, better):
    monkeypatch.setattr(questions, "Engine", Said)

    class Follow(QuestionTask):
        metrics: ClassVar = {"share": better}

        def items(self):
            return [Question(f"{n}", "x") for n in range(3)]

        def score(self, item, text):
            right = float(text == item.answer)
            return {"share": right if better == "higher" else 1.0 - right}

    class Offers:
        @hookimpl
        def apt_register_providers(self):
            return [ProviderSpec("task", "follow", Follow)]

    changes = {
        "evaluation.tasks": ["follow"],
        "evaluation.eval_freq": 3,
        "evaluation.save_best": True,
        "evaluation.best_by": "task/follow/share",
        "training.keep_last": 1,
        "training.save_freq": 0,
        "training.lr_schedule_name": "constant",
    }
    output = tmp_path / "run"
    run = tiny_run(Offers(), overrides=changes, output=output)
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == ["step-00000006", f"step-{run.result.step:08d}"]
    evaluated = read_evaluation(output / "checkpoints" / kept[0])
    assert evaluated.badness == (-1.0 if better == "higher" else 0.0)
    assert open_run(output, weights="best", plugins=[Offers()]).position.step == 6

    # By the loss the last one is the best; what was the best before is kept until then.
    changes |= {"evaluation.best_by": "val_loss", "training.max_epochs": 3}
    run = tiny_run(Offers(), overrides=changes, output=output, resume=True)
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert "step-00000006" not in kept
    best = open_run(output, weights="best", plugins=[Offers()]).position.step
    assert best > 24


def pairs(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "response": f"#### {n + 1}"} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_reasoning_quality_compares_final_answers_of_held_out_pairs(tmp_path, monkeypatch):
    asked = []

    class Answers(Said):
        def run(self, requests, *, interrupted):
            asked.extend(request.prompt for request in requests)
            numbers = [int(request.prompt.split()[0]) for request in requests]
            return [GenerationResult(f"So\n#### {n + n % 2}.", ()) for n in numbers]

    monkeypatch.setattr(questions, "Engine", Answers)
    changes = {
        "data.loader": "jsonl",
        "data.train_path": str(pairs(tmp_path)),
        "data.val_fraction": 0.2,
        "evaluation.metrics": ["reasoning_quality"],
        "evaluation.best_by": "val_reasoning_quality",
    }
    run = tiny_run(
        steps=4, overrides=changes, profile={**TINY_PROFILE, "data": {"loader": "jsonl"}}
    )
    numbers = {int(prompt.split()[0]) for prompt in asked}
    assert 2 < len(numbers) < 20 and all(prompt.endswith(" + 1 =\n") for prompt in asked)
    share = sum(n % 2 for n in numbers) / len(numbers)
    assert run.result.figures["val_reasoning_quality"] == pytest.approx(share)
    assert run.manager.records == {}


def test_what_cannot_be_measured_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "chat.yaml").write_text(
        "kind: questions\ntemplate: chat\nitems: [{prompt: a, answer: b}]"
    )
    (tmp_path / "bad.yaml").write_text("kind: questions\nitems: [{promt: a}]")
    for changes, message in (
        ({"evaluation.best_by": "val_los"}, "did you mean 'val_loss'"),
        ({"evaluation.best_by": "task/a/b"}, "no evaluation of this run measures"),
        ({"evaluation.tasks": [str(tmp_path / "bad.yaml")]}, "bad.yaml:2: items"),
        ({"evaluation.tasks": ["arithmetik"]}, "did you mean 'arithmetic'"),
        ({"evaluation.metrics": ["reasoning_quality"]}, "no prompts with responses"),
    ):
        with pytest.raises(ConfigError) as raised:
            tiny_run(overrides=changes)
        assert message in str(raised.value)
    run = tiny_run(steps=1, overrides={"evaluation.metrics": ["reasoning_quality"]}, strict=False)
    assert "val_reasoning_quality" not in run.result.figures
    chat = {"evaluation.tasks": [str(tmp_path / "chat.yaml")], "evaluation.task_items": 1}
    assert "task/chat/exact_match" in tiny_run(steps=1, overrides=chat).result.figures


@pytest.mark.long
def test_two_processes_score_what_one_does(tmp_path, ranks, in_children):
    changes = {**TASKS, "training.batch_size": 2, "model.dropout": 0.0}
    one = {"training.batch_size": 4}

    def train(name, **more):
        output = tmp_path / name
        tiny_run(Plugin(), overrides={**changes, **more}, output=output, strict=False, steps=6)

    train("one", **one)
    expected = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").open()]
    for sharding in ("ddp", "fsdp"):
        more = {"hardware.distributed": sharding}
        (tmp_path / f"{sharding}.txt").write_text((tmp_path / "one.txt").read_text())
        assert in_children(*ranks(lambda s=sharding, m=more: train(s, **m))) == [0, 0]
        rows = [json.loads(line) for line in (tmp_path / sharding / "metrics.jsonl").open()]
        scores = [(r["step"], r) for r in rows if "val_loss" in r]
        of_one = [(r["step"], r) for r in expected if "val_loss" in r]
        assert [step for step, _ in scores] == [step for step, _ in of_one]
        for (_, row), (_, before) in zip(scores, of_one, strict=True):
            names = [name for name in row if name.startswith("task/")]
            assert names and all(row[n] == pytest.approx(before[n], rel=1e-3) for n in names)


def test_an_interrupted_score_is_none():
    class World:
        size, rank, sharding = 1, 0, "none"

    run = tiny_run(steps=1)  # boots what follows
    assert run.result.step == 1
    from apt_core.kernel import boot
    from apt_core.training.prepare import prepare

    kernel = boot({**TINY_PROFILE, "evaluation": {"tasks": ["completion"]}})
    parts, built = prepare(kernel, torch.device("cpu"))
    del built
    assert [task.items.name for task in parts.tasks] == ["completion"]
    scores = TaskScores(kernel, parts.tasks, World())
    from apt_core.testing import tiny_session

    assert scores.score(tiny_session(), lambda: True) is None
