"""``exporter:safetensors``: its files are what the documentation says of them."""

from __future__ import annotations

from apt_plugins.export.plain_weights import PlainWeightsExporter
from tests.plugins.export.conftest import Certify


def test_rounded_weights_are_compared_with_the_model_that_has_them(certify: Certify) -> None:
    exporter = PlainWeightsExporter({"dtype": "bfloat16"})
    [found] = certify(exporter, ["tva rank 6, gqa, QK-norm, vft"], num_prompts=8).values()
    assert found.faults == [] and found.logits.absolute <= 1e-5
    assert found.tokens == found.equal_tokens > 100


def test_the_documented_formulas_compute_the_same(certify: Certify) -> None:
    names = [
        "mha of width 6, untied, linear RoPE",
        "tva rank 6, gqa, QK-norm, vft",
        "experts, yarn",
    ]
    found = certify(PlainWeightsExporter({"max_shard_size": 40_000}), names, num_prompts=8)
    for name, comparison in found.items():
        assert comparison.faults == [], name
        assert comparison.logits.absolute <= 1e-5 and comparison.encoded > 80
        assert comparison.tokens == comparison.equal_tokens > 100
