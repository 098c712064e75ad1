"""Attention in a sliding window: what it sees is what a loop over pairs says, in any way."""

from __future__ import annotations

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from apt_core.errors import ConfigError
from apt_core.inference import Engine
from apt_core.kernel import boot
from apt_core.modeling import document_positions, padding_mask, padding_positions
from apt_core.modeling.layers import MHAProvider, RoPEProvider
from apt_core.testing import tiny_session
from apt_core.testing.conformance import LeftOut, checks_of
from apt_core.types import GenerationRequest
from apt_plugins.flash_attn import bands
from apt_plugins.flash_attn.flex import FlexAttention, FlexProvider
from apt_plugins.flash_attn.flex_kernel import block_mask
from apt_plugins.flash_attn.visibility import LastMade, Sight

LENGTH = 45
DOCUMENTS = torch.tensor(
    [
        [0] * 7 + [1] * 25 + [2] * 13,
        # Padding on both sides has one number.
        [-1] * 4 + [5] * 35 + [-1] * 6,
    ]
)
"""Documents that are longer than two blocks of BLOCK, that begin within one, and padding."""

BLOCK = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BLOCK", BLOCK)


def seen_by_a_loop(window: int | None, prefix: int, documents: Tensor | None) -> Tensor:
    """What every pair of tokens may do, [B, 1, T, T]."""
    rows = [[0] * LENGTH] * 2 if documents is None else documents.tolist()
    seen = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    for row, query in product(range(2), range(LENGTH)):
        own = [key for key in range(query + 1) if rows[row][key] == rows[row][query]]
        for place, key in enumerate(own):
            if window is None or query - key < window or place < prefix:
                seen[row, 0, query, key] = True
    return seen


def layers(window: int | None, prefix: int, kv_heads: int) -> tuple[FlexAttention, torch.nn.Module]:
    sizes: dict[str, Any] = {"max_seq_len": 64, "num_kv_heads": kv_heads}
    sizes["position"] = RoPEProvider()
    settings = {"window": window, "prefix": prefix, "qk_norm": True, "head_dim": 6}
    flex = FlexProvider(settings).create_layer(32, 4, **sizes)
    mha = MHAProvider({"qk_norm": True, "head_dim": 6}).create_layer(32, 4, **sizes)
    mha.load_state_dict(flex.state_dict())
    return flex.double(), mha.double()


KINDS = ["none", "documents", "padding on the left", "padding on the right", "a mask of its own"]


