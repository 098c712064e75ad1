"""Chooses the dtype in which FSDP2 gathers the layers of a model.

Autocast casts the weights in every layer, and the backward keeps the casts, which add up to a whole
copy of a sharded model. Weights that are gathered in the dtype of autocast need no cast, and half
the communication; but each layer then sees its parameters in that dtype.
"""

from __future__ import annotations

import torch
from torch import nn

from apt_core.data.batches import Batch
from apt_core.device import autocast, is_out_of_memory
from apt_core.error_text import one_line
from apt_core.kernel import Kernel
from apt_core.log import get_logger
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.costs import layers_of
from apt_core.parallel.world import World
from apt_core.planning.footprint import (
    cast_parameters,
    layer_kinds,
    measured_layers,
    with_layers,
)

log = get_logger("apt.training")

TOKENS = 16


def gathered_dtype(
    kernel: Kernel, model: nn.Module, device: torch.device, dtype: torch.dtype | None, world: World
) -> torch.dtype | None:
    """``dtype``, in which autocast computes, if the layers of ``model`` run with parameters of that
    dtype; otherwise None, for the dtype of the parameters. All processes call this together; a
    warning says why the layers fail.

    ``model`` is not sharded yet and is not changed; some layers of each kind are tried on
    ``device``.
    """
    if dtype is None or world.sharding != "fsdp":
        return None
    names = ModelBuilder(kernel.config, kernel.registry).attention_names()
    layers, _ = measured_layers(layer_kinds(model, names))
    sample = with_layers(model, layers)
    reasons = world.gather(_failure(sample, kernel.config.seq_len, device, dtype))
    reason = next(filter(None, reasons), "")
    if reason:
        log.warning(
            "FSDP2 gathers the layers in fp32, which takes more memory and communication: with "
            "parameters in %s they fail (%s)",
            str(dtype).removeprefix("torch."),
            reason,
        )
    return None if reason else dtype


def _failure(model: nn.Module, seq_len: int, device: torch.device, dtype: torch.dtype) -> str:
    """The error with which a micro-batch fails in ``model``; empty if it does not fail."""
    devices = [device] if device.type == "cuda" else []
    try:
        model.to(device)
        for layer in layers_of(model):
            cast_parameters(layer, dtype)
        ids = torch.zeros(1, min(TOKENS, seq_len), dtype=torch.int64, device=device)
        with torch.random.fork_rng(devices), torch.enable_grad():
            with autocast(device, dtype):
                logits = forward_batch(model, model, Batch.of_ids(ids)).logits
            if logits.requires_grad:
                logits.float().mean().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return one_line(error)
    return ""
