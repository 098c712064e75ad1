"""Formats the summary that is printed when a run is over."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from apt_core.code_source import short_path
from apt_core.errors import DivergedError
from apt_core.kernel import Kernel
from apt_core.metric_names import TASK
from apt_core.monitor import duration, rate
from apt_core.plugin_records import PluginRecord
from apt_core.printable import printable
from apt_core.runs.checkpoint import list_checkpoints, step_of
from apt_core.runs.finding import has_checkpoint
from apt_core.runs.folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from apt_core.training.run import RunResult


def print_summary(console: Console, result: RunResult, kernel: Kernel) -> None:
    """Print final figures, used providers, states of plugins, and a sample."""
    for line in summary_lines(result, kernel):
        console.print(line, markup=False)


def summary_lines(result: RunResult, kernel: Kernel) -> list[str]:
    """The lines of the summary."""
    figures = result.figures
    why = f" ({result.reason})" if result.reason else ""
    part = ""
    if "part_steps" in figures:
        part = (
            f" (since the resume: {figures['part_steps']} steps, {figures['part_tokens']:,} tokens "
            f"in {duration(figures['part_seconds'])})"
        )
    lines = [
        "",
        f"{result.status}{why}: {result.step} steps, {result.tokens:,} tokens in "
        f"{duration(figures['seconds'])}{part}, {rate(figures['tokens_per_s'])} tok/s, "
        f"{figures['memory_mb']:.0f} MB at the most",
    ]
    if "skipped_steps" in figures:
        lines.append(
            f"skipped steps, which were not finite: {figures['skipped_steps']}; see nonfinite/"
        )
    if "failed_checkpoints" in figures:
        lines.append(
            f"checkpoints that could not be written: {figures['failed_checkpoints']}; see "
            "manifest.json"
        )
    if "val_loss" in figures:
        started = ""
        if "val_bpb_start" in figures:
            started = (
                f" (at the start, on {figures['val_tokens_start']:,} tokens: "
                f"{figures['val_loss_start']:.3f}, {figures['val_bpb_start']:.3f})"
            )
        accuracy = ""
        if "val_accuracy" in figures:
            accuracy = f", accuracy {figures['val_accuracy']:.1%}"
        step = figures.get("val_step", result.step)
        when = "" if step == result.step else f" after step {step}"
        lines.append(
            f"held-out text{when}: loss {figures['val_loss']:.3f} nats per token, "
            f"{figures['val_bpb']:.3f} bits per byte{started}, "
            f"perplexity {figures['val_ppl']:.2f}{accuracy}, on {figures['val_tokens']:,} tokens"
        )
    lines += _task_lines(figures)
    for stage in result.trainable:
        changed = [
            f"{count:,} {what} ({', '.join(parts)})"
            for what, parts, count in (
                ("frozen", stage.frozen, stage.frozen_parameters),
                ("thawed", stage.thawed, stage.thawed_parameters),
            )
            if parts
        ]
        lines.append(
            f"from step {stage.step}: {stage.trained:,} parameters trained; {', '.join(changed)}"
        )
    used = [
        f"{row.kind}:{row.used}" + (f" (asked: {row.asked}; {row.reason})" if row.reason else "")
        for row in kernel.registry.resolutions.values()
    ]
    lines.append(f"providers: {', '.join(used)}")
    lines += [f"plugin {line}" for r in kernel.manager.records.values() for line in of_plugin(r)]
    if result.sample:
        sample = kernel.config.evaluation.sample_prompt + result.sample
        lines += ["sample:", f"  {printable(sample)}"]
    folder = short_path(str(result.folder))
    lines.append(f"run folder: {folder}")
    if has_checkpoint(result.folder):
        lines.append(f"talk to it: apt-chat {shlex.quote(folder)}")
    return lines


def _task_lines(figures: Mapping[str, float]) -> list[str]:
    """One line for each figure of a task, with what it was at the start."""
    lines = []
    for name, value in figures.items():
        if name.startswith((f"{TASK}/", "val_reasoning")) and not name.endswith("_start"):
            start = figures.get(f"{name}_start")
            before = "" if start is None else f" (at the start: {start:.3f})"
            lines.append(f"{name}: {value:.3f}{before}")
    return lines


def of_plugin(record: PluginRecord) -> list[str]:
    """One line for the plugin's state, or one for each failed hook with the number of failures."""
    lines = [
        f"{record.name}: {record.state}; in {left.hook} at {left.where} it {left.error} (put back)"
        for left in record.leftovers
    ]
    lines += [
        f"{record.name}: {record.state}; calls of {hook} in the background that were dropped: "
        f"{count:,}"
        for hook, count in record.dropped.items()
    ]
    if not (record.failures or lines):
        why = f" ({record.reason})" if record.reason else ""
        return [f"{record.name}: {record.state}{why}"]
    for hook in dict.fromkeys(failure.hook for failure in record.failures):
        there = [failure for failure in record.failures if failure.hook == hook]
        times = "once" if len(there) == 1 else f"{len(there)} times"
        lines.append(
            f"{record.name}: {record.state}; failed {times} in {hook} at {there[-1].where}: "
            f"{there[-1].error}"
        )
    return lines


def resume_hint(
    folder: RunFolder | None, step: int, again: str, error: BaseException | None = None
) -> str:
    """The command that continues a run in ``folder`` that stopped at ``step`` or failed with
    ``error``; empty if no checkpoint was saved."""
    if isinstance(error, DivergedError):
        return f"to go back: {again} {shlex.join(error.way_back)}" if error.way_back else ""
    if folder is None or not list_checkpoints(folder.checkpoints):
        return ""
    where = shlex.quote(str(folder))
    saved = step_of(list_checkpoints(folder.checkpoints)[-1])
    kept = "" if saved == step else f", the newest checkpoint is of step {saved}"
    return f"stopped at step {step}{kept}; to go on: {again} --output {where} --resume"
