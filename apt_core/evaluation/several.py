"""Scores runs on tasks, one run after the other, and compares them item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core.config import Override
from apt_core.errors import ConfigError
from apt_core.evaluation.finding import find_tasks
from apt_core.evaluation.held_out import HeldOut, open_held_out
from apt_core.evaluation.metrics import Figure, difference_figure
from apt_core.evaluation.records import of_session, score_row
from apt_core.evaluation.scoring import (
    Items,
    Scoring,
    TaskScore,
    check_template,
    items_of,
    score,
)
from apt_core.evaluation.tasks.held_out import TextTask
from apt_core.files import read_file
from apt_core.profile_paths import user_path
from apt_core.providers.task import TaskProvider
from apt_core.runs.finding import run_of
from apt_core.runs.opened import Weights, open_run
from apt_core.runs.session import Session

if TYPE_CHECKING:
    from apt_core.evaluation.lm_eval_model import HarnessTasks

MAX_TEXT = 1 << 30
"""The most bytes of a text that is predicted."""


@dataclass(frozen=True)
class Asked:
    """What to score: the tasks that ``tasks`` name, and the files ``texts``, each a document;
    without any, the run's held-out documents."""

    tasks: Sequence[str] = ()
    texts: Sequence[Path] = ()
    scoring: Scoring = field(default_factory=Scoring)


@dataclass(frozen=True)
class Opening:
    """How a run is opened; see :func:`~apt_core.runs.open_run`."""

    step: int | None = None
    weights: Weights = "last"
    device: str = "auto"
    plugins: Sequence[str] = ()
    overrides: Sequence[Override] = ()


@dataclass(frozen=True, eq=False)
class RunScores:
    """The ``figures`` of the run at ``path``, by task and metric, and the rows for its
    ``scores.json`` in ``folder``; ``scores`` are those of APT's own tasks."""

    path: Path
    folder: Path
    step: int
    figures: Mapping[str, Mapping[str, Figure]]
    rows: Sequence[Mapping[str, Any]]
    scores: Mapping[str, TaskScore] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The ``figure`` of run ``other`` less that of run ``one``, both by number."""

    one: int
    other: int
    task: str
    metric: str
    figure: Figure


def score_run(
    path: Path,
    asked: Asked,
    opening: Opening,
    advance: Callable[[str, float], None] = lambda task, share: None,
) -> RunScores:
    """The scores of one run; ``advance`` is told how far each task is.

    Raises ConfigError for what is not there or does not fit, CheckpointError for a checkpoint that
    is not to be used, ProviderError for a task that fails.
    """
    session = _opened(path, asked.scoring, opening)
    found, rows = {}, []
    for items in _items(session, asked):
        result = score(session, items, asked.scoring.asking(partial(advance, items.name)))
        assert result is not None
        found[items.name] = result
        row = score_row(result, session, asked.scoring, opening.weights, opening.overrides)
        rows.append(row)
    figures = {name: each.figures for name, each in found.items()}
    return RunScores(path, _folder(path, session), session.position.step, figures, rows, found)


def score_run_by_harness(
    path: Path,
    tasks: HarnessTasks,
    scoring: Scoring,
    opening: Opening,
    advance: Callable[[str, float], None] = lambda task, share: None,
) -> RunScores:
    """The scores of one run on ``tasks`` of lm-evaluation-harness; raises as :func:`score_run`
    does."""
    session = _opened(path, scoring, opening)
    asking = scoring.asking(partial(advance, "lm-eval"))
    figures, rows = {}, []
    for name, found, more in tasks.score(session, asking, scoring.limit):
        name = f"lm_eval/{name}"
        figures[name] = found
        metrics = {metric: asdict(figure) for metric, figure in found.items()}
        of_run = of_session(session, opening.weights, opening.overrides)
        rows.append({"task": name, "metrics": metrics, **of_run, **more})
    return RunScores(path, _folder(path, session), session.position.step, figures, rows)


def _opened(path: Path, scoring: Scoring, opening: Opening) -> Session:
    session = open_run(
        path,
        opening.step,
        opening.weights,
        opening.device,
        opening.plugins,
        opening.overrides,
    )
    stride, context = scoring.stride, session.config.model.max_seq_len
    if stride is not None and stride > context:
        hint = f"give 1 to {context}"
        raise ConfigError(
            f"is {stride}, more than the context of {context} tokens", "--stride", str(path), hint
        )
    return session


def _folder(path: Path, session: Session) -> Path:
    """The folder of the run that was opened as ``path``, which may be a checkpoint of it."""
    assert session.checkpoint is not None
    is_run = (path / "manifest.json").is_file() and path != session.checkpoint
    return path if is_run else run_of(session.checkpoint)


def _items(session: Session, asked: Asked) -> list[Items]:
    """The items of all tasks, so that what is wrong is told before the first is scored."""
    names = asked.tasks or ([] if asked.texts else ["held_out"])
    tasks: dict[str, TaskProvider] = find_tasks(session, names, "--tasks")
    if asked.texts:
        if "text" in tasks:
            raise ConfigError("two tasks would be called 'text'", "--tasks", hint="rename the file")
        tasks["text"] = TextTask([*_texts(asked.texts)])
    held_out: HeldOut | None = None
    if any(task.needs_held_out for task in tasks.values()):
        held_out = open_held_out(session)
    found = [items_of(name, task, asked.scoring, held_out) for name, task in tasks.items()]
    for items in found:
        check_template(items, session.tokenizer)
    return found


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for given in paths:
        path = user_path(given)
        try:
            text = read_file(path, MAX_TEXT).decode("utf-8")
        except OSError as error:
            raise ConfigError(error.strerror or str(error), "--text", str(path)) from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"byte {error.start} is no UTF-8", "--text", str(path)) from None
        if not text:
            raise ConfigError("is empty: there is nothing to predict", "--text", str(path))
        yield text


def differences(runs: Sequence[RunScores]) -> Iterator[Difference]:
    """The differences of each run from the one before, of each metric of tasks that both have done
    on the same items."""
    for (number, one), (_, other) in pairwise(enumerate(runs)):
        for task, score_of_one in one.scores.items():
            score_of_other = other.scores.get(task)
            if score_of_other is None or not _paired(score_of_one, score_of_other):
                continue
            for metric, sums in score_of_one.found.sums.items():
                figure = difference_figure(metric, sums, score_of_other.found.sums[metric])
                yield Difference(number, number + 1, task, metric, figure)


def _paired(one: TaskScore, other: TaskScore) -> bool:
    """Whether two scores are of the same items, in the same units."""
    if one.items.sha256 != other.items.sha256 or one.found.units != other.found.units:
        return False
    sizes = [{name: len(s) for name, s in each.found.sums.items()} for each in (one, other)]
    return sizes[0] == sizes[1]
