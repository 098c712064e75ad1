"""The errors that APT raises on purpose, and how a person reads them.

Exit codes: 2 for bad input (:class:`ConfigError`), 1 for a run that failed (every other
:class:`AptError`). Anything that is not an ``AptError`` is a defect of APT or of a plugin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice


class AptError(Exception):
    """A failure with a message written for the person who started the command."""

    exit_code = 1


SHOWN_PROBLEMS = 50
"""Problems of one error that are printed; of more it is said how many there are."""

SHOWN_CHARACTERS = 2_000
"""Characters of each part of a problem that are printed."""

_COMPARED_CHARACTERS = 200
_COMPARED_WORDS = 2_000


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    ``where`` is a place that a person can open (``tiny_debug.yaml:7``, ``command line``),
    ``key`` the dotted profile key or plugin concerned, ``hint`` what to do about it.
    """

    message: str
    key: str = ""
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        message, key = shortened(self.message), shortened(self.key)
        text = f"{key}: {message}" if key else message
        if self.where:
            text = f"{shortened(self.where)}: {text}"
        return f"{text} ({shortened(self.hint)})" if self.hint else text


def shortened(text: str, length: int = SHOWN_CHARACTERS) -> str:
    """``text`` if it has at most ``length`` characters, else its beginning and how many it has."""
    if len(text) <= length:
        return text
    return f"{text[:length]}… ({len(text):,} characters)"


class ConfigError(AptError):
    """Bad input: every problem that was found, at once. A text is the message of a single one, the
    other arguments are those of its :class:`Problem`.

    >>> str(ConfigError("unknown key", key="model.d_modle"))
    'model.d_modle: unknown key'
    """

    exit_code = 2

    def __init__(
        self,
        problems: Problem | str | Iterable[Problem],
        key: str = "",
        where: str = "",
        hint: str = "",
    ) -> None:
        if isinstance(problems, str):
            problems = Problem(problems, key, where, hint)
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(dict.fromkeys(problems))
        super().__init__(str(self))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        more = len(self.problems) - len(lines)
        lines += [f"  and {more:,} more"] if more else []
        return "\n".join([f"{len(self.problems):,} problems:", *lines])


class PluginError(AptError):
    """A plugin's failure that ends the run: the plugin is ``required``, or ``--strict`` is on."""

    def __init__(self, message: str, *, plugin: str, hook: str, where: str = "") -> None:
        super().__init__(message)
        self.plugin, self.hook, self.where = plugin, hook, where


class ProviderError(AptError):
    """A provider could not be built or failed while weights train; names the plugin it is from."""


class CheckpointError(AptError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the profile."""


class TrainingError(AptError):
    """The run cannot go on: too many non-finite steps in a row, an empty data set, …"""


class DivergedError(TrainingError):
    """Weights or losses are not finite. ``way_back`` are the options of apt-train with which to go
    on from before that, beside those that the run was started with; empty where there is none."""

    def __init__(self, message: str, way_back: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.way_back = tuple(way_back)


class ProcessLostError(AptError):
    """Another process of the run has ended, or does not answer."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the run at once: the second one, or one that comes before there is anything to
    save. ``exit_code`` is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


class StopTraining(Exception):
    """Raise it in any hook to end the run cleanly, with a checkpoint; it is not a failure."""

    reason = "a plugin asked to stop"  # of a subclass that sets none

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A suggestion for a misspelt ``word``, or an empty string.

    >>> did_you_mean("d_modle", ["d_model", "d_ff"])
    "did you mean 'd_model'?"
    >>> did_you_mean("RMSNorm", ["rmsnorm", "layernorm"])
    "did you mean 'rmsnorm'?"
    """
    import difflib  # only a mistake needs it

    # The time to compare grows with the product of both.
    if len(word) > _COMPARED_CHARACTERS:
        return ""
    known = {other.casefold(): other for other in islice(candidates, _COMPARED_WORDS)}
    close = difflib.get_close_matches(word.casefold(), known, n=1, cutoff=0.6)
    return f"did you mean {known[close[0]]!r}?" if close else ""
