"""Hooks of a generation, and plain sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from apt_core import GenerationRequest, hook_returns, hookimpl
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.inference import engine, generate
from apt_core.inference.decoding import dtype_for
from apt_core.inference.sampling import Sampling, choose
from apt_core.inference.texts import window_start
from apt_core.plugin_manager import PluginManager
from apt_core.providers.tokenizer import SpecialTokens
from apt_core.registry import Registry
from apt_core.testing import Recorder, tiny_run, tiny_session
from apt_core.training import evaluating
from apt_core.types import GenerationResult

REQUEST = GenerationRequest("The ", max_new_tokens=8, seed=3)


def continuation(*plugins, request=REQUEST):
    session = tiny_session(strict=False)
    for number, plugin in enumerate(plugins):
        session.manager.register(plugin, f"plugin_{number}")
    return generate(session, request), session.manager


def test_sampling_is_a_function_of_the_seed_alone():
    first, _ = continuation()
    torch.manual_seed(5)
    second, _ = continuation()
    other, _ = continuation(request=GenerationRequest("The ", max_new_tokens=8, seed=4))
    assert first == second != other
    assert len(first.token_ids) == 8


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_p": 0.9}])
def test_the_last_bits_of_equally_likely_tokens_do_not_decide_about_a_draw(settings):
    draws = torch.linspace(0.001, 0.999, 998, dtype=torch.float64)
    sampling = Sampling.of(GenerationRequest("", **settings))
    chosen = []
    for change in (-1e-6, 1e-6):
        logits = torch.tensor([0.0, 1.0 + change, -9.0, 1.0 - change, 0.0, -9.0]).double()
        chosen.append(choose(logits.expand(len(draws), -1), sampling, draws))
    assert torch.equal(*chosen)
    assert chosen[0].unique().numel() == 4


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.tensor([0.1, 3.0, 0.2])
    assert choose(logits[None], Sampling(0.0, 0, 1.0, 0.0), None).tolist() == [1]


def test_prompts_are_rewritten_in_a_chain():
    class Adds:
        def __init__(self, text):
            self.text = text

        @hookimpl
        def apt_rewrite_prompt(self, request):
            return request.prompt + self.text

    recorder = Recorder()
    continuation(Adds("一"), Adds("二"), recorder)
    started = next(a for name, a in recorder.calls if name == "on_generation_start")
    assert started["request"].prompt == "The 一二"


def test_every_hook_of_a_generation_gets_the_session():
    class Sees:
        def __init__(self):
            self.seen = []

        @hookimpl
        def apt_rewrite_prompt(self, session):
            self.seen.append(session)

        @hookimpl
        def on_generation_start(self, session):
            self.seen.append(session)

        @hookimpl
        def apt_logits_processors(self, request, session):
            self.seen.append(session)

        @hookimpl
        def apt_decoder(self, session):
            self.seen.append(session)

        @hookimpl
        def on_generation_end(self, result, session):
            self.seen.append(session)

    sees = Sees()
    session = tiny_session(sees)
    generate(session, REQUEST)
    assert len(sees.seen) == 5
    assert all(each is session for each in sees.seen)
    # In a run it is the one of its weights, at its position.
    run = tiny_run(sees := Sees(), steps=3)
    (session,) = {id(each): each for each in sees.seen}.values()
    assert (session.position.step, len(sees.seen)) == (3, 5)
    weights = session.model.state_dict()
    assert all(weights[name].equal(value) for name, value in run.weights.items())
    assert session.manager is run.manager


def test_logits_processors_run_for_every_token_until_the_text_ends():
    class Writes:
        def __init__(self, text):
            self.text = text

        @hookimpl
        def apt_logits_processors(self):
            def one_token(input_ids, logits):
                allowed = torch.full_like(logits, float("-inf"))
                allowed[self.text[input_ids.shape[-1] - 4]] = 0.0
                return allowed

            return [one_token]

    result, _ = continuation(Writes(b"xxxxxxxx"))
    assert result.text == "xxxxxxxx"
    result, _ = continuation(Writes(b"xy\xffxxxxx"))  # the end of a document
    assert result == GenerationResult("xy", tuple(b"xy"), "stop", prompt_tokens=4)


def test_a_logits_processor_that_fails_is_dropped_and_counted():
    class Fails:
        @hookimpl
        def apt_logits_processors(self):
            def fails(input_ids, logits):
                logits.fill_(0.0)
                raise ValueError("no")

            return [fails]

    result, manager = continuation(Fails())
    assert result == continuation()[0]
    failures = manager.records["plugin_0"].failures
    assert [failure.hook for failure in failures] == ["apt_logits_processors"]


def test_a_processor_that_leaves_no_token_is_dropped_and_counted():
    class Forbids:
        @hookimpl
        def apt_logits_processors(self):
            return [lambda input_ids, logits: torch.full_like(logits, float("-inf"))]

    result, manager = continuation(Forbids())
    assert result == continuation()[0]
    assert len(manager.records["plugin_0"].failures) == 1


class Decoder:
    def __init__(self, fails_after):
        self.left = fails_after

    def choose(self, input_ids, logits):
        if self.left == 0:
            raise ValueError("no")
        self.left -= 1
        return ord("y")


def test_a_decoder_chooses_and_plain_sampling_takes_over_when_it_fails():
    class Plugin:
        @hookimpl
        def apt_decoder(self):
            return Decoder(fails_after=3)

    result, manager = continuation(Plugin())
    assert result.text.startswith("yyy")
    assert len(result.token_ids) == 8
    failures = manager.records["plugin_0"].failures
    assert [failure.hook for failure in failures] == ["apt_decoder"]


def test_a_prompt_longer_than_the_model_sees_is_cut_from_the_left():
    result, _ = continuation(request=GenerationRequest("é字" * 40, max_new_tokens=4))
    assert len(result.token_ids) == 4


def test_a_builder_that_returns_no_provider_is_named_and_passed_over():
    class Builds:
        @hookimpl
        def apt_build_provider(self, spec):
            return 3

    manager = PluginManager()
    manager.register(Builds(), "builds")
    assert Registry(manager).get("tokenizer", "byte").vocab_size == 256
    assert "int" in manager.records["builds"].failures[0].error


def tokens_of(session, *, max_new_tokens=40, temperature=0.8):
    request = GenerationRequest(
        "The ", max_new_tokens=max_new_tokens, temperature=temperature, seed=3
    )
    return generate(session, request).token_ids


class Endless(ByteTokenizer):
    special = SpecialTokens()


def lively_session():
    session = replace(tiny_session(), tokenizer=Endless())
    with torch.no_grad():
        for index, parameter in enumerate(session.model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng(index)))
    return session


def rng(seed):
    return torch.Generator().manual_seed(seed)


def test_decoding_with_caches_gives_the_tokens_of_computing_everything_anew(caplog):
    session = lively_session()
    caplog.set_level("INFO", "apt.inference")
    cached = tokens_of(session)
    assert "no cache" not in caplog.text
    session.model.create_caches = lambda length: None
    assert tokens_of(session) == cached
    assert "the whole text anew for every token: no cache" in caplog.text
    assert len(set(cached)) > 3


def test_with_caches_a_token_is_computed_once_for_each_place_of_the_window():
    session = lively_session()
    lengths = []
    session.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    tokens_of(session, max_new_tokens=22)
    # 16 tokens fill the window; then it moves on by 8, twice: 9 tokens are read at once.
    assert lengths == [4] + [1] * 12 + [9] + [1] * 7 + [9]


def test_the_window_holds_at_least_half_of_what_the_model_can_see():
    for length in range(1, 200):
        start = window_start(length, 16)
        assert start == 0 if length <= 16 else 8 < length - start <= 16
        assert start % 8 == 0
    assert window_start(3, 1) == 2


def test_a_layer_that_ignores_its_cache_is_noticed(caplog):
    session = lively_session()
    expected = tokens_of(session)
    attention = session.model.blocks[0].attention
    forward = attention.forward
    attention.forward = lambda x, cache=None, **options: forward(x, **options)
    assert tokens_of(session) == expected
    assert "a cache does not hold what its layer read" in caplog.text


class Waits(TorchFunctionMode):
    """Counts what a device would be waited for: numbers that the host reads or brings."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu",
             "multinomial", "nonzero")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        self.number += name in self.READS or (name == "tensor" and "device" in (kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_token_waits_for_the_device_at_most_once(temperature):
    session = lively_session()
    numbers = []
    for tokens in (10, 30):
        with Waits() as waits:
            tokens_of(session, max_new_tokens=tokens, temperature=temperature)
        numbers.append(waits.number)
    assert 0 < numbers[1] - numbers[0] <= 20  # fewer where guesses are right


def test_a_processor_waits_for_the_device_once_more():
    given = torch.randn(5)
    with Waits() as waits:
        hook_returns.logits(given + 1.0, given)
    assert waits.number == 1


def test_a_temperature_next_to_zero_takes_the_most_likely_token():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    draws = torch.tensor([0.999], dtype=torch.float64)
    for temperature in (1e-40, 1e-29):
        assert choose(logits, Sampling(temperature, 0, 1.0, 0.0), draws).tolist() == [2]


class Seen(TorchDispatchMode):
    """Counts the casts of weights, and notes in which type each product is computed."""

    def __init__(self):
        super().__init__()
        self.casts, self.products = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.casts += name == "_to_copy" and args[0].dim() == 2 and len(args[0]) > 4
        if name in ("mm", "addmm", "bmm"):
            self.products.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


def test_a_type_to_compute_in_is_of_the_model_alone_and_its_weights_are_cast_once(monkeypatch):
    session, types, casts = lively_session(), [], []
    monkeypatch.setattr(engine, "dtype_for", lambda session: torch.bfloat16)

    class Multiplies:
        @hookimpl
        def apt_logits_processors(self):
            def multiplied(input_ids, logits):
                types.append((logits.dtype, (logits[None] @ logits[:, None]).dtype))
                return logits

            return [multiplied]

    session.manager.register(Multiplies(), "multiplies")
    for tokens in (2, 9):
        with Seen() as seen:
            tokens_of(session, max_new_tokens=tokens)
        assert torch.bfloat16 in seen.products
        casts.append(seen.casts)
    assert casts[0] > 0 == casts[1]  # the second time they are kept with the session
    assert set(types) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", torch.bfloat16), ("cpu", None)])
def test_the_sample_of_a_run_is_computed_in_its_precision_on_a_gpu(kind, dtype, monkeypatch):
    class Keeps:
        @hookimpl
        def on_training_start(self, trainer):
            self.trainer = trainer

    keeps = Keeps()
    tiny_run(keeps, steps=1, overrides={"training.mixed_precision": True})
    sessions = []

    def instead(session, *arguments, **options):
        sessions.append(replace(session, device=torch.device(kind, 0)))
        return GenerationResult("", ())

    monkeypatch.setattr(evaluating, "generate", instead)
    keeps.trainer._run.loop.evaluator.sample()
    assert [dtype_for(session) for session in sessions] == [dtype]
