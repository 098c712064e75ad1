"""Small MoE layers, and what the plugin uses of a trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apt_core.config import Config
from apt_core.modeling import initialize_parameters
from apt_plugins.moe.experts import Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.router import TopKRouter
from apt_plugins.moe.settings import MoeSettings
from apt_plugins.routing.plugin import Plugin
from apt_plugins.routing.settings import RoutingSettings

WIDTH = 16


class Trainer:
    """Enough of one: a model of MoE layers, a profile, and the values of its schedule."""

    world_size = 1
    step = 0
    step_void = False

    def __init__(self, model, settings, values):
        sections = {"routing": RoutingSettings(**settings), "model.moe": MoeSettings()}
        self.config = Config().with_plugin_sections(sections)
        self.model, self.values = model, values

    def param(self, name, default=None):
        return self.values.get(name, default)


@pytest.fixture
def plugin():
    """The plugin of one run."""
    return Plugin()


@pytest.fixture
def make_model():
    """``make_model(layers=1, experts=8, top_k=2, groups=1, scores="softmax")``: MoE layers that are
    applied to [N, 16] in turn; their routers prefer the later experts where the first coordinate is
    positive."""

    def make(*, layers=1, experts=8, top_k=2, groups=1, scores="softmax", skew=0.0):
        def layer():
            return MoELayer(
                TopKRouter(WIDTH, experts, top_k, groups=groups, scores=scores),
                Experts(experts * groups, WIDTH, 8, "swiglu"),
                top_k=top_k,
                granularity=groups,
                capacity=None,
                dropout=0.0,
                shared=None,
                shared_weight=None,
            )

        model = nn.Sequential(*(layer() for _ in range(layers)))
        initialize_parameters(model, seed=0)
        with torch.no_grad():
            for each in model:
                each.router.weight[:, 0] += torch.linspace(-skew, skew, experts).repeat(groups)
        return model

    return make


@pytest.fixture
def make_trainer():
    """``make_trainer(model, settings, **values)``: a trainer with these settings of ``routing`` and
    values of schedule parameters."""

    def make(model, settings=None, **values):
        return Trainer(model, settings or {}, values)

    return make


@pytest.fixture
def tokens():
    """``tokens(count, seed=0)``: [count, 16], normal but for the first coordinate, which is 1."""

    def make(count, seed=0):
        x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
        x[:, 0] = 1.0
        return x

    return make
