"""What a provider need not be told, and what it need not say."""

from __future__ import annotations

import pytest
from torch import nn

from apt_core.defaults import core_providers
from apt_core.modeling.layers import TVAProvider
from apt_core.providers import AttentionProvider
from apt_core.providers.attention import TVASettings
from apt_plugins.flash_attn import plugin as flash_attn


def test_the_attentions_with_the_settings_of_tva_are_known_to_who_checks_their_ranks() -> None:
    declared = [*core_providers(""), *flash_attn.apt_register_providers()]
    assert {s.name for s in declared if s.section == "model.tva"} == {*TVASettings.ATTENTIONS}


class Mine(AttentionProvider):
    def create_layer(self, d_model, num_heads, **options):
        return nn.Identity()


@pytest.mark.parametrize("kv_heads", [None, 4, 2, 1])
def test_an_attention_costs_what_multi_head_attention_does(kv_heads: int | None) -> None:
    plain, mine = TVAProvider({"r": 1, "s": 0}), Mine()
    for length in (1, 128):
        assert mine.flops(64, 4, length, num_kv_heads=kv_heads) == plain.flops(
            64, 4, length, num_kv_heads=kv_heads
        )
        assert mine.kv_cache_bytes(64, 4, length, num_kv_heads=kv_heads) == plain.kv_cache_bytes(
            64, 4, length, num_kv_heads=kv_heads
        )
