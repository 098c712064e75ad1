"""``apt-eval``: scores runs on tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from apt_core.cli import completion
from apt_core.cli.output import Json, complain, make_console, print_table, say
from apt_core.cli.run_command import run_command
from apt_core.cli.run_options import Debug, Device, Plugins, Set, Step, Weights, chosen_run
from apt_core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from apt_core.evaluation.several import Difference, RunScores

WEIGHTS = ("last", "best", "average")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders of runs, checkpoints, or names of profiles, of which the newest run "
            "below runs/ is taken. Without any: the newest run of all.",
            show_default=False,
            autocompletion=completion.runs,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks by name, or files of tasks (.yaml); repeatable, comma lists allowed. "
            "Default: held_out. apt-hooks providers task lists them."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Predict a text file, in place of the held-out text; repeatable."),
    ] = None,
    step: Step = None,
    weights: Weights = "last",
    device: Device = "auto",
    plugin: Plugins = None,
    set_: Set = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="Rows that are computed at a time.")
    ] = 16,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens by which windows over a long text move on. Default: half the context.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The most items of a task, spread over all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of what a task draws.")] = 0,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Score by a task of lm-evaluation-harness in place of APT's own; repeatable, "
            "comma lists allowed.",
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder with tasks of lm-eval, whose YAML may name code that it runs; "
            "repeatable."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> Json | None:
    """Score runs on tasks, several side by side.

    The scores are added to scores.json in the folder of each run.
    """
    if weights not in WEIGHTS:
        hint = did_you_mean(weights, WEIGHTS) or f"one of {', '.join(WEIGHTS)}"
        raise ConfigError(f"is {weights!r}", "--weights", hint=hint)
    names, harness = _names(tasks, "--tasks"), _names(lm_eval, "--lm-eval")
    if harness and (names or text):
        raise ConfigError("--lm-eval goes without --tasks and --text")
    if include_path and not harness:
        raise ConfigError("--include-path goes with --lm-eval")
    if harness and find_spec("lm_eval") is None:
        message = "--lm-eval needs lm-evaluation-harness, which is not installed"
        raise ConfigError(message, hint='pip install "apt-kernel[lm_eval]"')

    from apt_core.cli.train import collect_overrides
    from apt_core.evaluation.scoring import Scoring
    from apt_core.evaluation.several import (
        Asked,
        Opening,
        differences,
        score_run,
        score_run_by_harness,
    )
    from apt_core.log import TolerantStream, logging_to
    from apt_core.profile_paths import user_path

    paths = [chosen_run(each) for each in run or (None,)]
    scoring = Scoring(batch_size=batch_size, stride=stride, seed=seed, limit=limit)
    overrides = collect_overrides(set_ or (), ())
    opening = Opening(step, cast(Any, weights), device, plugin or (), overrides)
    console = make_console(cast(TextIO, TolerantStream(sys.stderr)))
    with logging_to(console, level="DEBUG" if debug else "WARNING"):
        score: Callable[..., RunScores]
        if harness:
            os.environ.setdefault("TQDM_DISABLE", "1")  # there is one display of progress
            from apt_core.evaluation.lm_eval_model import HarnessTasks

            of_harness = HarnessTasks(harness, [user_path(path) for path in include_path or ()])
            score = partial(score_run_by_harness, tasks=of_harness, scoring=scoring)
        else:
            score = partial(score_run, asked=Asked(names, text or (), scoring))
        runs = [*_scored(paths, partial(score, opening=opening), console)]
    found = [*differences(runs)]
    if json:
        return Json(_as_json(runs, found))
    _print(runs, found)
    return None


def _names(given: Sequence[str] | None, key: str) -> list[str]:
    """The names in the values of an option, each of which may be a comma list."""
    names = [name.strip() for text in given or () for name in text.split(",") if name.strip()]
    if given and not names:
        raise ConfigError("names no task", key)
    return names


def _scored(
    paths: Sequence[Path], score: Callable[..., RunScores], console: Console
) -> Iterator[RunScores]:
    """The scores of each run, which are kept in its folder."""
    from apt_core.errors import CheckpointError
    from apt_core.runs.task_scores import add_scores

    with _progress(console) as advance:
        for path in paths:
            label = f"{path.name}: " if len(paths) > 1 else ""
            scores = score(path, advance=partial(advance, label))
            try:
                add_scores(scores.folder, scores.rows)
            except (OSError, CheckpointError) as error:
                complain(f"warning: the scores are not kept: {error}")
            yield scores


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, str, float], None]]:
    """What to tell how far each task is, with a label before its name; drawn on a terminal."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    drawn = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    known: dict[str, TaskID] = {}

    def advance(label: str, task: str, share: float) -> None:
        name = f"{label}{task}"
        if name not in known:
            known[name] = drawn.add_task(name, total=1.0)
        drawn.update(known[name], completed=share)

    with drawn:
        yield advance


def _as_json(runs: Sequence[RunScores], found: Sequence[Difference]) -> dict[str, Any]:
    from dataclasses import asdict

    from apt_core.json_files import without_nan

    value = {
        "runs": [{"run": str(run.path), "step": run.step, "scores": run.rows} for run in runs],
        "differences": [
            {
                "run": str(runs[each.other].path),
                "less": str(runs[each.one].path),
                "task": each.task,
                "metric": each.metric,
                **asdict(each.figure),
            }
            for each in found
        ],
    }
    return cast("dict[str, Any]", without_nan(value))


def _print(runs: Sequence[RunScores], found: Sequence[Difference]) -> None:
    """One table: a row for each metric of each task, a column for each run, and for each but the
    first how it differs from the one before."""
    from apt_core.evaluation.records import shown

    less = {(each.other, each.task, each.metric): each.figure for each in found}
    names = [f"{run.path.name or run.path} step {run.step}" for run in runs]
    columns = ["task", "metric"]
    for number, name in enumerate(names):
        columns += [name, "difference"] if number else [name]
    rows: list[list[object]] = []
    for task in dict.fromkeys(task for run in runs for task in run.figures):
        metrics = [run.figures[task] for run in runs if task in run.figures]
        for metric in metrics[0]:
            row: list[object] = [task, metric]
            for number, run in enumerate(runs):
                figure = run.figures.get(task, {}).get(metric)
                row.append("" if figure is None else shown(figure))
                if number:
                    difference = less.get((number, task, metric))
                    row.append("" if difference is None else shown(difference, signed=True))
            rows.append(row)
    print_table(columns, rows)
    for line in dict.fromkeys(_notes(runs)):
        say(line)


def _notes(runs: Sequence[RunScores]) -> Iterator[str]:
    """What the scores are of, and how intervals were made."""
    for run in runs:
        for row in run.rows:
            of = f" of {row['total']:,}" if row["items"] < row["total"] else ""
            cut = f", {row['too_long']:,} of them longer than it" if row.get("too_long") else ""
            methods = {figure["method"] for figure in row["metrics"].values()} - {""}
            units = row.get("units", "items")
            made = f"; 95 % by {' and '.join(sorted(methods))} over {units}"
            yield (
                f"{row['task']}: items {row['items']:,}{of}, context {row['context']:,} tokens"
                f"{cut}, stride {row['stride']:,}, batch size {row['batch_size']}, "
                f"{row['precision']} on {row['device']}{made if methods else ''}"
            )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-eval``."""
    sys.exit(run_command(app, "apt-eval", args))
