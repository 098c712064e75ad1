"""Decoding with caches, in batches and by look-up gives the tokens of computing everything anew."""

from __future__ import annotations

import itertools
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from apt_core import GenerationRequest, hookimpl
from apt_core.inference import Engine
from apt_core.inference.lookup import TRIAL, Guesses, Payoff
from apt_core.inference.texts import window_start
from apt_core.modeling import compiled_rows, row_decoding
from apt_core.modeling.backbones import gpt_rows
from apt_core.modeling.layers import TVAAttention
from apt_plugins.moe.experts import Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.router import TopKRouter

PROMPTS = ["The ", "", "ab ab ab ab ", "Line 3 of a small text: 3 apples and 4 pears", "字é", "ab"]

LAYERS = {
    "tva": {},
    "tva with a compensator": {"model.tva.s": 4},
    "tva with qk_norm, of grouped queries": {"model.tva.qk_norm": True, "model.num_kv_heads": 1},
    "factored tva": {"model.tva.factored": True},
    "mha": {"model.attention_name": "mha"},
    "mha of grouped queries with qk_norm, a width and frequencies of its own": {
        "model.attention_name": "mha",
        "model.num_kv_heads": 2,
        "model.mha": {"qk_norm": True, "qk_norm_eps": 0.1, "head_dim": 6},
        "model.norm.eps": 0.01,
        "model.rope.scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 8},
    },
    "learned positions": {"model.position_name": "learned"},
    "n-grams": {"model.ngram.orders": [2, 3], "model.ngram.buckets": [64, 64]},
    "soft cap, layernorm and vft": {
        "model.logits_soft_cap": 5.0,
        "model.norm_name": "layernorm",
        "model.ffn_name": "vft",
    },
    "gelu": {"model.ffn_name": "gelu", "model.tie_embeddings": False},
    "experts": {},
}
EAGER = ("factored tva",)
"""Those whose attentions compute their projections themselves."""

SHAPE = {"model.num_heads": 4, "model.num_layers": 2, "model.max_seq_len": 32}


def made(lively, name, **more):
    session = lively(overrides={**SHAPE, **LAYERS[name], **more})
    if name == "experts":
        for block in session.model.blocks:
            experts = MoELayer(
                TopKRouter(16, 4, 2), Experts(4, 16, 8, "swiglu"), top_k=2, granularity=1
            )
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in experts.parameters():
                    parameter.normal_(generator=generator).mul_(0.5)
            block.ffn = experts.eval()
    return session


@torch.no_grad()
def anew(session, prompt, tokens):
    """The most likely tokens, each by a forward of all that the model sees."""
    model, ids = session.model.eval(), session.tokenizer.encode(prompt) or [0]
    start, most = len(ids), session.config.model.max_seq_len
    for _ in range(tokens):
        window = ids[window_start(len(ids), most) :]
        logits = model(torch.tensor([window])).logits[0, -1]
        ids.append(int(logits.argmax()))
    return tuple(ids[start:])


def greedy(prompts, tokens):
    return [
        GenerationRequest(prompt, max_new_tokens=tokens[n % len(tokens)], temperature=0.0)
        for n, prompt in enumerate(prompts)
    ]


