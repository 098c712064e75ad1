"""``apt-tune``: search the values of a profile's keys."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from apt_core import ConfigError, Problem
from apt_core.cli.output import Json, complain, make_console, print_table, say
from apt_core.cli.run_command import place_among_processes, run_command
from apt_core.cli.run_options import Debug
from apt_core.errors import did_you_mean
from apt_core.profile_paths import unrecordable, user_path
from apt_core.secrets import mask_arguments
from apt_plugins.optuna.settings import CLIMBING, PRUNERS, SAMPLERS, Direction, Settings

if TYPE_CHECKING:
    from apt_core.config import Override
    from apt_core.kernel import Kernel
    from apt_plugins.optuna.checking import Checked
    from apt_plugins.optuna.study import Study
    from apt_plugins.optuna.tuned import Tuned

DIRECTIONS = ("minimize", "maximize")
LOWER_IS_BETTER = ("val_loss", "val_bpb", "val_ppl")
SHOWN_SAMPLES = 5
STUDIES = Path("studies")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="APT_TUNE_STORAGE",
        show_envvar=True,
        help="A database that keeps the study, as SQLAlchemy names it: sqlite:///PATH, "
        "postgresql+psycopg://USER@HOST/NAME. Without it: a journal file in the study's folder.",
    ),
]


@app.callback(invoke_without_command=True)
def tune(
    context: typer.Context,
    profile: Annotated[
        str, typer.Option("--profile", "-p", help="The profile, as apt-train takes it.")
    ] = "",
    space: Annotated[
        Path | None,
        typer.Option(help="The YAML file that says which keys are searched, and between what."),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, max=100_000, help="How many trials the study is to have.")
    ] = 20,
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The study's folder; one that is there is joined and gone on with. Default: "
            "studies/PROFILE.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    workers: Annotated[
        int, typer.Option(min=1, max=1_000, help="Worker processes on this machine.")
    ] = 1,
    metric: Annotated[
        str,
        typer.Option(help="The figure of evaluations to optimise: val_loss, val_bpb, task/…"),
    ] = "val_loss",
    direction: Annotated[
        str | None,
        typer.Option(
            help="minimize or maximize. Default: minimize a loss, maximize all else.",
            show_default=False,
        ),
    ] = None,
    pruner: Annotated[
        str,
        typer.Option(
            help="halving or hyperband (trials pause at rungs, and the best go on), median (those "
            "worse than most end early), none."
        ),
    ] = "halving",
    reduction_factor: Annotated[
        int, typer.Option(min=2, max=100, help="Of so many trials at a rung, one goes on.")
    ] = 3,
    min_resource: Annotated[
        float,
        typer.Option(
            min=0.0001,
            max=1.0,
            help="The first rung is at this share of a trial's steps, or above.",
        ),
    ] = 0.1,
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Seeds the sampler, not the training.")] = 0,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Whether the first trial has the profile's own values, and comes to its end.",
        ),
    ] = True,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Activate a plugin, as apt-train does; repeatable.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key for all trials: training.max_epochs=5."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Any plugin failure, fallback or inactive key is an error."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check and show the space and first values; train nothing."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Debug = False,
) -> Json | int | None:
    """Search the values of a profile's keys: each trial is a run, which pauses and goes on.

    apt-tune -p tiny_debug --space space.yaml --trials 20 --workers 2

    The same command again goes on with a study that was stopped or killed; another one, on any
    machine that reaches the study, helps.
    """
    if context.invoked_subcommand is not None:
        return None
    settings = Settings(
        metric=metric,
        direction=_direction(direction, metric),
        pruner=pruner,
        reduction_factor=reduction_factor,
        min_resource=min_resource,
        sampler=sampler,
        seed=seed,
        baseline=baseline,
    )
    problems = [
        *_wrong_options(profile, space, settings),
        *unrecordable(
            {"--profile": profile, "--space": space, "--study": study}
            | {f"--plugin {each}": each for each in plugin or ()}
        ),
    ]
    if problems or space is None:
        raise ConfigError(problems)
    asked = _Asked(profile, user_path(space), settings, plugin or (), set_ or (), strict)
    tuned, kernel, checked = asked.checked()
    folder = user_path(study) if study is not None else STUDIES / _file_name(kernel.config.name)
    if dry_run:
        return _dry_run(asked, tuned, kernel, checked, folder, trials, workers, as_json=json)
    return _Running(asked, tuned, kernel, checked, folder, storage, trials, workers).run(
        as_json=json
    )


@app.command()
def show(
    study: Annotated[Path, typer.Argument(help="The study's folder.")],
    storage: Storage = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> Json | None:
    """The trials of a study, finished or not, the best of them first."""
    from apt_plugins.optuna.results import counted, summary, table

    folder = user_path(study)
    opened, facts = _loaded(folder, storage)
    rows = opened.rows()
    if json:
        return Json(summary(folder, rows, opened.settings) | {"space": facts["space"]})
    print_table(*table(rows, opened.settings))
    say(f"\n{len(rows)} trials: {counted(rows)}" if rows else "no trial has begun")
    return None


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="The study's folder.")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write. Default: report.html in the folder.")
    ] = None,
    storage: Storage = None,
    debug: Debug = False,
) -> None:
    """Write a page on a study: its history, which keys matter, every trial's values."""
    folder = user_path(study)
    opened, facts = _loaded(folder, storage)
    try:
        say(_write_page(opened, facts, user_path(output) if output else None))
    except OSError as error:
        message = f"the page cannot be written: {error.strerror}"
        raise ConfigError(message, "--output", str(output or folder)) from error


