"""Gives a run's model the weights of a folder of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apt_core.errors import AptError
from apt_plugins.export.hf_names import EMBEDDING, FINAL_NORM, HEAD, of_block
from apt_plugins.hf_import.hf_config import HFModel
from apt_plugins.hf_import.hf_weights import OURS, QK_NORMS, QKV, HFWeights


def named_as_ours(model: HFModel, weights: HFWeights) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a run with multi-head attention, one at a time, in fp32; those of an
    attention stand together."""
    yield "embedding.weight", weights.read(EMBEDDING)
    ours = {**(QK_NORMS if model.keys["mha"]["qk_norm"] else {}), **OURS}
    for layer in range(model.keys["num_layers"]):
        parts = [weights.read(of_block(layer, name)) for name in QKV]
        yield f"blocks.{layer}.attention.qkv_weight", torch.cat(parts)
        for name, theirs in ours.items():
            yield f"blocks.{layer}.{name}", weights.read(of_block(layer, theirs))
    yield "final_norm.weight", weights.read(FINAL_NORM)
    if not model.keys["tie_embeddings"]:
        yield "head.weight", weights.read(HEAD)


@torch.no_grad()
def fill(built: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Give ``built`` all its parameters. Raises AptError where the two are not the same, as when a
    plugin has built another layer."""
    parameters, given = dict(built.named_parameters()), set[str]()
    for name, tensor in tensors:
        there = parameters.get(name)
        if there is None or there.shape != tensor.shape:
            found = "no such parameter" if there is None else f"one of {list(there.shape)}"
            raise AptError(f"{name}: a tensor of {list(tensor.shape)}, and the model has {found}")
        there.copy_(tensor)
        given.add(name)
    if left := sorted(parameters.keys() - given):
        raise AptError(f"the model has {left[0]}, of which the folder says nothing")
