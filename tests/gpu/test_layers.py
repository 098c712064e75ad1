"""The parts of a model on a GPU: what each must do, with every kernel, and to the bit."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from apt_core.defaults import core_providers
from apt_core.kinds import KINDS
from apt_core.modeling.layers import MHAProvider, RoPEProvider, TVAProvider
from apt_core.testing import tiny_run
from apt_core.testing.conformance import Check, checks, checks_of
from apt_plugins.flash_attn.flex import FlexProvider
from apt_plugins.flash_attn.layer import FlashTVAProvider
from apt_plugins.linear_attn.layer import LinearAttentionProvider

pytestmark = pytest.mark.gpu

GPU = "cuda"

CORE = {spec.key: spec for spec in core_providers("0")}
COMPUTING = ("attention", "ffn", "norm", "position", "backbone", "optimizer")
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((key, {}) for key, spec in CORE.items() if spec.kind in COMPUTING),
    ("attention:tva_default", {"r": 2, "s": 3, "qk_norm": True}),
    ("attention:tva_default", {"rank": 6, "factored": True}),
    ("attention:mha", {"qk_norm": True}),
    ("ffn:vft", {"rank": 7}),
]


def every_check() -> list[Any]:
    found = []
    for key, settings in SETTINGS:
        shown = "".join(f"-{name}={value}" for name, value in settings.items())
        provider = resolve_name(str(CORE[key].factory))(settings or None)
        for check in checks_of(CORE[key].kind, provider, GPU):
            found.append(pytest.param(check, id=f"{key}{shown}-{check}"))
    return found


@pytest.mark.parametrize("check", every_check())
def test_a_provider_of_the_core_does_what_its_kind_must(check: Check) -> None:
    check.run()


@pytest.mark.parametrize("check", checks_of("attention", FlashTVAProvider(), GPU), ids=str)
def test_flash_attention_does_what_every_attention_must(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the precision of its kernel, which computes in bf16."""
    pytest.importorskip("flash_attn")
    monkeypatch.setattr(checks, "TOLERANCE", 0.03)
    check.run()


FLEX = ({"window": 5}, {"window": 150, "prefix": 3}, {"window": None, "qk_norm": True})


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{settings}-{check}")
        for settings in FLEX
        for check in checks_of("attention", FlexProvider(settings), GPU)
    ],
)
def test_attention_in_a_window_does_what_every_attention_must(check: Check) -> None:
    check.run()