def masks_of(kind: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mask that a layer gets, the documents that it means, and positions."""
    if kind == "documents":
        return DOCUMENTS, DOCUMENTS, document_positions(DOCUMENTS)
    if kind.startswith("padding"):
        is_token = torch.arange(LENGTH) >= torch.tensor([[0], [6]])
        is_token = is_token.flip(1) if "right" in kind else is_token
        return padding_mask(is_token), is_token.long(), padding_positions(is_token)
    if kind == "a mask of its own":
        own = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3
        return own, None, None
    return None, None, None


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_a_mask_of_all_pairs(kind: str) -> None:
    """With windows of one token, of parts of a block and more than the text, prefixes and shared
    heads."""
    mask, documents, positions = masks_of(kind)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, LENGTH, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, LENGTH, 32, generator=generator, dtype=torch.float64)
    for window, prefix, kv_heads in product((1, 3, BLOCK, 11, 29, 99, None), (0, 2, 9), (4, 1)):
        if kind == "a mask of its own" and prefix:
            continue
        flex, mha = layers(window, prefix, kv_heads)
        dense = seen_by_a_loop(window, prefix, documents)
        tokens = torch.ones_like(upstream[..., :1])
        if kind == "a mask of its own":
            dense = dense & mask
        elif documents is not None:
            tokens = (documents > (0 if mask is not documents else -1))[..., None].double()
        found = flex(x, mask=mask, positions=positions)
        expected = mha(x, mask=dense, positions=positions)
        what = f"window {window}, prefix {prefix}, {kv_heads} kv heads"
        close(found * tokens, expected * tokens, what)
        wanted = [x, *flex.parameters()], [x, *mha.parameters()]
        own, others = (
            torch.autograd.grad((y * tokens * upstream).sum(), inputs)
            for y, inputs in zip((found, expected), wanted, strict=True)
        )
        for gradient, other in zip(own, others, strict=True):
            close(gradient, other, what)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def test_the_scores_that_are_computed_grow_with_the_window_and_not_with_the_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores: list[int] = []
    kernel = F.scaled_dot_product_attention

    def counting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        scores.append(q.shape[2] * k.shape[2])
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    flex = FlexProvider({"window": 16, "prefix": 1}).create_layer(16, 2, max_seq_len=2048)

    def counted(length: int, **call: Any) -> int:
        scores.clear()
        with torch.no_grad():
            flex(torch.randn(1, length, 16), **call)
        return sum(scores)

    whole, half = counted(2048), counted(1024)
    assert whole <= 2048 * (16 + BLOCK + 1) and abs(whole / half - 2) < 0.05
    assert counted(2048, mask=torch.arange(2048)[None] // 500) <= 2048 * (16 + BLOCK + 1)
    cache = flex.create_cache(2048)
    assert counted(2000, cache=cache) < 2000 * (16 + BLOCK + 1)
    assert counted(1, cache=cache) == 16 + 1


def test_the_blocks_for_a_gpu_hold_all_that_is_seen_and_little_else() -> None:
    """FlexAttention itself runs on a CPU, forward alone, and looks at pairs; its blocks are
    compared with these."""
    generator = torch.Generator().manual_seed(1)
    for length, window, prefix in product((1, 300), (1, 129, 200, None), (0, 30)):
        rows = torch.stack([torch.arange(length) // 190, torch.arange(length) // 45])
        for documents in (None, rows):
            sight = Sight(window, prefix)
            seen = sight.dense(documents, length, length, torch.device("cpu"))
            mask = block_mask(documents, length, sight, torch.device("cpu"))
            if (length, window) == (300, 129) and documents is not None:
                q, k, v = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(3))
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that it is not compiled
                    found = flex_attention(q, k, v, block_mask=mask)
                torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, seen))
            count = -(-length // 128)
            padded = torch.zeros(*mask.shape[:1], count * 128, count * 128, dtype=torch.bool)
            padded[:, :length, :length] = seen if documents is None else seen[:, 0]
            blocks = padded.unflatten(2, (count, 128)).unflatten(1, (count, 128)).transpose(2, 3)
            listed = _listed(mask.kv_num_blocks, mask.kv_indices)
            whole = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
            what = f"{length} tokens, {sight}, {documents is not None}"
            assert not (listed & whole).any(), what
            assert (listed | whole).equal(blocks.any(-1).any(-1)), what
            assert not (whole & ~blocks.all(-1).all(-1)).any(), what


def _listed(numbers: Tensor, indices: Tensor) -> Tensor:
    marks = torch.zeros(indices.shape, dtype=torch.bool)
    ranks = torch.arange(indices.shape[-1]) < numbers[..., None]
    return marks.scatter(3, indices.long(), ranks)[:, 0]


CHECKED = {
    "window of 5": ({"window": 5, "qk_norm": True, "head_dim": 6}, {"compile"}),
    "prefix": ({"window": 6, "prefix": 2}, set()),
}


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [CHECKED["window of 5"], pytest.param(*CHECKED["prefix"], marks=pytest.mark.long)],
    ids=CHECKED,
)
def test_it_does_what_every_attention_must(settings: dict[str, Any], left_out: set[str]) -> None:
    for check in checks_of("attention", FlexProvider(settings)):
        if check.name not in left_out:
            try:
                check.run()
            except LeftOut as why:
                pytest.fail(f"left out: {why}")


def session_of(**flex: Any) -> Any:
    overrides = {
        "model.attention_pattern": ["flex", "mha"],
        "model.num_layers": 2,
        "model.max_seq_len": 64,
        **{f"model.flex.{key}": value for key, value in flex.items()},
    }
    return tiny_session(overrides=overrides)


def test_texts_of_different_lengths_are_continued_as_each_is_alone() -> None:
    """Beyond the window, with and without a prefix, by the caches of rows and by none."""
    for prefix in (0, 3):
        session = session_of(window=6, prefix=prefix)
        prompts = ["It was the best of times", "a", "some few words"]
        requests = [
            GenerationRequest(prompt=prompt, max_new_tokens=16, temperature=0.0)
            for prompt in prompts
        ]
        together = [result.token_ids for result in Engine(session).run(requests)]
        for prompt, found in zip(prompts, together, strict=True):
            ids = list(session.tokenizer.encode(prompt))
            start = len(ids)
            with torch.no_grad():
                for _ in range(len(found)):
                    logits = session.model.eval()(torch.tensor([ids]), mask=None).logits
                    ids.append(int(logits[0, -1].argmax()))
            assert ids[start:] == list(found), f"{prompt!r}, prefix {prefix}"


def test_what_is_kept_of_a_mask_follows_its_changes_and_is_not_copied() -> None:
    flex, _ = layers(3, 1, 4)
    ids, x = DOCUMENTS.clone(), torch.randn(2, LENGTH, 32, dtype=torch.float64)
    before = flex(x, mask=ids)
    ids[:, 20:] += 10
    assert not torch.equal(flex(x, mask=ids), before)
    torch.testing.assert_close(flex(x, mask=ids), flex(x, mask=ids.clone()))
    other = copy.deepcopy(flex)
    assert other._kept._last == (None, None, None)
    kept = LastMade()
    with torch.inference_mode():
        made = kept.of(None, 1, lambda: torch.ones(1))
    assert not made.is_inference()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "model.flex.window: must be at least 1, not 0"),
        ({"window": -4}, "model.flex.window: must be at least 1, not -4"),
        ({"prefix": -1}, "model.flex.prefix: must be at least 0, not -1"),
        ({"window": "all"}, "model.flex.window: must be a whole number"),
        ({"head_dim": 7}, "the head width 7 is odd, and RoPE turns pairs"),
    ],
)
def test_wrong_settings_are_told_before_the_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        boot({"model": {"attention_name": "flex", "flex": settings}}, files=False)
    assert message in str(caught.value)


def test_settings_without_an_effect_are_reported() -> None:
    def reported(**model: Any) -> dict[str, str]:
        found = boot({"model": model, "plugins": ["flash_attn"]}, files=False).inactive
        return {item.key: item.reason for item in found}

    flex = {"attention_name": "flex", "max_seq_len": 32}
    assert reported(**flex, flex={"window": 8, "prefix": 1}) == {}
    assert reported(**flex, flex={"window": 32}) == {
        "model.flex.window": "model.max_seq_len is 32: the window holds every text"
    }
    assert reported(**flex, flex={"window": None, "prefix": 1}) == {
        "model.flex.prefix": "model.flex.window is null: a token sees all of its text"
    }
    assert reported(attention_name="mha", flex={"window": 8}) == {
        "model.flex.window": "no attention of the model is flex"
    }


def test_costs_are_those_of_the_window() -> None:
    flex, mha = FlexProvider({"window": 100, "prefix": 4}), MHAProvider()
    assert flex.flops(64, 4, 80) == mha.flops(64, 4, 80)
    scores = [provider.flops(64, 4, 1000) - 16 * 64**2 // 2 * 1000 for provider in (flex, mha)]
    assert scores[0] * 1000 == scores[1] * 104
    # A cache holds all of a text, which others may share the beginning of.
    assert flex.kv_cache_bytes(64, 4, 1000) == mha.kv_cache_bytes(64, 4, 1000)
    with pytest.raises(ValueError, match=r"model\.flex\.window: a token sees at least itself"):
        FlexAttention(16, 2, window=0)
    for cache in (FlexProvider().create_layer(16, 1).create_cache(4), object()):
        layer = FlexProvider().create_layer(16, 4)
        if hasattr(cache, "append"):
            FlexProvider().create_layer(16, 1)(torch.randn(1, 2, 16), cache=cache)
        with pytest.raises(ValueError, match="another"):
            layer(torch.randn(1, 1, 16), cache=cache)
