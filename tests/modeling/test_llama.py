"""A fused model is a Llama with ``head_dim`` = rank (a Qwen3 with QK-norm): shown by mapping the
weights into transformers' own model. The mapping here is the least that shows it, no exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from apt_core.modeling.layers import Rotary
from apt_core.modeling.layers.rope import rotary_frequencies
from apt_core.providers.position import RoPEScaling

VOCAB, PROMPT, GREEDY, LAYERS, D_FF = 97, 20, 32, 2, 56


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip(
        "transformers",
        reason="the peer that these tests compare with: pip install apt-kernel[test]",
    )


@dataclass(frozen=True)
class Case:
    attention: str
    settings: dict[str, Any]
    num_kv_heads: int | None
    ffn: str
    tied: bool
    theta: float = 10_000.0
    d_model: int = 48
    num_heads: int = 4
    eps: float = 1e-8


LLAMA = {"s": 0, "qk_norm": False}

CASES = {
    "tva r=2, 4 heads": Case("tva_default", {"r": 2, **LLAMA}, None, "default", True),
    "tva rank 8, GQA 2, VFT": Case("tva_default", {"rank": 8, **LLAMA}, 2, "vft", False, 500.0),
    "tva r=3 of 24, GQA 1": Case(
        "tva_default", {"r": 3, **LLAMA}, 1, "default", False, num_heads=2
    ),
    "tva full rank, VFT": Case("tva_default", {"r": 1, **LLAMA}, None, "vft", True),
    "mha": Case("mha", {}, None, "default", False),
    "mha GQA 2, VFT": Case("mha", {}, 2, "vft", True),
    "tva r=2, GQA 2, QK-norm": Case(
        "tva_default", {"r": 2, "s": 0, "qk_norm": True}, 2, "default", False
    ),
    "mha, QK-norm, VFT": Case("mha", {"qk_norm": True}, None, "vft", True, 500.0),
    "mha, 5 heads of width 6 for 48, GQA 1, its own epsilons": Case(
        "mha",
        {"head_dim": 6, "qk_norm": True, "qk_norm_eps": 0.01},
        1,
        "default",
        False,
        num_heads=5,
        eps=0.01,
    ),
}
SCALED = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "original_max_seq_len": 16},
    "yarn": {"factor": 4.0, "original_max_seq_len": 16},
    "yarn of its own ends": {
        "factor": 4.0,
        "original_max_seq_len": 64,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "attention_factor": 1.5,
        "truncate": False,
    },
}
THEIRS = {"original_max_seq_len": "original_max_position_embeddings"}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture
def ours(case, attention_of):
    row = attention_of(case.attention, case.settings, case.num_kv_heads)
    return row.model(
        dtype=torch.float32,
        d_model=case.d_model,
        num_heads=case.num_heads,
        num_layers=LAYERS,
        d_ff=D_FF,
        vocab_size=VOCAB,
        max_seq_len=PROMPT + GREEDY,
        ffn_name=case.ffn,
        vft={"r": 2},
        norm={"eps": case.eps},
        rope={"theta": case.theta},
        tie_embeddings=case.tied,
    ).eval()


def named_as_theirs(model):
    """The weights of ``model`` by the names of Llama and Qwen3."""
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.weight,
    }
    weights["lm_head.weight"] = (model.embedding if model.head is None else model.head).weight
    for index, block in enumerate(model.blocks):
        attention, ffn = block.attention, block.ffn
        plain, mlp = attention.plain(), ffn.plain()
        named = {
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.ffn_norm.weight,
            "self_attn.q_proj": plain.q,
            "self_attn.k_proj": plain.k,
            "self_attn.v_proj": plain.v,
            "self_attn.o_proj": plain.out,
            "mlp.gate_proj": mlp.gate,
            "mlp.up_proj": mlp.up,
            "mlp.down_proj": mlp.down,
        }
        if attention.q_norm is not None:
            named["self_attn.q_norm"] = attention.q_norm.weight
            named["self_attn.k_norm"] = attention.k_norm.weight
        weights |= {f"model.layers.{index}.{name}.weight": value for name, value in named.items()}
    return weights


@pytest.fixture
def theirs(ours, case, transformers):
    qk_norm = bool(case.settings.get("qk_norm"))
    family = "Qwen3" if qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=case.d_model,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads or case.num_heads,
        head_dim=ours.blocks[0].attention.width,
        max_position_embeddings=PROMPT + GREEDY,
        rms_norm_eps=ours.final_norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": case.theta},
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.load_state_dict(named_as_theirs(ours))
    return model


def greedy(model, ids):
    caches, seen, fed = model.create_caches(PROMPT + GREEDY), ids, ids
    for _ in range(GREEDY):
        fed = model(fed, caches=caches).logits[:, -1:].argmax(-1)
        seen = torch.cat([seen, fed], dim=1)
    return seen


@pytest.mark.parametrize(("name", "settings"), SCALED.items(), ids=SCALED)
def test_frequencies_are_scaled_as_theirs(name, settings, transformers):
    kind = name.partition(" ")[0]
    given = {THEIRS.get(key, key): value for key, value in settings.items()}
    if kind == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        head_dim=24,
        max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **given},
    )
    scaling = RoPEScaling.model_validate({"type": kind, **settings})
    ours, gain = rotary_frequencies(24, 500.0, scaling)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)
    assert gain == pytest.approx(factor, abs=1e-12)
    plain, _ = rotary_frequencies(24, 500.0)
    assert len(torch.unique((ours / plain).round(decimals=9))) > (kind != "linear")
    rotary = Rotary(24, 64, 500.0, scaling)
    x, place = torch.randn(1, 1, 1, 24), torch.tensor([37])
    first, second = x.chunk(2, -1)
    cos, sin = (37 * theirs).cos(), (37 * theirs).sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1) * factor
    torch.testing.assert_close(rotary(x, place), turned, rtol=0, atol=2e-5)


@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_transformers(ours, theirs, case):
    ids = torch.randint(0, VOCAB, (2, PROMPT))
    logits = ours(ids).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5)
    tokens = greedy(ours, ids)
    assert len(tokens[:, PROMPT:].unique()) > 5
    generated = theirs.generate(ids, max_new_tokens=GREEDY, do_sample=False)
    assert torch.equal(tokens, generated)
