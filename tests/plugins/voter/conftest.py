"""Generations with plugins."""

from __future__ import annotations

import pytest
import torch

from apt_core import GenerationRequest
from apt_core.inference import generate
from apt_core.modeling import ModelBuilder
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.testing import TINY_PROFILE


@pytest.fixture
def continuation():
    """``continuation(*plugins, **request)``: the tokens and the manager, by a model whose next
    token is sometimes certain and sometimes not."""

    def continued(*plugins, **request):
        manager = PluginManager()
        for number, each in enumerate(plugins):
            manager.register(each, f"plugin_{number}")
        registry = Registry(manager)
        model = ModelBuilder({"model": TINY_PROFILE["model"]}, registry).build_model()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.add_(0.4 * noise)
        result = generate(
            model,
            registry.get("tokenizer", "byte"),
            GenerationRequest("The ", **{"max_new_tokens": 24, "seed": 3, **request}),
            manager,
            max_seq_len=16,
            device=torch.device("cpu"),
        )
        return list(result.tokens), manager

    return continued
