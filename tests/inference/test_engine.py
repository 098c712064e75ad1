"""Many requests at once: each has the result that it has alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from apt_core import ConfigError, GenerationRequest, Message, RewrittenPrompt, Source, hookimpl
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.inference import Engine, generate
from apt_core.testing import Recorder

PROMPTS = ["The ", "a", "", "Line 3 of a small text", "字é", "12 apples and 13 pears " * 4]
"""Of several lengths; the last is longer than the context."""

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 3},
    {"temperature": 0.9, "stop": ("e", "\x00")},
]


def mixed_requests():
    return [
        GenerationRequest(prompt, max_new_tokens=5 + 9 * (number % 4), seed=number, **settings)
        for number, (prompt, settings) in enumerate(
            (prompt, settings) for prompt in PROMPTS for settings in SETTINGS
        )
    ]


def same(one, other):
    """Whether two results are equal, log-probabilities as far as they are rounded."""
    for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
        assert (a.token_id, a.text) == (b.token_id, b.text)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    return replace(one, logprobs=None) == replace(other, logprobs=None)


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_a_result_depends_on_its_own_request_alone(session, max_batch):
    requests = mixed_requests()
    alone = [generate(session, request) for request in requests]
    order = random.Random(max_batch).sample(range(len(requests)), len(requests))
    found = Engine(session, max_batch=max_batch).run([requests[index] for index in order])
    for index, result in zip(order, found, strict=True):
        assert same(result, alone[index]), requests[index]
    assert len({result.token_ids for result in alone}) > len(alone) / 2


def test_a_request_that_is_cancelled_frees_its_slot(session):
    requests = [GenerationRequest(p, max_new_tokens=40, temperature=1.0) for p in ("a", "b", "c")]
    alone = [generate(session, request) for request in requests]
    engine, taken = Engine(session, max_batch=2), []
    tickets = [engine.submit(request, lambda delta: None) for request in requests]
    for _ in range(3):
        engine.step()
    tickets[0].cancel()
    while engine.step():
        taken.append(len(engine._decoder))
    # The third one waited for a place, and had that of the first: it began 37 steps earlier.
    assert len(taken) <= 41 and set(taken[:30]) == {2}
    cut = tickets[0].result
    assert cut.finish_reason == "interrupted" and cut.token_ids == alone[0].token_ids[:3]
    assert [ticket.result for ticket in tickets[1:]] == alone[1:]


def test_samples_of_one_prompt_differ_by_their_seeds_and_share_its_computation(session):
    requests = [GenerationRequest("Line 3", max_new_tokens=9, seed=seed) for seed in range(5)]
    lengths = []
    hook = session.model.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    found = Engine(session).run(requests)
    hook.remove()
    assert lengths.count(6) == 1
    assert found == [generate(session, request) for request in requests]
    assert len({result.text for result in found}) == 5


def test_a_stream_is_the_whole_in_pieces(session):
    for request in mixed_requests():
        whole = generate(session, request)
        deltas = list(Engine(session).stream(request))
        assert [delta.result for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert same(deltas[-1].result, whole)
        assert "".join(delta.text for delta in deltas) == whole.text
        assert sum((delta.token_ids for delta in deltas), ()) == whole.token_ids
        assert not any("\ufffd" in d.text for d in deltas) or "\ufffd" in whole.text


def test_requests_come_and_go_between_steps(session):
    requests = mixed_requests()[:12]
    engine, tickets, pieces = Engine(session, max_batch=4), [], {}
    for number, request in enumerate(requests):
        pieces[number] = []
        tickets.append(engine.submit(request, pieces[number].append))
        engine.step()
        if number == 5:
            tickets[5].cancel()
    while engine.step():
        pass
    assert not engine._decoder._readers
    for number, (ticket, request) in enumerate(zip(tickets, requests, strict=True)):
        whole = generate(session, request)
        assert "".join(delta.text for delta in pieces[number]) == ticket.result.text
        if number == 5:
            assert ticket.result.finish_reason == "interrupted"
            assert whole.token_ids[: len(ticket.result.token_ids)] == ticket.result.token_ids
        else:
            assert same(ticket.result, whole)


def test_a_text_ends_before_a_stop_string_or_with_the_document(lively):
    session = lively(endless=False)

    class Writes:
        def __init__(self, text):
            self.text = text

        @hookimpl
        def apt_decoder(self):
            return self

        def choose(self, input_ids, logits):
            return self.text[input_ids.shape[-1] - 1]

    session.manager.register(writes := Writes(b""), "writes")
    cases = [
        ("ab-cd-", ("-c", "d"), "ab", "stop"),
        ("ab-xd-", ("-c", "zz"), "ab-xd-", "length"),
        ("ab-c", ("c", "-c"), "ab", "stop"),
        ("é字é字", ("字",), "é", "stop"),
        ("aab", ("ab",), "a", "stop"),
        ("abx", ("bxy",), "abx", "length"),
    ]
    for written, stop, text, reason in cases:
        writes.text = written.encode()
        request = GenerationRequest("p", max_new_tokens=len(writes.text), stop=stop)
        result = generate(session, request)
        deltas = list(Engine(session).stream(request))
        assert (result.text, result.finish_reason) == (text, reason)
        assert "".join(delta.text for delta in deltas) == text
        assert text.startswith("".join(delta.text for delta in deltas[:-1]))
    writes.text = "水火".encode()
    for length, text in enumerate(["", "", "水", "水", "水", "水火"], 1):
        request = GenerationRequest("p", max_new_tokens=length)
        deltas = list(Engine(session).stream(request))
        assert "".join(delta.text for delta in deltas) == text  # no part of a character
        assert generate(session, request) == deltas[-1].result
        assert deltas[-1].result.token_ids == tuple(writes.text[:length])
    writes.text = b"ab\xffcd"
    result = generate(session, GenerationRequest("p", max_new_tokens=5))
    assert (result.text, result.finish_reason, result.token_ids) == ("ab", "stop", tuple(b"ab"))


def test_a_conversation_is_continued_by_the_assistant_up_to_the_end_of_its_turn(lively, session):
    chatting = lively(endless=False)
    tokenizer, seen = ByteTokenizer(), []

    class Writes:
        @hookimpl
        def apt_decoder(self):
            return self

        def choose(self, input_ids, logits):
            seen.append(input_ids[0].tolist())
            return [ord("o"), ord("k"), tokenizer.special.end][len(seen) - 1]

    chatting.manager.register(Writes(), "writes")
    request = GenerationRequest([Message("system", "s"), Message("user", "u")])
    result = generate(chatting, request)
    special = tokenizer.special
    roles = special.roles
    turns = [roles["system"], ord("s"), special.end, roles["user"], ord("u"), special.end]
    assert seen[0] == [*turns, roles["assistant"]]
    assert (result.text, result.finish_reason, result.prompt_tokens) == ("ok", "stop", 7)
    with pytest.raises(ConfigError, match=r"prompt: .*no token for turns of 'system'"):
        generate(session, request)


def test_a_long_prompt_loses_its_beginning_and_says_how_much(session):
    for length, dropped in [(60, 0), (64, 0), (65, 32), (96, 32), (97, 64)]:
        text = "".join(chr(97 + n % 26) for n in range(length))
        request = GenerationRequest(text, max_new_tokens=3, temperature=0.0)
        result = generate(session, request)
        assert (result.prompt_tokens, result.dropped_tokens) == (length, dropped)
        kept = generate(session, replace(request, prompt=text[dropped:]))
        assert kept.token_ids == result.token_ids


def test_all_faults_of_a_request_are_told_at_once(session):
    bad = GenerationRequest(
        "a\ud800",
        max_new_tokens=0,
        temperature=-0.1,
        top_k=-1,
        top_p=0.0,
        min_p=1.5,
        repetition_penalty=float("nan"),
        stop=("",),
        seed=1.5,
        logprobs=True,
    )
    for ask in (Engine(session).submit, lambda r: Engine(session).run([r]), Engine(session).stream):
        with pytest.raises(ConfigError) as caught:
            ask(bad)
        keys = [problem.key for problem in caught.value.problems]
        assert keys == [
            "prompt", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "seed", "logprobs", "stop",
        ]  # fmt: skip
    others = {"prompt": [(), 3, [Message("robot", "x")], ["x"]], "stop": ["ab", [3]]}
    for field, values in others.items():
        for value in values:
            with pytest.raises(ConfigError, match=field):
                generate(session, replace(GenerationRequest("a"), **{field: value}))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_k": 4, "top_p": 0.5, "min_p": 0.1}]
)
def test_logits_that_are_not_finite_end_their_own_text_alone(lively, settings):
    session = lively(overrides={"model.tie_embeddings": False})
    requests = [GenerationRequest(p, max_new_tokens=6, **settings) for p in ("ab", "X", "cd")]
    alone = [generate(session, request) for request in requests]
    with torch.no_grad():
        session.model.embedding.weight[ord("X")] = float("nan")
    found = Engine(session).run(requests)
    assert [result.finish_reason for result in found] == ["length", "not_finite", "length"]
    assert [found[0].token_ids, found[2].token_ids] == [alone[0].token_ids, alone[2].token_ids]


def test_an_interrupted_run_gives_what_it_has(session):
    requests = [GenerationRequest(p, max_new_tokens=20, temperature=0.0) for p in ("ab", "c", "d")]
    whole = Engine(session).run(requests)
    asked = iter([False] * 4 + [True] * 9)
    found = Engine(session, max_batch=2).run(requests, interrupted=lambda: next(asked))
    assert [len(result.token_ids) for result in found] == [4, 4, 0]
    assert {result.finish_reason for result in found} == {"interrupted"}
    assert found[0].token_ids == whole[0].token_ids[:4]
    stream = Engine(session).stream(requests[0])
    first = next(stream)
    assert first.token_ids == whole[0].token_ids[:1]
    stream.close()


def test_sources_of_a_rewritten_prompt_are_cited(lively):
    class Retrieves:
        @hookimpl
        def apt_rewrite_prompt(self, request):
            return RewrittenPrompt(f"facts {request.prompt}", [Source("a.md", 3, "facts", 0.5)])

    class Trims:
        @hookimpl(priority=60)
        def apt_rewrite_prompt(self, request):
            return request.prompt.upper()

    recorder = Recorder()
    session = lively(Retrieves(), Trims(), recorder)
    result = generate(session, GenerationRequest("why", max_new_tokens=2))
    assert result.sources == (Source("a.md", 3, "facts", 0.5),)
    started = next(a for name, a in recorder.calls if name == "on_generation_start")
    assert started["request"].prompt == "FACTS WHY"


def test_two_engines_of_one_session_do_not_disturb_each_other(session):
    requests = [GenerationRequest("ab", max_new_tokens=9, temperature=0.0), mixed_requests()[8]]
    whole = [generate(session, request) for request in requests]
    engines = [Engine(session), Engine(session)]
    tickets = [e.submit(r) for e, r in zip(engines, requests, strict=True)]
    while any([engine.step() for engine in engines]):
        pass
    assert [ticket.result for ticket in tickets] == whole


def test_an_engine_is_computed_with_by_one_thread_at_a_time(session):
    engine, request = Engine(session), mixed_requests()[8]
    with ThreadPoolExecutor(1) as other:
        stream = engine.stream(request)
        with engine.computing():
            first = next(stream)
            for use in (lambda: engine.run([request]), lambda: list(engine.stream(request))):
                with pytest.raises(RuntimeError, match="another thread computes with this engine"):
                    other.submit(use).result()
        rest = [*stream]
        assert "".join(d.text for d in (first, *rest)) == generate(session, request).text
        assert other.submit(engine.run, [request]).result() == [generate(session, request)]


def test_a_stream_that_is_not_begun_leaves_nothing_behind(session):
    engine = Engine(session)
    stream = engine.stream(mixed_requests()[0])
    del stream
    assert not engine.step()
    begun = engine.stream(mixed_requests()[0])
    next(begun)
    begun.close()
    assert not engine.step()