def _loaded(folder: Path, storage: str | None) -> tuple[Study, dict[str, Any]]:
    _require_optuna()
    from apt_plugins.optuna.study import load_study

    return load_study(folder, storage)


def _write_page(study: Study, facts: Mapping[str, Any], output: Path | None = None) -> Path:
    try:
        from apt_plugins.optuna.page import write_page
    except ModuleNotFoundError as error:
        hint = 'pip install "apt-kernel[report]"'
        raise ConfigError(f"{error.name} is not installed", hint=hint) from error
    return write_page(study, facts, output)


def _require_optuna() -> None:
    """Raise ConfigError where Optuna is not installed."""
    try:
        from apt_plugins.optuna.storage import quiet
    except ModuleNotFoundError as error:
        hint = 'pip install "apt-kernel[optuna]"'
        raise ConfigError(f"{error.name} is not installed", hint=hint) from error
    quiet()


def _wrong_options(profile: str, space: Path | None, settings: Settings) -> list[Problem]:
    problems = []
    if not profile:
        problems.append(Problem("no profile was given", "--profile", hint="apt-tune -p tiny_debug"))
    if space is None:
        hint = "write a file such as: training.learning_rate: {low: 1e-5, high: 1e-2, log: true}"
        problems.append(Problem("no space was given", "--space", hint=hint))
    known = {
        "--pruner": (settings.pruner, PRUNERS),
        "--sampler": (settings.sampler, SAMPLERS),
    }
    for option, (given, names) in known.items():
        if given not in names:
            hint = did_you_mean(given, names) or f"one of {', '.join(names)}"
            problems.append(Problem(f"there is no {given!r}", option, hint=hint))
    if place_among_processes()[0]:
        message = "apt-tune trains each trial in one process: it is not started by torchrun"
        problems.append(Problem(message, hint="--workers trains several trials at once"))
    return problems


class _Asked:
    """What the command line asks for."""

    def __init__(
        self,
        profile: str,
        space: Path,
        settings: Settings,
        plugins: Sequence[str],
        assignments: Sequence[str],
        strict: bool,
    ) -> None:
        self.profile, self.space, self.settings = profile, space, settings
        self.plugins, self.strict = plugins, strict
        self._assignments = assignments
        self.overrides: list[Override] = []

    def checked(self) -> tuple[Tuned, Kernel, Checked]:
        """The profile, and the space as it fits it. Raises ConfigError with every problem."""
        from apt_core.cli.train import collect_overrides
        from apt_core.config import read_profile
        from apt_plugins.optuna.checking import check_metric, check_space
        from apt_plugins.optuna.space import read_space
        from apt_plugins.optuna.tuned import Tuned

        self.overrides = collect_overrides(self._assignments, ())
        source = read_profile(self.profile, self.overrides)
        tuned = Tuned(source, tuple(self.plugins), self.strict)
        kernel = tuned.boot(())
        problems = [*check_metric(kernel, self.settings.metric)]
        try:
            checked = check_space(read_space(self.space), kernel, tuned.boot)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        if problems:
            raise ConfigError(problems)
        return tuned, kernel, checked


