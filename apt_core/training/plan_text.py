"""The plan of a run as people read it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from apt_core.providers.attention import AttentionSupport
from apt_core.training.memory import gib

if TYPE_CHECKING:
    from rich.console import Console


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
            gib(stage["memory"]["total"]),
        )
    console.print(stages)
    say(_memory(plan["stages"][0]["memory"]))
    say(_batch(plan))


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


def _memory(memory: dict[str, Any]) -> str:
    """What the memory of one process is made of."""
    words = {"ema": "average", "buffers": "communication", "snapshot": "copy for checkpoints"}
    parts = ", ".join(
        f"{words.get(part, part)} {'unknown' if memory[part] is None else gib(memory[part])}"
        for part in (
            "parameters", "gradients", "optimizer", "ema", "activations", "buffers", "snapshot",
        )
        if memory[part] != 0
    )  # fmt: skip
    size = memory["world_size"]
    of = "" if size == 1 else f" of each of {size} processes ({memory['sharding']})"
    return f"memory{of}: {parts}"


def _batch(plan: dict[str, Any]) -> str:
    batch, memory = plan["batch"], plan["stages"][0]["memory"]
    factors = [
        (memory["world_size"], "processes"),
        (memory["grad_accum_steps"], "micro-batches"),
        (memory["batch_size"], f"sequences of {plan['model']['seq_len']} tokens"),
    ]
    product = " x ".join(f"{n} {what}" for n, what in factors if n > 1 or "sequences" in what)
    steps = batch["steps_per_epoch"]
    epoch = "" if steps is None else f"; {steps:,} steps an epoch"
    return f"step: {batch['tokens_per_step']:,} tokens, {product}{epoch}"


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