class Uncompiled:
    """What the compiler would have made of a graph."""

    def __init__(self, graph, inputs, varying):
        self._graph = graph

    def boxed_run(self, inputs):
        with torch.inference_mode():  # it knows nothing of gradients
            return self._graph(*inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_batches_caches_and_guesses_change_no_greedy_token(lively, name, monkeypatch, caplog):
    monkeypatch.setattr(compiled_rows, "_loaded", Uncompiled)
    caplog.set_level("INFO", "apt.inference")
    session = made(lively, name, **{"model.max_seq_len": 16})
    # Some texts grow beyond the context, some end early, so that slots change owners.
    requests = greedy(PROMPTS, (24, 5, 14))
    expected = [anew(session, r.prompt, r.max_new_tokens) for r in requests]
    assert len({token for tokens in expected for token in tokens}) > 10
    for together, options in (
        (16, {"max_batch": 4}),
        (16, {"max_batch": 1}),
        (16, {"max_batch": 3, "lookup": "always"}),
        (16, {"max_batch": 1, "compiled": True}),
        (1, {"max_batch": 1, "compiled": True}),
    ):
        monkeypatch.setattr(gpt_rows, "MOST_TOGETHER", together)
        engine = Engine(session, **{"lookup": "never", **options})
        for _ in range(2):  # the second time from what caches still hold
            assert [result.token_ids for result in engine.run(requests)] == expected
        assert engine._decoder._slots is not None and len(engine._decoder) == 0
    said = "not compiled: none of its layers" if name in EAGER else "compiled in 2 blocks"
    assert said in caplog.text


def test_parts_of_a_model_are_compiled_around_those_that_are_not(lively, monkeypatch, caplog):
    monkeypatch.setattr(compiled_rows, "_loaded", Uncompiled)
    caplog.set_level("INFO", "apt.inference")
    session = lively(overrides={**SHAPE, "model.num_layers": 3, "model.embedding_norm": True})
    model = session.model
    request = GenerationRequest("The ", max_new_tokens=8, temperature=0.0)
    (plain,) = Engine(session, lookup="never").run([request])
    for case, compiled in enumerate(itertools.product(("whole", "attention", "none"), repeat=3)):
        # What the compiler knows nothing of.
        unknown = [(model, "embedding_norm"), (model, "final_norm")] if case % 2 else []
        for block, part in zip(model.blocks, compiled, strict=True):
            if part != "whole":
                unknown.append((block, "ffn" if part == "attention" else "attention_norm"))
        caplog.clear()
        with pytest.MonkeyPatch.context() as changed:
            for module, name in unknown:
                changed.setitem(module._modules, name, nn.Sequential(getattr(module, name)))
            engine = Engine(session, max_batch=1, lookup="never", compiled=True)
            assert engine.run([request]) == [plain]
        number = 3 - compiled.count("none")
        said = f"compiled in {number} blocks" if number else "not compiled: none of its layers"
        assert said in caplog.text


class Stateful(nn.Module):
    """A sum of all that came before, with a cache of its own kind."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)

    def create_cache(self, max_length):
        class Sum:
            length, total = 0, 0.0

        return Sum()

    def forward(self, x, *, mask=None, positions=None, cache=None):
        total = x.cumsum(1)
        if cache is not None:
            total = total + cache.total
            cache.total, cache.length = total[:, -1:], cache.length + x.shape[1]
        return torch.tanh(total @ self.weight)


class NoCache(Stateful):
    create_cache = None

    def forward(self, x, *, mask=None, positions=None, cache=None):
        return super().forward(x)


class OwnForward(TVAAttention):
    """One who changes the forward gets it called."""

    def forward(self, x, **options):
        return 2.0 * super().forward(x, **options)


class OwnKernel(TVAAttention):
    """Another kernel is used for rows of any length."""

    def attend(self, q, k, v, mask):
        return 0.5 * super().attend(q, k, v, mask)


class OwnWindow(TVAAttention):
    """A kernel that counts places from the last query, which sees the newest key."""

    def attend(self, q, k, v, mask):
        places = torch.arange(k.shape[2])
        near = places[-q.shape[2] :, None] - places < 5
        return super().attend(q, k, v, near if mask is None else near & mask)


@pytest.mark.parametrize("kind", [Stateful, NoCache, OwnForward, OwnKernel, OwnWindow])
def test_an_attention_of_somebody_else_is_decoded_as_it_computes(lively, kind):
    session = made(lively, "tva")
    for block in session.model.blocks:
        if issubclass(kind, TVAAttention):
            block.attention.__class__ = kind
        else:
            torch.manual_seed(3)
            block.attention = kind(16)
    requests = greedy(PROMPTS[:4], (40, 7))
    expected = [anew(session, r.prompt, r.max_new_tokens) for r in requests]
    engine = Engine(session, max_batch=3)
    assert [result.token_ids for result in engine.run(requests)] == expected
    assert (engine._decoder._slots is not None) == (kind in (OwnKernel, OwnWindow))


class TwiceEmbedded(nn.Embedding):
    def forward(self, ids):
        return 2.0 * super().forward(ids)


class Adapted(nn.Module):
    """A projection with something beside it."""

    def __init__(self, head):
        super().__init__()
        self.head, self.beside = head, nn.Linear(head.in_features, head.out_features)

    def forward(self, hidden):
        return self.head(hidden) + 3.0 * self.beside(hidden)


def twice_embedded(model):
    model.embedding.__class__ = TwiceEmbedded


def biased(model):
    model.head.bias = nn.Parameter(torch.randn(model.head.out_features))


def adapted(model):
    model.head = Adapted(model.head)


@pytest.mark.parametrize("change", [twice_embedded, biased, adapted])
def test_an_embedding_or_a_head_of_somebody_else_is_computed_as_it_is(lively, change):
    session = lively(overrides={**SHAPE, "model.tie_embeddings": False})
    requests = greedy(PROMPTS[:4], (40, 7))
    before = Engine(session).run(requests)
    torch.manual_seed(3)
    change(session.model)
    expected = [anew(session, r.prompt, r.max_new_tokens) for r in requests]
    assert expected != [result.token_ids for result in before]
    assert [result.token_ids for result in Engine(session).run(requests)] == expected


def test_a_hook_of_a_module_is_called_for_every_token(lively):
    session, request = made(lively, "tva"), greedy(["The "], (9,))
    engine = Engine(session)
    expected = engine.run(request)
    for module in session.model.modules():
        calls = []
        handle = module.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        assert engine.run(request) == expected
        handle.remove()
        assert len(calls) >= 9 or isinstance(module, nn.ModuleList), module


def fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_an_engine_notices_that_weights_have_changed(lively):
    session, request = made(lively, "tva"), greedy(["The "], (9,))
    engine = Engine(session)
    first = engine.run(request)
    attention = session.model.blocks[0].attention
    for change in (
        lambda: attention.qkv_weight.mul_(-1.0),
        lambda: attention.qkv_weight.data.mul_(-1.0),  # which torch counts no more
        lambda: fused_step(session.model),  # than this
        lambda: setattr(attention, "out_weight", nn.Parameter(-3.0 * attention.out_weight)),
    ):
        with torch.no_grad():
            change()
        changed = engine.run(request)
        assert changed == Engine(session).run(request) != first
        first = changed


def test_what_is_not_finite_in_a_slot_hurts_no_later_text(lively):
    session = lively(overrides={**SHAPE, "model.tie_embeddings": False})
    requests = greedy(["ab" * 12, "cd"], (6,))
    expected = Engine(session).run(requests)
    engine = Engine(session, max_batch=2)
    said = {token for result in expected for token in result.token_ids}
    bad = next(token for token in range(ord("A"), 128) if token not in said)
    with torch.no_grad():
        session.model.embedding.weight[bad] = float("nan")
    found = engine.run(greedy([chr(bad) * 28, "ab" * 12], (6,)))
    assert [each.finish_reason for each in found] == ["not_finite", "length"]
    assert found[1].token_ids == expected[0].token_ids
    assert [r.token_ids for r in engine.run(requests)] == [r.token_ids for r in expected]


def test_caches_grow_with_the_texts_and_are_shared(lively):
    session = lively(overrides={**SHAPE, "model.max_seq_len": 256})
    engine = Engine(session, lookup="never")
    sizes = []
    for tokens in (20, 100):
        engine.run([GenerationRequest("ab", max_new_tokens=tokens)])
        sizes.append(engine._decoder._slots.nbytes)
    heads, width = 4, session.model.blocks[0].attention.rank
    # The second time with a slot for the first text, which is kept.
    assert sizes == [2 * 2 * heads * places * width * 4 for places in (64, 2 * 128)]
    read = []
    slots = engine._decoder._slots
    reading = slots._read
    slots._read = lambda first, feeds, **o: read.append(feeds) or reading(first, feeds, **o)
    prompt = "a conversation of some turns: "
    for text in (prompt, prompt + "and another", "samples of one prompt"):
        engine.run([GenerationRequest(text, max_new_tokens=1, seed=seed) for seed in range(3)])
    fed = [[len(feed) for feed in feeds] for feeds in read]
    # A new prompt is computed once, and of its copies the last token; of a known one what is new.
    assert fed == [[len(prompt)], [1, 1], [11, 11, 11], [21], [1, 1]]


def test_guesses_are_what_came_after_the_same_tokens_before():
    guesses = Guesses()
    ids = [1, 2, 3, 4, 5, 1, 2, 3]
    assert guesses.of(ids, 3) == [4, 5, 1]
    assert guesses.of([*ids, 9], 3) == []
    assert guesses.of([*ids, 9, 4, 5, 1, 2, 3], 8) == [9, 4, 5, 1, 2, 3, 9, 4]
    assert guesses.of([*ids, 9, 4, 5, 1, 2, 3], 0) == []


def test_look_up_stops_where_it_does_not_pay_and_is_tried_again():
    for speed, pays in ((3.0, True), (0.9, False)):
        payoff = Payoff("auto")
        assert not payoff.wanted
        payoff.plain_step(1.0, 1)
        for _ in range(TRIAL):
            assert payoff.wanted
            payoff.guessed_step(2.0, round(2 * speed), guessed=8, kept=1)
        assert payoff.wanted == pays
        for _ in range(200):
            payoff.plain_step(1.0, 1)
        assert payoff.wanted
    assert Payoff("always").wanted and not Payoff("never").wanted


def test_int8_weights_are_used_where_they_are_faster_and_change_little(lively, caplog, monkeypatch):
    monkeypatch.setattr(row_decoding, "_faster", lambda *functions: True)
    caplog.set_level("INFO", "apt.inference")
    session = lively(overrides={"model.d_model": 64, "model.d_ff": 64})
    request = GenerationRequest("The ", max_new_tokens=6, temperature=0.0, logprobs=1)
    (plain,) = Engine(session).run([request])
    (rounded,) = Engine(session, int8=True).run([request])
    assert "int8 weights in 6 of 6 products" in caplog.text
    assert plain.logprobs != rounded.logprobs
    assert rounded.logprobs[0].logprob == pytest.approx(plain.logprobs[0].logprob, abs=0.2)
    products = row_decoding.Int8Products()
    for shape in ((16, 32), (16, 40), (20, 32), (8, 8)):
        weight, x = torch.randn(shape), torch.randn(3, shape[1])
        torch.testing.assert_close(products.of(weight)(x), x @ weight.T, atol=0.2, rtol=0.02)
    assert (products.used, products.number) == (1, 4)


def plus_sum(product):
    return lambda x, some: (product(x) + some.sum(),)


def test_a_compiled_product_reads_its_weight_in_blocks(monkeypatch):
    graphs = []

    def loaded(graph, inputs, varying):
        graphs.append(graph.code)
        return Uncompiled(graph, inputs, varying)

    monkeypatch.setattr(compiled_rows, "_loaded", loaded)
    torch.manual_seed(0)
    x, compiler = torch.randn(1, 256) / 16, compiled_rows.Compiler()
    # A multiple of what a register holds, with a row beside, and with a part of a register.
    for rows, blocked in ((272, True), (273, True), (262, False)):
        weight = torch.randn(rows, 256)
        product = row_decoding.Products(compiled=True).of(weight)
        compiled = compiler.compiled(plus_sum(product), x, torch.zeros(2))
        torch.testing.assert_close(compiled(x, torch.zeros(2))[0], x @ weight.T)
        assert ("bmm" not in graphs[-1]) == blocked


def test_other_weights_take_the_room_of_former_ones(lively, monkeypatch):
    graphs = []

    def loaded(graph, inputs, varying):
        graphs.append(graph.code)
        return Uncompiled(graph, inputs, varying)

    session = lively(overrides={"model.d_model": 256, "model.d_ff": 256, "model.num_layers": 1})
    weights = [parameter for parameter in session.model.parameters() if parameter.dim() == 2]
    monkeypatch.setattr(compiled_rows, "_loaded", loaded)
    monkeypatch.setattr(compiled_rows, "MOST_COPIED", 2 * sum(each.nbytes for each in weights) - 1)
    engine = Engine(session, max_batch=1, lookup="never", compiled=True)
    found = []
    for _ in range(3):
        found += engine.run(greedy(PROMPTS[:1], (8,)))
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.5)
    assert len({result.token_ids for result in found}) > 1
    assert len(graphs) == 1 and "bmm" not in graphs[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.long
def test_layers_of_one_shape_share_what_is_compiled():
    torch.manual_seed(0)
    # Small sums, which rounding in another order changes by less than the tolerance.
    compiler, x = compiled_rows.Compiler(), torch.randn(1, 256) / 16
    with torch.no_grad():
        for _ in range(2):
            weight = torch.randn(256, 256)
            compiled = compiler.compiled(
                plus_sum(row_decoding.Products().of(weight)), x, torch.zeros(64), varying={1: 0}
            )
            for length in (64, 300):
                some = torch.full((length,), 1 / 64)
                torch.testing.assert_close(compiled(x, some)[0], x @ weight.T + length / 64)
    assert len(compiler._made) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "together"),
    [("tva with a compensator", 16), ("gelu", 1), ("experts", 16)],
)
def test_what_the_compiler_makes_gives_the_same_texts(lively, name, together, monkeypatch, caplog):
    """Texts for which caches grow, and one that begins with what they still hold."""
    caplog.set_level("INFO", "apt.inference")
    monkeypatch.setattr(gpt_rows, "MOST_TOGETHER", together)
    session = made(lively, name, **{"model.max_seq_len": 160})
    requests = greedy(PROMPTS[2:5], (150, 5, 70))
    requests.append(replace(requests[0], logprobs=2))
    plain = Engine(session, max_batch=1, lookup="never").run(requests)
    engine = Engine(session, max_batch=1, lookup="never", compiled=True)
    for _ in range(2):
        found = engine.run(requests)
        assert [result.token_ids for result in found] == [result.token_ids for result in plain]
        for one, other in zip(found[-1].logprobs, plain[-1].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert "compiled in 2 blocks" in caplog.text


def refused(*given):
    raise RuntimeError("there is no /no/compiler")


@pytest.mark.parametrize("tried", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_cannot_be_compiled_is_said_and_computed_as_ever(session, caplog, tried, monkeypatch):
    """With the compiler of this machine, whose import takes seconds, and without."""
    if not tried:
        monkeypatch.setattr(compiled_rows, "_loaded", refused)
    request = GenerationRequest("The ", max_new_tokens=6, temperature=0.0)
    (plain,) = Engine(session).run([request])
    engine = Engine(session, compiled=True)
    missing = nullcontext()
    if tried:
        missing = torch._inductor.config.patch({"cpp.cxx": (None, "/no/compiler")})
    with missing:
        assert [engine.run([request]), engine.run([request])] == [[plain], [plain]]
    (message,) = [r.getMessage() for r in caplog.records if r.name == "apt.inference"]
    assert message.startswith("decoding is not compiled: ") and "/no/compiler" in message
    attention = session.model.blocks[0].attention.rows(row_decoding.Products())
    assert attention.compilable
    attention.attend_rows = lambda q, k, v, step: q  # a window
    assert not attention.compilable


def test_a_decoder_may_look_ahead_without_a_trace(lively):
    class Looks:
        def __init__(self):
            self.found, self.tokens = [], 0

        @hookimpl
        def apt_decoder(self):
            return self

        def choose(self, input_ids, logits, branches):
            self.found.append((input_ids, branches(logits, 5, range(3))))
            self.tokens += branches.tokens

    for name in ("tva", "mha"):
        session = made(lively, name)
        if name == "mha":  # without slots
            session.model.blocks[0].attention.register_forward_hook(lambda *given: None)
        requests = [
            GenerationRequest(p, max_new_tokens=8, temperature=8.0, seed=n)
            for n, p in enumerate(PROMPTS)
        ]
        expected = Engine(session).run(requests)
        session.manager.register(looks := Looks(), f"looks_{name}")
        results = Engine(session).run(requests)
        assert [replace(result, extra_tokens=0) for result in results] == expected
        assert sum(result.extra_tokens for result in results) == looks.tokens > 0
        input_ids, branches = looks.found[0]
        assert [len(branch.token_ids) for branch in branches] == [5, 5, 5]
        assert len({branch.token_ids for branch in branches}) == 3
        with torch.no_grad():
            for branch in branches:
                text = torch.tensor([[*input_ids[0].tolist(), *branch.token_ids]])
                logprobs = session.model(text).logits[0].log_softmax(-1)[-6:-1]
                own = logprobs.gather(1, torch.tensor(branch.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(own, torch.tensor(branch.logprobs), atol=1e-4, rtol=0)
        session.manager.unregister(looks)


def test_products_are_those_of_the_weight_in_every_layout(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for packed, halved in ((1000, (100, 8)), (1000, (2000, 8)), (10**6, (100, 8))):
        monkeypatch.setattr(row_decoding, "LEAST_PACKED", packed)
        monkeypatch.setattr(row_decoding, "LEAST_HALVED", halved)
        for shape in ((48, 32), (32, 48), (49, 32), (8, 8), (1, 128)):
            weight = torch.randn(shape, generator=generator)
            products = row_decoding.Products()
            product = products.of(weight)
            for tokens in (1, 2, 9, 70):
                x = torch.randn(tokens, shape[1], generator=generator)
                torch.testing.assert_close(product(x), x @ weight.T, atol=1e-4, rtol=1e-4)
                assert product(x).equal(product(x))
            by_halves = weight.numel() >= halved[0] and shape[0] > 1
            assert products.copied == weight.nbytes * ((weight.numel() >= packed) + by_halves)
            with monkeypatch.context() as patch:
                patch.setattr(row_decoding, "MOST_COPIED", 100)
                uncopied = row_decoding.Products()
                assert uncopied.of(weight)(x).equal(nn.functional.linear(x, weight))
                assert uncopied.copied == 0


class KeepsItsTable(nn.Module):
    """Scales by a table that it makes when it is first called, and changes its input."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.ones(1)), None

    def forward(self, x):
        if self.table is None:
            self.table = torch.full((x.shape[-1],), 0.5)
        return x.mul_(2.0) * self.table * self.weight


def test_what_a_module_keeps_of_a_generation_can_be_trained_with(lively):
    session = made(lively, "tva")
    for block in session.model.blocks:
        block.ffn = KeepsItsTable()
    requests = greedy(PROMPTS[:2], (5, 7))
    expected = [anew(session, r.prompt, r.max_new_tokens) for r in requests]
    for block in session.model.blocks:
        block.ffn.table = None
    engine = Engine(session)
    assert [result.token_ids for result in engine.run(requests)] == expected
    assert engine._decoder._slots is not None
    session.model(torch.tensor([[65, 66, 67]])).logits.sum().backward()
    assert all(block.ffn.weight.grad.isfinite().all() for block in session.model.blocks)