def _dry_run(
    asked: _Asked,
    tuned: Tuned,
    kernel: Kernel,
    checked: Checked,
    folder: Path,
    trials: int,
    workers: int,
    *,
    as_json: bool,
) -> Json | int:
    """Show the space, the values of the first trials, and how long all of them would take."""
    _require_optuna()
    from apt_core.monitor import duration
    from apt_plugins.optuna.estimate import estimate
    from apt_plugins.optuna.progress import value_text

    planned = estimate(tuned, kernel, checked.space, asked.settings, trials, workers, SHOWN_SAMPLES)
    facts = {
        "study": str(folder),
        **asked.settings.row(),
        "space": checked.space.row(),
        "rungs": list(asked.settings.rungs),
        "trials": trials,
        "workers": workers,
        **planned,
        "notices": list(checked.notices),
    }
    if as_json:
        return Json(facts)
    print_table(("key", "values"), [(each.key, each.in_words()) for each in checked.space])
    say()
    keys = [each.key for each in checked.space]
    samples = planned["samples"]
    print_table(
        ("first values", *keys),
        [
            (number, *(value_text(row[key]) if key in row else "-" for key in keys))
            for number, row in enumerate(samples)
        ],
    )
    say()
    for notice in checked.notices:
        say(f"note: {notice}")
    rungs = ", ".join(f"{share:.3g}" for share in asked.settings.rungs)
    if asked.settings.pruner in CLIMBING:
        say(f"{asked.settings.pruner}: trials pause at {rungs} of their steps")
    if planned["seconds"] is None:
        say(f"{trials} trials; how long one takes is not known before the data is there")
    else:
        say(
            f"{trials} trials by {workers} worker(s): about {duration(planned['seconds'])}; one "
            f"whole trial takes {duration(planned['seconds_per_trial'])}"
        )
    say(f"study: {folder}")
    return 0


