"""``attention:linear_causal`` in a model: its promises, hybrids, decoding, settings, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from apt_core import ConfigError, GenerationRequest, hookimpl
from apt_core.inference import Engine
from apt_core.inference.texts import Text, window_start
from apt_core.kernel import boot
from apt_core.modeling import KeyValueCache, ModelBuilder, compiled_rows, probe_layer
from apt_core.modeling.costs import model_cost
from apt_core.modeling.plain import plain_model
from apt_core.optim.parameter_groups import hidden_matrices
from apt_core.providers.tokenizer import SpecialTokens
from apt_core.testing import tiny_run, tiny_session
from apt_core.testing.conformance import LeftOut, checks_of
from apt_plugins.linear_attn import layer as layers
from apt_plugins.linear_attn.layer import LinearAttentionProvider

PLUGIN = "apt_plugins.linear_attn.plugin"
HYBRID = {"model.attention_pattern": ["linear_causal", "mha"], "model.num_layers": 2}

BY_MASKS = {
    "mask", "wrong masks", "padding", "packed", "cache with a mask", "cache truncated",
    "plain form",
}  # fmt: skip
"""Checks that do not apply: masks are document ids, a state is not cut back and has no plain
form."""


def profile(**model):
    return {"plugins": [PLUGIN], "model": {"attention_name": "linear_causal", **model}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"num_heads": 2, "head_dim": 4, "value_dim": 8, "chunk_size": 8, "conv_size": 1,
             "gate": False, "negative_eigenvalues": True},
            marks=pytest.mark.long,
        ),
    ],
    ids=["default", "others"],
)  # fmt: skip
def test_it_does_what_every_attention_must(settings):
    left_out = set()
    for check in checks_of("attention", LinearAttentionProvider(settings)):
        if settings and str(check) == "compile":
            continue  # seconds, for no other code
        try:
            check.run()
        except LeftOut:
            left_out.add(str(check))
    assert left_out == BY_MASKS
    assert probe_layer(LinearAttentionProvider(settings), "attention") is None


def test_its_cache_has_one_size_for_any_text_and_is_its_own():
    provider = LinearAttentionProvider({"head_dim": 8})
    layer = provider.create_layer(16, 2, max_seq_len=4096).eval()
    sizes = set()
    with torch.no_grad():
        for length in (1, 3, 300):
            cache = layer.create_cache(length)
            layer(torch.randn(1, length, 16), cache=cache)
            sizes.add(cache.nbytes)
        assert sizes == {provider.kv_cache_bytes(16, 2, 10**6, bytes_per_value=4)}
        for cache, named in (
            (KeyValueCache(4), "KeyValueCache"),
            (layer.create_cache(2), "2 tokens"),
            (filled(provider, 16, 2, batch=2), "2 texts"),
            (filled(LinearAttentionProvider({"head_dim": 4}), 16, 2), r"\[2, 4, 4\]"),
        ):
            with pytest.raises(ValueError, match=named):
                layer(torch.randn(1, 3, 16), cache=cache)
    x = torch.randn(1, 90, 16, requires_grad=True)
    found = [
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        for y in (layer(x), checkpoint(layer, x, use_reentrant=False))
    ]
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match="int64"):
        layer(torch.randn(1, 3, 16), mask=torch.ones(3, 3, dtype=torch.bool))


def filled(provider, d_model, num_heads, batch=1):
    layer = provider.create_layer(d_model, num_heads)
    cache = layer.create_cache(8)
    layer(torch.randn(batch, 2, d_model), cache=cache)
    return cache


def test_a_hybrid_trains_on_packed_documents_in_bf16_by_muon():
    run = tiny_run(
        PLUGIN,
        steps=3,
        overrides={
            **HYBRID,
            "data.packing": "documents",
            "training.mixed_precision": True,
            "training.optimizer_name": "muon",
        },
    )
    assert run.result.step == 3 and all(part.isfinite().all() for part in run.weights.values())
    names = {name.rpartition(".")[2] for name in run.weights if ".0.attention" in name}
    assert {"rate_weight", "decay_log", "step_bias"} < names


@torch.no_grad()
def anew(session, prompt, tokens):
    model, ids = session.model.eval(), session.tokenizer.encode(prompt)
    start, most = len(ids), session.config.model.max_seq_len
    for _ in range(tokens):
        window = ids[window_start(len(ids), most) :]
        ids.append(int(model(torch.tensor([window])).logits[0, -1].argmax()))
    return tuple(ids[start:])


def hybrid_session():
    session = tiny_session(PLUGIN, overrides={**HYBRID, "model.max_seq_len": 48})
    with torch.no_grad():
        for index, parameter in enumerate(session.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.3 * noise)
    tokenizer = session.tokenizer
    endless = type("Endless", (type(tokenizer),), {"special": SpecialTokens()})()
    return replace(session, tokenizer=endless)


class Uncompiled:
    """What the compiler would have made of a graph."""

    def __init__(self, graph, inputs, varying):
        self._graph = graph

    def boxed_run(self, inputs):
        with torch.inference_mode():
            return self._graph(*inputs)


def test_batches_copies_and_guesses_change_no_token_of_a_hybrid(monkeypatch):
    """Slots change owners, windows move on, prompts go on where others ended, and look-up, which
    would have to take guesses back, does not guess. Its other layers are compiled."""
    monkeypatch.setattr(compiled_rows, "_loaded", Uncompiled)
    session = hybrid_session()
    prompts = ("", "the the the the the", "a b", "the the the the the and more of it")
    requests = [
        GenerationRequest(prompt, max_new_tokens=(30, 5, 50)[n % 3], temperature=0.0)
        for n, prompt in enumerate(prompts[1:] * 2)
    ]
    expected = [anew(session, r.prompt, r.max_new_tokens) for r in requests]
    assert len({token for tokens in expected for token in tokens}) > 10
    compiled = Engine(session, max_batch=1, lookup="never", compiled=True)
    for engine in (
        compiled,
        Engine(session, max_batch=3, lookup="always"),
        Engine(session, max_batch=1),
    ):
        for _ in range(2):
            assert [result.token_ids for result in engine.run(requests)] == expected
        assert engine.lookup.guessed_tokens == 0
    assert compiled._decoder._slots._compiled.number == 1
    # What is held of a text serves one that goes on from its end, and no other.
    decoder = engine._decoder
    slots, read = decoder._slots, []
    reading = slots._read
    slots._read = lambda first, feeds, **o: read.append(len(feeds[0])) or reading(first, feeds, **o)
    with torch.no_grad():
        for ids in ([*range(1, 8)], [*range(1, 11)], [1, 2, 3, 4, 5, 60]):
            text = Text(ids, 4)
            found = decoder.logits([text])[0]
            alone = session.model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(found, alone, atol=1e-3, rtol=0)
            decoder.release(text)
    assert read == [7, 3, 6]


def test_a_decoder_continues_copies_of_a_state():
    class Looks:
        found = None

        @hookimpl
        def apt_decoder(self):
            return self

        def choose(self, input_ids, logits, branches):
            self.found = self.found or (input_ids, branches(logits, 4, range(3)))

    session = hybrid_session()
    request = GenerationRequest("some text", max_new_tokens=6, temperature=8.0, seed=1)
    expected = Engine(session).run([request])
    session.manager.register(looks := Looks(), "looks")
    results = Engine(session).run([request])
    assert [replace(result, extra_tokens=0) for result in results] == expected
    input_ids, branches = looks.found
    for branch in branches:
        text = torch.tensor([[*input_ids[0].tolist(), *branch.token_ids]])
        logprobs = session.model(text).logits[0].log_softmax(-1)[-5:-1]
        own = logprobs.gather(1, torch.tensor(branch.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(own, torch.tensor(branch.logprobs), atol=1e-4, rtol=0)


def test_plans_know_what_it_costs():
    part, flops = {}, {}
    for length in (512, 4096):
        kernel = boot({**profile(max_seq_len=length), "data": {"max_length": length}})
        part[length] = model_cost(kernel).parts[0]
        flops[length] = part[length].flops_per_token
    assert part[512].kv_cache_bytes_per_sequence == part[4096].kv_cache_bytes_per_sequence > 0
    assert flops[512] == flops[4096]
    assert part[512].supports == {"cache": True, "mask": False, "autocast": True, "compile": True}


def test_every_head_is_a_matrix_of_muon_and_its_gates_are_none():
    model = ModelBuilder(boot(profile(num_layers=1)).config, boot(profile()).registry).build_model()
    found = {name: n for name, n in hidden_matrices(model).items() if "attention." in name}
    heads = model.blocks[0].attention.num_heads
    assert found == {
        "blocks.0.attention.in_weight": 4 * heads,
        "blocks.0.attention.out_weight": 1,
    }


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"num_heads": 5}, "model.linear_attn.num_heads", "do not divide"),
        ({"chunk_size": 4}, "model.linear_attn.chunk_size", "8"),
        ({"conv_size": 0}, "model.linear_attn.conv_size", "1"),
        ({"kernel": "triton"}, "model.linear_attn.kernel", "torch"),
        ({"head_dims": 4}, "model.linear_attn.head_dims", "head_dim"),
    ],
)
def test_bad_settings_are_found_before_the_start(settings, key, message):
    with pytest.raises(ConfigError) as caught:
        boot(profile(linear_attn=settings))
    text = str(caught.value)
    assert key in text and message in text


def test_what_nothing_reads_is_reported():
    def inactive(**model):
        return {entry.key for entry in boot(profile(**model)).inactive}

    own = {"num_kv_heads": 1, "rope": {"theta": 100.0}}
    assert {"model.num_kv_heads", "model.rope.theta"} <= inactive(**own)
    hybrid = {"attention_pattern": ["linear_causal", "mha"], "attention_name": "mha"}
    assert not {"model.num_kv_heads", "model.rope.theta"} & inactive(**own, **hybrid)
    assert "model.linear_attn.gate" in inactive(attention_name="mha", linear_attn={"gate": False})


def test_an_export_says_that_there_is_no_plain_form():
    kernel = boot(profile(num_layers=1))
    model = ModelBuilder(kernel.config, kernel.registry).build_model()
    with pytest.raises(ConfigError, match="LinearAttention"):
        plain_model(model)
    (beyond,) = [b for b in model.blocks[0].beyond_plain() if b.name == "attention"]
    assert "LinearAttention" in beyond.what


def test_kernels_of_the_package_are_chosen_on_a_gpu_alone(monkeypatch, caplog):
    made = LinearAttentionProvider().create_layer(16, 2)
    assert not made.by_fla
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level("INFO", logger="apt.linear_attn"):
        assert not LinearAttentionProvider().create_layer(16, 2).by_fla
    assert "pip install 'apt-kernel[linear_attn]'" in caplog.text
    monkeypatch.setattr("apt_plugins.linear_attn.fla_kernel.find_spec", lambda name: object())
    provider = LinearAttentionProvider()
    layer = provider.create_layer(16, 2)
    assert layer.by_fla and not provider.supports.compile
    assert not LinearAttentionProvider({"kernel": "torch"}).create_layer(16, 2).by_fla
    # In fp32 and on a CPU torch computes in any case.
    monkeypatch.setattr(layers, "chunked_by_fla", None)
    layer(torch.randn(1, 3, 16))
