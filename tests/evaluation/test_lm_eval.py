"""lm-evaluation-harness gives the model of a run the scores that apt-eval gives it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apt_core.errors import ConfigError
from apt_core.evaluation.found import Asking
from apt_core.evaluation.scoring import Scoring, items_of, score
from apt_core.evaluation.tasks.file import read_task
from apt_core.inference import Engine
from apt_core.testing import tiny_session
from apt_core.types import GenerationRequest
from tests.optional import optional

optional("lm_eval", 'needs pip install "apt-kernel[lm_eval]"')

HARNESS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
target_delimiter: ""
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
TEXTS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
QUESTIONS = """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write(folder: Path, name: str, harness: str, own: str, rows: list[dict]) -> None:
    """The same task for both."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / f"{name}_of_harness.yaml").write_text(
        HARNESS.format(name=name, folder=folder) + harness
    )
    (folder / "own").mkdir(exist_ok=True)
    (folder / "own" / f"{name}.jsonl").write_text((folder / f"{name}.jsonl").read_text("utf-8"))
    (folder / "own" / f"{name}.yaml").write_text(f"items_file: {name}.jsonl\n{own}")


def test_the_harness_and_apt_eval_give_the_same_scores(tmp_path, monkeypatch):
    from apt_core.evaluation.lm_eval_model import HarnessTasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    session = tiny_session(overrides={"model.max_seq_len": 24})
    session = replace(session, model=session.model.eval())
    words = ["apple ", "a pear", "plum  ", "fig", "quince and more than fits into it, ", "or\n"]
    choices = [
        {"prompt": f"{word}{n}", "choices": [f" {n}", "x" * n, " or"], "answer": n % 3}
        for n, word in enumerate(words * 3, 1)
    ]
    texts = [{"text": f"{word} {'é火' * n}."} for n, word in enumerate(words * 2)]
    prompts = [f"{word}{n}" for n, word in enumerate(words)]
    request = GenerationRequest("", max_new_tokens=6, temperature=0.0, stop=("e",))
    given = Engine(session).run([replace(request, prompt=prompt) for prompt in prompts])
    questions = [
        {"prompt": prompt, "answer": result.text if n % 3 else "no"}
        for n, (prompt, result) in enumerate(zip(prompts, given, strict=True))
    ]
    write(tmp_path, "choosing", CHOICES, "kind: choices", choices)
    write(tmp_path, "reading", TEXTS, "kind: passages", texts)
    own = "kind: questions\nmax_new_tokens: 6\nstop: [e]\nnormalize: [unicode]"
    write(tmp_path, "answering", QUESTIONS, own, questions)

    names = ["choosing", "reading", "answering"]
    asking, scores = Asking(batch_size=5, stride=7), {}
    harness = HarnessTasks(names, [tmp_path])
    for name, figures, row in harness.score(session, asking, None):
        scores[name] = figures
        assert row["items"] == row["total"] > 0 and row["asked"]["lm_eval"]
    assert scores["choosing"]["acc"].method == "normal"
    for name, theirs, metric in (
        ("choosing", "acc", "accuracy"),
        ("reading", "bits_per_byte", "bits_per_byte"),
        ("answering", "exact_match", "exact_match"),
    ):
        task = read_task(tmp_path / "own" / f"{name}.yaml")
        found = score(session, items_of(name, task, Scoring()), asking)
        value = scores[name][theirs].value
        assert value == pytest.approx(found.figures[metric].value, rel=1e-6), name
        assert 0 < value < 1 or name == "reading"

    with pytest.raises(ConfigError, match="there is no such folder"):
        HarnessTasks(names, [tmp_path / "nowhere"])
    (tmp_path / "choosing.jsonl").unlink()
    with pytest.raises(ConfigError, match="lm-eval cannot score by choosing"):
        list(HarnessTasks(["choosing"], [tmp_path]).score(session, asking, None))
