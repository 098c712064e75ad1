"""Formats the plan of a run for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from apt_core.code_source import short_path
from apt_core.modeling.compilation import computes_in_words
from apt_core.planning.memory import gib
from apt_core.providers.attention import AttentionSupport

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(console: Console, plan: dict[str, Any]) -> None:
    """Print the plan."""
    from rich.table import Table

    def say(text: str = "") -> None:
        console.print(text, markup=False)

    say(f"plan of profile {plan['profile']} on {plan['device']} (nothing is trained)")
    say(computes_in_words(plan["computes"]))
    for row in plan["missing"]:
        say(f"missing here: {row['key']}: {row['message']}")
    for row in plan["paths"]:
        say(f"{row['key']}: {short_path(row['path'])}")
    for row in plan["data"]:
        say(_data(row))
    for notice in plan["notices"]:
        say(f"note: {notice}")
    providers = Table("kind", "asked", "used", "reason", box=None, header_style="bold")
    for row in plan["providers"]:
        providers.add_row(row["kind"], row["asked"], row["used"], row["reason"])
    console.print(providers)
    for row in plan["plugins"]:
        why = f" ({row['reason']})" if row["reason"] else ""
        say(f"plugin {row['name']}: {row['state']}{why}")
    if not plan["plugins"]:
        say("plugins: none")
    for row in plan["inactive_keys"]:
        say(f"inactive: {row['key']} ({row['reason']})")
    _print_model(console, plan["model"], plan["stages"][0])
    _print_stages(console, plan)
    for line in (*_memory(plan["stages"]), *_time(plan), _batch(plan)):
        say(line)


def _print_stages(console: Console, plan: dict[str, Any]) -> None:
    """Print the timeline: the plugins, FLOPs, memory and time of each stage."""
    from rich.table import Table

    per_epoch = plan["batch"]["steps_per_epoch"] is not None
    table = Table(box=None, header_style="bold")
    table.add_column("stage", overflow="fold")
    table.add_column("from", no_wrap=True)
    time = "epoch" if per_epoch else "1M tokens"
    counts = {"parameters": "params_total", "active": "params_active", "trained": "params_trained"}

    def tells(key: str) -> bool:
        return any(stage[key] != stage["params_total"] for stage in plan["stages"])

    if tells(counts["trained"]):
        counts = {name: key for name, key in counts.items() if name == "parameters" or tells(key)}
    else:
        del counts["trained"]
    for column in (*counts, "memory", "FLOPs/token", time):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan["stages"]:
        unit = next(u for u in ("epoch", "step", "token") if stage[u] is not None)
        flops, extra = stage["flops_per_token"], stage["plugin_flops_per_token"]
        seconds = stage["seconds_per_epoch" if per_epoch else "seconds_per_million_tokens"]
        table.add_row(
            stage["name"],
            f"{unit} {stage[unit]}",
            *(_count(stage[key]) for key in counts.values()),
            gib(stage["memory"]["total"]),
            _flops(None if flops is None else flops + extra),
            "unknown" if seconds is None else _duration(seconds),
        )
    console.print(table)


def _print_model(console: Console, model: dict[str, Any], total: dict[str, Any]) -> None:
    """Print a table of the model's parts, and explain its figures."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("part", no_wrap=True)
    for column in ("layers", "parameters", "FLOPs/token", "cache/token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("supports", overflow="fold")
    without: list[str] = []
    for part in model["parts"]:
        attends = part["kind"] == "attention"
        supports = part["supports"] or {}
        if attends and supports.get("cache") is False:
            without.append(part["used"])
        table.add_row(
            f"{part['kind']} {part['used']}".rstrip(),
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


def _memory(stages: list[dict[str, Any]]) -> Iterator[str]:
    """Lines on the parts of one process's memory, for each stage in which they change."""
    words = {"ema": "average", "buffers": "communication", "snapshot": "copy for checkpoints"}
    before = None
    for stage in stages:
        memory, switching = stage["memory"], stage["switch_memory"]
        at = "" if all(s["memory"] == memory for s in stages) else f" ({stage['name']})"
        if memory != before:
            parts = ", ".join(
                f"{words.get(part, part)} "
                f"{'unknown' if memory[part] is None else gib(memory[part])}"
                for part in (
                    "parameters", "gradients", "optimizer", "ema", "activations", "buffers",
                    "snapshot",
                )
                if memory[part] != 0
            )  # fmt: skip
            size = memory["world_size"]
            of = "" if size == 1 else f" of each of {size} processes ({memory['sharding']})"
            yield f"memory{of}{at}: {parts}"
        if switching is not None:
            yield (
                f"switch{at}: {gib(switching)} for the moment in which the old structure and the "
                "new one are there"
            )
        before = memory


def _time(plan: dict[str, Any]) -> Iterator[str]:
    """A line on how the time was estimated."""
    calibration = plan["calibration"]
    measured = [stage["measured"] for stage in plan["stages"] if stage["measured"]]
    if not measured:
        return
    on, threads = calibration["device"], calibration["threads"]
    if on == "cpu":
        on += f", {threads} threads" if threads > 1 else ", 1 thread"
    elsewhere = "" if calibration["is_the_runs_device"] else ", not the profile's device"
    what = ", then ".join(dict.fromkeys(measured))
    of = "with its evaluations, " if plan["batch"]["steps_per_epoch"] is not None else ""
    if plan["computes"]["compile"]["mode"] is not None:
        what += ", not compiled: the run, which is, takes less"
    yield f"time: an estimate, {of}on {on}{elsewhere}; timed: {what}"


def _data(row: dict[str, Any]) -> str:
    text = f"data {row['name']}: ".replace(" :", ":") + row["description"]
    if row["windows"] is not None:
        return (
            f"{text}: {row['train_tokens']:,} tokens to train on ({row['windows']:,} sequences), "
            f"{row['val_tokens']:,} to evaluate on"
        )
    if row["estimated_tokens"] is None:
        return text
    return (
        f"{text}: about {_count(row['estimated_tokens'])} tokens; to tokenize them, once, takes "
        f"about {_duration(row['build_seconds'])}"
    )


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


def _count(value: int) -> str:
    """
    >>> _count(987), _count(149_700), _count(10_904_000_000)
    ('987', '149.7K', '10.90B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.{2 if unit == 'B' else 1}f}{unit}"
    return str(value)


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.25), _duration(75), _duration(5_400), _duration(2_000_000)
    ('0.2 s', '75 s', '1.5 h', '23.1 days')
    """
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _cache(value: int | None, without: bool) -> str:
    if value is None:
        return "none" if without else "unknown"
    return scaled(value, "B", 1024)


def _claims(supports: dict[str, bool]) -> str:
    """A short text of the supported features, most often "all".

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