@pytest.mark.parametrize("window", [1, 100, 129, 1000])
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("kind", ["plain", "documents", "padding"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_is_that_of_a_mask_of_all_pairs(
    kind: str, prefix: int, window: int, kv_heads: int
) -> None:
    """In bf16 at most twice as far from fp32 as SDPA with that mask, gradients too."""
    length, places = 700, torch.arange(700)
    documents = None
    if kind == "documents":
        documents = torch.stack([places // 290, places // 45]).to(GPU)
    elif kind == "padding":
        documents = torch.stack([places >= 40, places < 650]).long().to(GPU) - 1
    settings = {"window": window, "prefix": prefix}
    layer = FlexProvider(settings).create_layer(
        256, 4, max_seq_len=length, num_kv_heads=kv_heads, position=RoPEProvider()
    )
    layer.to(GPU)
    x = torch.randn(2, length, 256, device=GPU, requires_grad=True)
    dense = layer.sight.dense(documents, length, length, torch.device(GPU))
    tokens = 1.0 if documents is None else (documents >= 0)[..., None]

    def computed(mask: torch.Tensor | None, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.autocast(GPU, dtype, enabled=dtype != torch.float32):
            y = layer(x, mask=mask) * tokens
        found = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
        return [y, *found]

    exact = computed(dense, torch.float32)
    eager, kernel = computed(dense, torch.bfloat16), computed(documents, torch.bfloat16)
    for reference, own, others in zip(exact, kernel, eager, strict=True):
        bound = 2 * (others - reference).norm() + 1e-4 * reference.norm()
        assert (own - reference).norm() <= bound


@pytest.mark.parametrize("check", checks_of("attention", LinearAttentionProvider(), GPU), ids=str)
def test_linear_attention_does_what_every_attention_must(check: Check) -> None:
    check.run()


def test_linear_attention_by_the_packages_kernels_is_that_by_torch() -> None:
    """The error beside fp32 is at most twice that of torch in bf16, as is that of the gradients."""
    pytest.importorskip("fla")
    torch.manual_seed(0)
    layer = LinearAttentionProvider().create_layer(256, 4).to(GPU)
    assert layer.by_fla
    x = torch.randn(2, 500, 256, device=GPU, requires_grad=True)

    def computed(by_fla: bool, dtype: torch.dtype | None) -> list[torch.Tensor]:
        layer.by_fla = by_fla
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            y = layer(x).float()
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    exact = computed(False, None)
    for mine, its, true in zip(
        computed(True, torch.bfloat16), computed(False, torch.bfloat16), exact, strict=True
    ):
        assert (mine - true).norm() <= 2 * (its - true).norm() + 1e-3 * true.norm()


BACKENDS = [
    b for name, b in SDPBackend.__members__.items() if name not in ("ERROR", "OVERRIDEABLE")
]
NO_KERNEL = ("No available kernel", "No viable backend", "Invalid backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("attention", [MHAProvider, TVAProvider], ids=["mha", "tva"])
def test_a_query_that_may_see_nothing_gets_zeros(
    attention: Any, backend: SDPBackend, dtype: torch.dtype
) -> None:
    """And neither it nor any gradient is NaN."""
    layer = attention().create_layer(64, 4, max_seq_len=16, num_kv_heads=4).to(GPU, dtype)
    x = torch.randn(2, 16, 64, device=GPU, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool, device=GPU)
    mask[0, :, 5] = mask[1, :, :, :3] = False
    blind = torch.zeros(2, 16, dtype=torch.bool, device=GPU)
    blind[0, 5] = blind[1, :3] = True
    try:
        with sdpa_kernel(backend):
            y = layer(x, mask=mask)
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_KERNEL):
            raise
        pytest.skip(f"{backend.name} has no kernel for a mask in {dtype} here")
    assert not y[blind].any()
    assert y[~blind].any(-1).all() and y.isfinite().all()
    y.float().square().sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert all(gradient.isfinite().all() for gradient in gradients)


MOE, ROUTING = "apt_plugins.moe.plugin", "apt_plugins.routing.plugin"
EXPERTS = {"model.moe.experts": 4, "model.moe.top_k": 2}
PARTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    **{
        key: ((), {KINDS[spec.kind].keys[0]: spec.name})
        for key, spec in CORE.items()
        if spec.kind in COMPUTING
    },
    "compensator": ((), {"model.tva.s": 2, "model.tva.qk_norm": True}),
    "n-grams with dropout": (
        (),
        {"model.ngram.orders": [2], "model.ngram.buckets": [64], "model.dropout": 0.1},
    ),
    "average of the weights": ((), {"training.ema_decay": 0.9}),
    "experts": ((MOE,), EXPERTS),
    "experts with a limit": (
        (MOE, ROUTING),
        {
            **EXPERTS,
            "model.moe.dropless": False,
            "model.moe.capacity": 0.8,
            "model.moe.shared_expert": "split",
            "routing.exploration": 1.0,
            "routing.balancing": "bias",
        },
    ),
    "alignment": (("apt_plugins.align.plugin",), {"model.tva.s": 1}),
}


@pytest.mark.parametrize("precision", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_deterministic_runs_have_the_same_bits(part: str, precision: bool) -> None:
    plugins, settings = PARTS[part]
    overrides = {
        "hardware.device": GPU,
        "training.deterministic": True,
        "training.mixed_precision": precision,
        "training.grad_accum_steps": 2,
        "evaluation.sample_tokens": 0,
        **settings,
    }
    one, other = (tiny_run(*plugins, steps=4, overrides=overrides) for _ in range(2))
    assert one.same_weights(other)
    assert [row.get("loss") for row in one.metrics] == [row.get("loss") for row in other.metrics]
