"""The plan of a run, without training: providers, costs, memory and the timeline of stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from apt_core.kernel import Kernel
from apt_core.providers.attention import AttentionSupport
from apt_core.training.blame import attributed
from apt_core.training.costs import ModelCost, model_cost, support_notices
from apt_core.training.prepare import build_tokenizer, settle_device
from apt_core.training.saving import plugin_rows

if TYPE_CHECKING:
    from rich.console import Console

BYTES_PER_PARAMETER = 16
"""fp32 weights and gradients, and the two moments of Adam."""


def make_plan(kernel: Kernel) -> dict[str, Any]:
    """The plan as JSON values, with the keys profile, device, providers, plugins, inactive_keys,
    notices, model and stages.

    ``model`` has the parts of the model with their costs, as :mod:`apt_core.training.costs` counts
    them; what a provider cannot tell is null there, with a notice. The model is built on the meta
    device, so that a large profile is planned in no time; providers are probed as at the start of a
    run. Raises ConfigError as a run would.
    """
    device = settle_device(kernel)
    try:
        for kind, name in kernel.named_providers():
            kernel.registry.get(kind, name)
        build_tokenizer(kernel)
        cost = model_cost(kernel)
    except Exception as error:
        raise attributed(kernel, error) from error
    return {
        "profile": kernel.config.name,
        "device": str(device),
        "providers": [row.row() for row in kernel.registry.resolutions.values()],
        "plugins": [_at_the_start(kernel, row) for row in plugin_rows(kernel)],
        "inactive_keys": [{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        "notices": [*kernel.notices, *support_notices(kernel, device), *cost.notes],
        "model": cost.row(),
        "stages": [_stage(cost, **at) for at in _positions(kernel)],
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


def _stage(cost: ModelCost, name: str, unit: str, at: int) -> dict[str, Any]:
    return {
        "name": name,
        "epoch": at if unit == "epoch" else None,
        "step": at if unit == "step" else None,
        "token": at if unit == "token" else None,
        "params_total": cost.params,
        "params_active": cost.params,
        "memory_mb": round(cost.params * BYTES_PER_PARAMETER / 2**20, 1),
        "flops_per_token": cost.flops_per_token,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token,
        "kv_cache_bytes_per_sequence": cost.kv_cache_bytes_per_sequence,
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
    _print_model(console, plan["model"], plan["stages"][0])
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


def _print_model(console: Console, model: dict[str, Any], total: dict[str, Any]) -> None:
    """The parts of the model in a table, and what its figures mean."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("part", no_wrap=True)
    for column in ("layers", "parameters", "FLOPs/token", "cache/token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("supports", overflow="fold")
    without: list[str] = []
    for part in model["parts"]:
        attends = part["slot"] == "attention"
        supports = part["supports"] or {}
        if attends and supports.get("cache") is False:
            without.append(part["used"])
        table.add_row(
            f"{part['slot']} {part['used']}".rstrip(),
            "" if part["layers"] is None else str(part["layers"]),
            f"{part['params']:,}",
            _flops(part["flops_per_token"]),
            _cache(part["kv_cache_bytes_per_token"], part["used"] in without) if attends else "",
            _claims(supports) if attends else "",
        )
    table.add_row(
        "total",
        "",
        f"{total['params_total']:,}",
        _flops(total["flops_per_token"]),
        _cache(total["kv_cache_bytes_per_token"], bool(without)),
    )
    console.print(table)
    flags = ", ".join(field.name for field in fields(AttentionSupport))
    lines = [f"FLOPs: of training on {model['seq_len']} tokens, forward and backward"]
    if without:
        lines.append(
            f"cache: none, for {', '.join(without)} has none: generation computes the whole text "
            "anew for every token"
        )
    else:
        size = _cache(total["kv_cache_bytes_per_sequence"], False)
        lines.append(
            f"cache: of generation, in {model['kv_cache_dtype']}; {size} for a sequence of "
            f"{model['max_seq_len']} tokens"
        )
    lines.append(f"supports: of {flags}")
    for line in lines:
        console.print(line, markup=False)


def _flops(value: int | None) -> str:
    return "unknown" if value is None else scaled(value, "FLOP", 1000)


def _cache(value: int | None, without: bool) -> str:
    if value is None:
        return "none" if without else "unknown"
    return scaled(value, "B", 1024)


def _claims(supports: dict[str, bool]) -> str:
    """What is claimed, in few words: most attention supports everything.

    >>> _claims({"cache": True, "mask": True}), _claims({"cache": False, "mask": True})
    ('all', 'all but cache')
    """
    if not supports:
        return "unknown"
    lacking = [name for name, claimed in supports.items() if not claimed]
    if len(lacking) == len(supports):
        return "nothing"
    return f"all but {', '.join(lacking)}" if lacking else "all"


def scaled(value: int, unit: str, step: int) -> str:
    """``value`` in the largest unit of which it is at least one, with three figures.

    >>> scaled(1234567, "FLOP", 1000), scaled(1536, "B", 1024), scaled(96, "B", 1024)
    ('1.23 MFLOP', '1.50 KiB', '96 B')
    """
    prefixes = (
        ("", "k", "M", "G", "T", "P", "E")
        if step == 1000
        else ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
    )
    power = 0
    while value >= step ** (power + 1) and power + 1 < len(prefixes):
        power += 1
    if not power:
        return f"{value} {unit}"
    amount = value / step**power
    return f"{amount:.{max(0, 3 - len(str(int(amount))))}f} {prefixes[power]}{unit}"


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
