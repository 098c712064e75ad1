"""A transform: in mid-run, each feed-forward layer gets a learned gain per channel, which begins at
one and so changes no output (LayerScale, Touvron et al. 2021).

apt-train -p tiny_debug --plugin examples/layer_scale.py --schedules.enable_layer_scale_at_step 100
"""

from __future__ import annotations

import torch
from torch import nn

from apt_core import PluginInfo, hookimpl
from apt_core.modeling import Carried, ModelTransform

PLUGIN = PluginInfo(summary="a learned gain after each feed-forward layer", version="1.0.0")


class Scaled(nn.Module):
    """A layer whose output [B, T, D] is multiplied by ``gain`` [D]."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.gain = layer, nn.Parameter(torch.empty(width))

    def init_parameter(self, name, tensor, generator, *, num_layers):
        if name == "gain":
            nn.init.ones_(tensor)
        return name == "gain"

    def forward(self, x):
        return self.layer(x) * self.gain


@hookimpl
def apt_transform_model(model):
    origins = {}
    for index, block in enumerate(model.blocks):
        path = f"blocks.{index}.ffn"
        for name, _ in block.ffn.named_parameters():
            origins[f"{path}.layer.{name}"] = Carried(f"{path}.{name}")
        block.ffn = Scaled(block.ffn, model.d_model)
    return ModelTransform(model, origins)
