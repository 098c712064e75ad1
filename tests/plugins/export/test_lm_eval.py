"""lm-evaluation-harness scores the folder of an export, by its model of Hugging Face, as it scores
the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.optional import optional

optional("lm_eval", 'needs pip install "apt-kernel[lm_eval]"')
optional("transformers", "what runs the exports is not installed")

from apt_core.evaluation.found import Asking
from apt_core.inference import Engine
from apt_core.modeling.plain import plain_model
from apt_core.types import GenerationRequest
from apt_plugins.export.hf import HFExporter
from tests.evaluation.test_lm_eval import CHOICES, HARNESS, QUESTIONS, TEXTS
from tests.plugins.export.conftest import Model, job_of, session_of

SPECS = {
    "bytes": Model({"model.tva.s": 0, "model.max_seq_len": 80}),
    # As many ids as the tokenizer has: others have a share in the run's probabilities alone.
    "bpe": Model({"model.attention_name": "mha", "model.vocab_size": 290}, tokenizer="bpe"),
}
FORMS = {"choosing": CHOICES, "reading": TEXTS, "answering": QUESTIONS}
METRICS = {"choosing": "acc", "reading": "bits_per_byte", "answering": "exact_match"}


@pytest.mark.parametrize("name", SPECS)
def test_an_export_gets_the_scores_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from apt_core.evaluation.lm_eval_model import SessionModel

    for key, value in (("HF_DATASETS_CACHE", str(tmp_path / "cache")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(key, value)
    session = session_of(SPECS[name], tmp_path)
    context = session.config.model.max_seq_len
    words = ["The line", "a text", "small  ", "that says", "0 1 2", "or\n"]
    rows = {
        "choosing": [
            {
                "prompt": f"{word} {n}",
                "choices": [f" {n}", "x" * (1 + n % 5), " or"],
                "answer": n % 3,
            }
            for n, word in enumerate(words * 3, 1)
        ],
        "reading": [{"text": f"{word} é火 {n}."} for n, word in enumerate(words)],
    }
    prompts = [f"{word}{n}" for word in words for n in range(4)]
    request = GenerationRequest("", max_new_tokens=6, temperature=0.0, stop=("e",))
    given = Engine(session).run([replace(request, prompt=prompt) for prompt in prompts])
    # Bytes that are no text, which these models give, too, are shown in different ways.
    rows["answering"] = [
        {"prompt": prompt, "answer": result.text if n % 3 else "no"}
        for n, (prompt, result) in enumerate(zip(prompts, given, strict=True))
        if "\ufffd" not in session.tokenizer.decode(result.token_ids)
    ]
    assert len(rows["answering"]) > 4
    for task, form in FORMS.items():
        lines = "\n".join(map(json.dumps, rows[task]))
        (tmp_path / f"{task}.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / f"{task}.yaml").write_text(HARNESS.format(name=task, folder=tmp_path) + form)

    folder = tmp_path / "export"
    folder.mkdir()
    plain = plain_model(session.model, session.tokenizer.vocab_size)
    HFExporter().write(job_of(folder, plain, session.tokenizer))
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=context)
    own = SessionModel(session, Asking(batch_size=4, stride=context))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    scores = [
        evaluate(model, tasks.load([*rows]), log_samples=False, bootstrap_iters=0)["results"]
        for model in (own, theirs)
    ]
    for task, metric in METRICS.items():
        mine, other = (each[task][f"{metric},none"] for each in scores)
        assert other == pytest.approx(mine, rel=1e-5), task
        assert mine > 0 and (mine < 1 or task == "reading"), task
