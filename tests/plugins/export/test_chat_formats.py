"""Exports put conversations in the form that the model was trained on, as ``apt-chat`` does."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apt_core.cli.run_command import run_command
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.data.tokenizers.chat import CHAT_TEMPLATE
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.inference.chat import FORMATS
from apt_core.modeling.plain import plain_model
from apt_core.providers import ExporterProvider, ExportJob, SpecialTokens
from apt_core.requirements import unmet
from apt_core.runs import Session
from apt_core.testing import tiny_run
from apt_plugins.export.command import app
from apt_plugins.export.comparing import compare
from apt_plugins.export.own_answers import OwnAnswers
from apt_plugins.export.questions import CONVERSATIONS, questions_for
from apt_plugins.export.runtimes import answered
from apt_plugins.export.tokenizers import BEGINNINGS, chat_template_of
from tests.plugins.export.conftest import Model, session_of, tokenizer_of
from tests.plugins.export.test_broken_writers import EXPORTERS

SETTINGS = {"model.num_layers": 1, "model.tva.s": 0, "model.vocab_size": 330}

SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACES: dict[str, dict[str, Any]] = {
    "first": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first",
                          "split": True},
    },
    "each": {
        "pre_tokenizer": None,
        "normalizer": {"type": "Sequence",
                       "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]},
    },
}  # fmt: skip
"""Where a tokenizer puts a space of its own: before the first word of a text, or of each part of it
between special tokens."""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A model with tokenizers of several kinds; those of Hugging Face begin texts with a token."""
    session = session_of(Model(SETTINGS), tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: tokenizer_of(name, folder / name) for name in ("char", "bpe", "hf")}
    for name, change in SPACES.items():
        shutil.copytree(folder / "hf", folder / name)
        path = folder / name / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
        made[name] = HFTokenizer({"path": str(path.parent)})
    return {"byte": session, **{n: replace(session, tokenizer=each) for n, each in made.items()}}


@pytest.mark.parametrize("target", EXPORTERS)
def test_programs_see_what_apt_chat_shows_the_model(
    target: str, sessions: dict[str, Session], tmp_path: Path
) -> None:
    module, name = EXPORTERS[target]
    if target != "hf":
        pytest.importorskip(target, reason="what writes the exports is not installed")
    exporter: ExporterProvider = getattr(importlib.import_module(module), name)()
    proof = exporter.proof
    assert proof is not None
    if missing := unmet(proof.requires):
        pytest.skip(f"{proof.runtime} is needed: {'; '.join(missing)}")
    targets, asked = [], []
    for kind, session in sessions.items():
        plain = plain_model(session.model, session.tokenizer.vocab_size)
        if [*exporter.check(plain.shape, session.tokenizer)]:
            assert target == "gguf" and kind in ("hf", "first")
            continue
        for form in FORMATS.values():
            folder = tmp_path / kind / form.name
            folder.mkdir(parents=True)
            template = chat_template_of(form, session.tokenizer)
            exporter.write(ExportJob(folder, plain, session.tokenizer, "tiny", template))
            made = questions_for(
                plain.shape, session.tokenizer, (), form, num_prompts=1, new_tokens=1
            )
            questions = replace(made, texts=("a",))
            assert len(questions.conversations) == len(CONVERSATIONS)
            targets.append((folder, questions))
            asked.append((session, form))
    with answered(proof, targets) as answers:
        for (session, form), (folder, questions), foreign in zip(
            asked, targets, answers, strict=True
        ):
            own = OwnAnswers(session, form)
            assert compare(own, foreign, questions, proof.tolerance).faults == [], folder
            other = FORMATS["pairs" if form.name == "template" else "template"]
            faults = compare(OwnAnswers(session, other), foreign, questions, 1e-3).faults
            assert "the conversation that begins" in "".join(faults), folder


class Unsaved(ByteTokenizer):
    """A tokenizer that other programs cannot read, whose texts begin with a token."""

    name = "unsaved"
    special = SpecialTokens(bos=1, names={1: "<s>"})


def test_a_tokenizer_that_only_its_own_exporter_reads_has_a_template() -> None:
    for form in FORMATS.values():
        found = chat_template_of(form, Unsaved())
        assert found == (BEGINNINGS[0] + form.jinja if form.jinja else CHAT_TEMPLATE)


def test_a_run_on_prompts_with_responses_is_exported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {n}?", "response": f"{n} é."} for n in range(40)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data.loader": "jsonl", "data.train_path": "rows.jsonl", "data.val_fraction": 0.2}
    tiny_run(steps=2, overrides={**data, "model.tva.s": 0}, output=tmp_path / "run")

    def exported(*words: object) -> tuple[int, str]:
        code = run_command(app, "apt-export", [*map(str, words)])
        return code, capfd.readouterr().err

    def written(name: str) -> tuple[str, str]:
        certificate = json.loads((tmp_path / name / "certificate.json").read_text())
        return certificate["chat_format"], (tmp_path / name / "chat_template.jinja").read_text()

    code, err = exported("run", "--to", "hf", "-o", "one")
    assert code == 0 and written("one") == ("pairs", FORMATS["pairs"].jinja), err
    code, err = exported("--verify", "one")
    assert code == 0, err
    code, err = exported("run", "--to", "hf", "-o", "two", "--format", "template", "--unproven")
    assert code == 0 and written("two")[0] == "template", err
    assert "<|assistant|>" in written("two")[1]
    code, err = exported("run", "--to", "hf", "-o", "three", "--format", "pair")
    assert code == 2 and "--format: there is no format 'pair' (did you mean 'pairs'?)" in err
    code, err = exported("--verify", "one", "--format", "text")
    assert code == 2 and "--format: does not go with --verify" in err
