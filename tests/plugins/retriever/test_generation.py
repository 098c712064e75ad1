"""What retrieval does to generations."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apt_core import ConfigError, GenerationRequest, Message, hookimpl
from apt_core.inference import Engine, generate
from apt_core.kernel import boot
from apt_core.testing import TINY_PROFILE, tiny_session
from apt_plugins.retriever.prompt import QUESTION_CHARS, question_of
from apt_plugins.retriever.settings import KnnSettings
from tests.plugins.retriever.conftest import FACTS, RETRIEVER

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("search", ["exact", "bm25", "fused", "faiss"])
def test_planted_facts_are_answered_with_their_sources_and_not_without(asked, library, search):
    if search != "exact":
        pytest.importorskip({"faiss": "faiss"}.get(search, "bm25s"), reason="extra retriever")
    for prompt, answer in FACTS.items():
        without, _ = asked(prompt)
        assert answer not in without.text and without.sources == ()
        result, manager = asked(prompt, RETRIEVER, **{"retriever.search": search})
        assert result.text == answer, (search, prompt)
        first = result.sources[0]
        assert f"{prompt}{answer}" in first.text
        path = next(
            path for path in library.rglob("*.*") if path.name == os.path.basename(first.path)
        )
        lines = path.read_text(encoding="utf-8").splitlines()
        assert any(prompt in line for line in lines[first.first_line - 1 :])
        assert first.score == max(source.score for source in result.sources)
        assert manager.records["retriever"].failures == []


def test_a_conversation_gets_passages_in_its_last_turn(asked):
    seen = []

    class Sees:
        @hookimpl
        def on_generation_start(self, request):
            seen.append(request)

    (prompt, answer), *_ = FACTS.items()
    turns = [
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hello!"),
        Message("user", prompt),
    ]
    settings = {"retriever.search": "exact", "retriever.k": 1}
    asked(turns, RETRIEVER, Sees(), request={"stop": ()}, **settings)
    (request,) = seen
    assert [*request.prompt[:3]] == turns[:3]
    assert request.prompt[3].content.endswith("\n\n" + prompt)
    assert f"{prompt}{answer}" in request.prompt[3].content
    assert len(request.sources) == 1


def test_the_end_of_a_prompt_is_searched_for():
    prompt = next(iter(FACTS))
    for given in ("x" * 2000 + prompt, [Message("user", "x" * 2000 + prompt)]):
        question = question_of(GenerationRequest(given))
        assert question.endswith("x" + prompt) and len(question) == QUESTION_CHARS
    assert question_of(GenerationRequest([Message("system", "x")])) == ""


def test_passages_keep_to_their_budget_and_to_the_room_of_the_context(asked):
    prompt = next(iter(FACTS))
    settings = {"retriever.search": "exact", "retriever.chunk_chars": 120}
    settings["retriever.overlap_chars"] = 0
    whole, _ = asked(prompt, RETRIEVER, **settings)
    few, _ = asked(prompt, RETRIEVER, **{**settings, "retriever.max_tokens": 130})
    assert 1 <= len(few.sources) < len(whole.sources) == 4
    assert few.prompt_tokens <= 130 + len(prompt)
    tight, _ = asked(prompt, RETRIEVER, request={"max_new_tokens": 470}, **settings)
    assert tight.sources == () and tight.dropped_tokens == 0
    none, _ = asked(prompt, RETRIEVER, **{**settings, "retriever.k": 0})
    assert none == asked(prompt)[0]


def test_an_index_or_embedder_that_fails_leaves_plain_generation(asked, library, monkeypatch):
    from apt_plugins.retriever import embedders, parts

    prompt = next(iter(FACTS))
    plain, _ = asked(prompt)

    def fails(*given):
        raise RuntimeError("no vectors today")

    with monkeypatch.context() as patch:
        patch.setattr(embedders.Hashing, "embed", fails)
        result, manager = asked(prompt, RETRIEVER, **{"retriever.search": "exact"})
    assert result == plain
    assert "no vectors today" in manager.records["retriever"].failures[0].error
    with monkeypatch.context() as patch:
        patch.setattr(parts, "flush", fails)
        result, manager = asked(prompt, RETRIEVER, **{"retriever.search": "exact"})
    assert result == plain and manager.records["retriever"].failures
    for path in library.rglob("*.*"):
        path.unlink()
    result, manager = asked(prompt, RETRIEVER, **{"retriever.search": "exact"})
    assert result == plain
    assert "has no file to read" in manager.records["retriever"].failures[0].error


def lively(*plugins, **keys):
    session = tiny_session(*plugins, overrides=keys)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return session


def test_knn_predictions_are_mixed_and_without_weight_the_model_is_alone(library):
    requests = [
        GenerationRequest("Shelf 3 of row ", max_new_tokens=12, seed=1, logprobs=0),
        GenerationRequest("The ", max_new_tokens=12, temperature=0.0, logprobs=0),
    ]
    plain = Engine(lively()).run(requests)
    keys = {"retriever.folder": str(library), "retriever.k": 0}
    off = lively(RETRIEVER, **keys, **{"retriever.knn.weight": 0.0})
    assert Engine(off).run(requests) == plain
    session = lively(
        RETRIEVER, **keys, **{"retriever.knn.weight": 0.9, "retriever.knn.temperature": 0.01}
    )
    mixed = Engine(session).run(requests)
    assert [each.token_ids for each in mixed] != [each.token_ids for each in plain]
    assert session.manager.records["retriever"].failures == []
    # What stands in the text is repeated where its places have the say.
    assert any(digit in mixed[0].text for digit in "0123456789")


def test_a_transformer_answers_planted_facts_by_its_states_and_not_without(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "facts"
    folder.mkdir()
    for number, (prompt, answer) in enumerate(FACTS.items()):
        (folder / f"{number}.txt").write_text(f"{prompt}{answer}.\n", encoding="utf-8")
    requests = [
        GenerationRequest(prompt, max_new_tokens=12, temperature=0.0, stop=(".",))
        for prompt in FACTS
    ]
    keys = {"retriever.folder": str(folder), "retriever.k": 0, "model.max_seq_len": 128}
    asked = {"retriever.knn.weight": 0.9, "retriever.knn.temperature": 0.01}
    session = lively(RETRIEVER, **keys, **asked)
    assert [result.text for result in Engine(session).run(requests)] == [*FACTS.values()]
    assert session.manager.records["retriever"].failures == []
    without = lively(RETRIEVER, **keys, **{"retriever.knn.weight": 0.0})
    for answer, result in zip(FACTS.values(), Engine(without).run(requests), strict=True):
        assert answer not in result.text


def test_a_mixture_is_that_of_the_formula(library):
    from apt_plugins.retriever.index import Index
    from apt_plugins.retriever.knn import datastore_of, processor_of
    from apt_plugins.retriever.settings import settings_of

    session = lively(RETRIEVER, **{"retriever.folder": str(library)})
    index = Index(settings_of(session.config))
    for settings in (
        KnnSettings(k=5, temperature=0.2, max_tokens=300),
        KnnSettings(weight=1.0, k=10**4),
    ):
        store = datastore_of(session, index, settings)
        keys = torch.from_numpy(store.keys.rows(0, len(store.keys)))
        # The places, one by one: each sees at least half a context before it.
        text = list(session.tokenizer.encode(index.passages.text(0)))
        for at in (0, 5, 15, 20, 40):
            start = 0 if at < 16 else (at // 8 - 1) * 8
            with torch.no_grad():
                hidden = session.model(torch.tensor([text[start : at + 1]])).hidden[0, -1]
            torch.testing.assert_close(keys[at], hidden, atol=1e-4, rtol=1e-4)
            assert store.values[at] == text[at + 1]
        ids = torch.tensor([text[:9]])
        with torch.no_grad():
            output = session.model(ids)
        logits, hidden = output.logits[0, -1], output.hidden[0, -1]
        process = processor_of(session, store, settings)
        with session.computing():
            process(ids[:, :6], logits)
            given = process(ids, logits)
        distances = ((keys - hidden) ** 2).mean(-1)
        order = distances.argsort()[: settings.k]
        shares = (-distances[order] / settings.temperature).softmax(-1)
        nearest = torch.zeros(256)
        for place, share in zip(order.tolist(), shares.tolist(), strict=True):
            nearest[store.values[place]] += share
        expected = settings.weight * nearest + (1 - settings.weight) * logits.softmax(-1)
        torch.testing.assert_close(given.exp(), expected, atol=1e-4, rtol=1e-3)
    assert len(datastore_of(session, index, KnnSettings(max_tokens=300)).values) == 300


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "retriever.folder: .*nothing is to be searched"),
        ({"folder": "no/such"}, "retriever.folder: .*there is no no/such"),
        ({"folder": ".", "chunk_chars": 100, "overlap_chars": 51}, "more than half a passage"),
        ({"folder": ".", "search": "bm26"}, "retriever.search: .*bm26"),
        ({"folder": ".", "knn": {"weight": 1.5}}, "retriever.knn.weight"),
    ],
)
def test_bad_settings_are_told_at_the_start(settings, says):
    with pytest.raises(ConfigError, match=says):
        boot({**TINY_PROFILE, "retriever": settings}, plugins=[RETRIEVER], files=False)


def test_the_plugin_needs_neither_torch_nor_numpy_before_it_searches():
    code = f"import sys, {RETRIEVER}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_settings_reach_a_run_that_was_trained_without_it(library, tmp_path):
    from apt_core.runs import open_run
    from apt_core.testing import tiny_run

    tiny_run(
        steps=1,
        overrides={"model.max_seq_len": 256, "training.batch_size": 1},
        output=tmp_path / "run",
    )
    keys = {"retriever.folder": str(library), "retriever.search": "exact"}
    session = open_run(tmp_path / "run", plugins=RETRIEVER, overrides=keys)
    result = generate(session, GenerationRequest(next(iter(FACTS)), max_new_tokens=4))
    assert result.sources and np.isfinite(result.sources[0].score)
    assert replace(result, sources=()) != result
