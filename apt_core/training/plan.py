"""The plan of a run, without training: providers, parameters, memory and the timeline of stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apt_core.kernel import Kernel
from apt_core.modeling.compose import ModelBuilder
from apt_core.training.blame import attributed
from apt_core.training.prepare import build_tokenizer, settle_device
from apt_core.training.saving import plugin_rows

if TYPE_CHECKING:
    from rich.console import Console

BYTES_PER_PARAMETER = 16
"""fp32 weights and gradients, and the two moments of Adam."""


def make_plan(kernel: Kernel) -> dict[str, Any]:
    """``{profile, device, providers, plugins, inactive_keys, notices, stages}``, JSON values.

    The model is built on the meta device, so that a large profile is planned in no time; providers
    are probed as at the start of a run. Raises ConfigError as a run would.
    """
    device = settle_device(kernel)
    try:
        for kind, name in kernel.named_providers():
            kernel.registry.get(kind, name)
        build_tokenizer(kernel)
        with torch.device("meta"):
            model = ModelBuilder(kernel.config, kernel.registry).build_model()
    except Exception as error:
        raise attributed(kernel, error) from error
    return {
        "profile": kernel.config.name,
        "device": str(device),
        "providers": [row.row() for row in kernel.registry.resolutions.values()],
        "plugins": [_at_the_start(kernel, row) for row in plugin_rows(kernel)],
        "inactive_keys": [{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        "notices": list(kernel.notices),
        "stages": [_stage(kernel, model, **at) for at in _positions(kernel)],
    }


def _at_the_start(kernel: Kernel, row: dict[str, Any]) -> dict[str, Any]:
    """A plugin's row with the state in which the run begins."""
    enabled = kernel.schedule.should_enable_plugin(row["name"], epoch=1, step=1, tokens=0)
    if row["state"] == "active" and not enabled:
        return {**row, "state": "dormant", "reason": "waits for its schedule"}
    return row


def _positions(kernel: Kernel) -> Iterable[dict[str, Any]]:
    """The start, and each moment at which a plugin becomes enabled or disabled."""
    yield {"name": "start", "unit": "epoch", "at": 1}
    for boundary in kernel.schedule.boundaries():
        if kernel.manager.has_plugin(boundary.plugin):
            verb = "enable" if boundary.enables else "disable"
            name = f"{verb} {boundary.plugin}"
            yield {"name": name, "unit": boundary.unit, "at": boundary.at}


def _stage(kernel: Kernel, model: nn.Module, name: str, unit: str, at: int) -> dict[str, Any]:
    config = kernel.config.model
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for key, p in model.named_parameters() if "embedding" not in key)
    if config.tie_embeddings:
        matrices += config.vocab_size * config.d_model
    attention = 12 * config.num_layers * config.d_model * config.max_seq_len
    return {
        "name": name,
        "epoch": at if unit == "epoch" else None,
        "step": at if unit == "step" else None,
        "token": at if unit == "token" else None,
        "params_total": parameters,
        "params_active": parameters,
        "memory_mb": round(parameters * BYTES_PER_PARAMETER / 2**20, 1),
        "flops_per_token": 6 * matrices + attention // 2,
    }


def print_plan(console: Console, plan: dict[str, Any]) -> None:
    """The plan for people."""
    from rich.table import Table

    def say(text: str = "") -> None:
        console.print(text, markup=False)

    say(f"plan of profile {plan['profile']} on {plan['device']} (nothing is trained)")
    for notice in plan["notices"]:
        say(f"note: {notice}")
    providers = Table("slot", "asked", "used", "reason", box=None, header_style="bold")
    for row in plan["providers"]:
        providers.add_row(row["slot"], row["asked"], row["used"], row["reason"])
    console.print(providers)
    for row in plan["plugins"]:
        say(f"plugin {row['name']}: {row['state']}{_because(row['reason'])}")
    if not plan["plugins"]:
        say("plugins: none")
    for row in plan["inactive_keys"]:
        say(f"inactive: {row['key']} ({row['reason']})")
    stages = Table("stage", "from", "parameters", "active", "memory", box=None, header_style="bold")
    for stage in plan["stages"]:
        unit = next(u for u in ("epoch", "step", "token") if stage[u] is not None)
        stages.add_row(
            stage["name"],
            f"{unit} {stage[unit]}",
            f"{stage['params_total']:,}",
            f"{stage['params_active']:,}",
            f"{stage['memory_mb']} MiB",
        )
    console.print(stages)
    say("memory: weights, gradients and Adam's moments in fp32, without activations")


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