class _Running:
    """A study that trials are made for."""

    def __init__(
        self,
        asked: _Asked,
        tuned: Tuned,
        kernel: Kernel,
        checked: Checked,
        folder: Path,
        storage: str | None,
        trials: int,
        workers: int,
    ) -> None:
        _require_optuna()
        from apt_plugins.optuna.study import make_folder, open_study

        self._asked, self._tuned, self._kernel, self._checked = asked, tuned, kernel, checked
        self._folder, self._storage = folder, storage
        self._count, self._workers = trials, workers
        make_folder(folder)
        self._study = open_study(
            folder, storage, asked.settings, checked.space, kernel.config.to_dict()
        )

    def run(self, *, as_json: bool) -> Json | int:
        """Work on the study, and say what came of it."""
        from apt_plugins.optuna.progress import Progress
        from apt_plugins.optuna.workers import WORKER

        if (worker := os.environ.get(WORKER)) and worker.isdecimal():
            return self._worker(parent=os.getppid()).run()
        self._say_first(as_json)
        progress = Progress(self._study, self._count, sys.stderr if as_json else sys.stdout)
        try:
            with progress:
                code = self._work(progress)
                progress.look()
        except KeyboardInterrupt:
            complain(self._again())
            raise
        if code > 128:
            complain(self._again())
            return code
        return self._result(code, as_json)

    def _work(self, progress: Any) -> int:
        from apt_plugins.optuna.workers import environments, run_workers

        if self._workers == 1:
            return self._worker(tick=progress.tick, look=progress.look).run()
        places = environments(self._workers, self._kernel.config.hardware.device)
        return run_workers(sys.argv[1:], places, progress.tick)

    def _worker(self, **options: Any) -> Any:
        from apt_plugins.optuna.space import own_values
        from apt_plugins.optuna.worker import Worker
        from apt_plugins.optuna.workers import thread_share

        return Worker(
            self._tuned,
            self._study,
            self._count,
            own_values(self._checked.space, self._kernel.config.to_dict()),
            threads=thread_share(self._workers),
            **options,
        )

    def _say_first(self, as_json: bool) -> None:
        """Say what is begun, or gone on with."""
        from apt_plugins.optuna.space import own_values

        console = make_console(sys.stderr if as_json else sys.stdout)
        rows = self._study.rows()
        ended = sum(row.state in ("complete", "pruned", "failed") for row in rows)
        begun = f"goes on: {ended} of {self._count} trials have ended" if rows else "begins"
        names = ", ".join(each.key for each in self._checked.space)
        console.print(
            f"study {self._study.name} in {self._folder} {begun}; {self._count} trials, "
            f"{self._workers} worker(s), {self._asked.settings.pruner}, over {names}",
            markup=False,
        )
        for notice in [*self._checked.notices, *self._study.notices, *self._hardware()]:
            console.print(f"note: {notice}", markup=False)
        space, config = self._checked.space, self._kernel.config.to_dict()
        if self._asked.settings.baseline and not rows and own_values(space, config) is None:
            console.print(
                "note: the space does not hold the profile's own values, so that no trial has them",
                markup=False,
            )

    def _hardware(self) -> list[str]:
        hardware = self._kernel.config.hardware
        notices = []
        if hardware.distributed and hardware.num_gpus > 1:
            notices.append(
                "hardware.distributed: each trial trains in one process; --workers trains several"
            )
        threads = (hardware.num_threads or 0) * self._workers
        if self._workers > 1 and threads > (cores := os.cpu_count() or 1):
            notices.append(
                f"hardware.num_threads: {self._workers} workers of {hardware.num_threads} threads "
                f"on {cores} cores slow each other down"
            )
        return notices

    def _again(self) -> str:
        words = shlex.join(["apt-tune", *mask_arguments(sys.argv[1:])])
        return f"what was trained is kept; go on with the same command: {words}"

    def _result(self, code: int, as_json: bool) -> Json | int:
        from apt_plugins.optuna.records import best_of
        from apt_plugins.optuna.results import counted, summary, table
        from apt_plugins.optuna.study import load_study

        settings = self._asked.settings
        rows = self._study.rows()
        best = best_of(rows, maximize=settings.maximize)
        written = self._best(best) if best is not None else None
        page = None
        try:
            _, facts = load_study(self._folder, self._storage)
            page = _write_page(self._study, facts)
        except (ConfigError, OSError) as error:
            complain(f"warning: no page of the study was written: {error}")
        if best is None and not code:
            complain("error: no trial has come to its end")
            code = 1
        if as_json:
            return Json(summary(self._folder, rows, settings), code)
        say()
        print_table(*table(rows, settings))
        say(f"\n{len(rows)} trials: {counted(rows)}")
        own = next((row for row in rows if row.baseline and row.value is not None), None)
        if best is not None:
            beside = f" (the profile itself: {own.value:.5g})" if own not in (None, best) else ""
            say(f"best: trial {best.number}, {settings.metric} {best.value:.5g}{beside}")
            say(f"its profile: {written}  (apt-train -p {shlex.quote(str(written))})")
        if page is not None:
            say(f"page: {page}")
        return code

    def _best(self, best: Any) -> Path | None:
        from apt_plugins.optuna.results import write_best

        space = self._checked.space
        overrides = space.overrides(best.params)
        try:
            kernel = self._tuned.boot(overrides)
            active = [name for name, _ in kernel.manager.list_name_plugin()]
            return write_best(
                self._folder,
                best,
                profile=self._asked.profile,
                source=self._tuned.source,
                overrides=[*self._asked.overrides, *overrides],
                plugins=active if self._asked.plugins else (),
                config=kernel.config.to_dict(),
                metric=self._asked.settings.metric,
            )
        except (ConfigError, OSError) as error:
            complain(f"warning: the profile of the best trial was not written: {error}")
            return None


def _direction(asked: str | None, metric: str) -> Direction:
    """The direction that was asked for, or that of the metric. Raises ConfigError."""
    if asked is None:
        return "minimize" if metric in LOWER_IS_BETTER else "maximize"
    if asked in DIRECTIONS:
        return "minimize" if asked == "minimize" else "maximize"
    hint = did_you_mean(asked, DIRECTIONS) or f"one of {', '.join(DIRECTIONS)}"
    raise ConfigError(f"there is no {asked!r}", "--direction", hint=hint)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name) or "unnamed"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-tune``."""
    if args is not None:
        sys.argv[1:] = cast(list[str], list(args))  # workers are started with the same words
    sys.exit(run_command(app, "apt-tune", args))
