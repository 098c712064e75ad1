"""Plans a run for a budget of time and memory, and writes its profile with what it was planned by.

The model is the largest that still sees :data:`TOKENS_PER_PARAMETER` tokens for each of its
parameters in the time (Hoffmann et al., arXiv:2203.15556), as fast as this machine trains it. Where
the data does not suffice for that, a smaller number is accepted, and the run is shorter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apt_core.data.store.local import available_cores
from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.planning.data import planned_data
from apt_core.planning.memory import gib
from apt_core.profile_paths import is_url
from apt_core.starting.budget import Budget
from apt_core.starting.measuring import (
    BUSY,
    Estimated,
    Tried,
    device_of,
    estimated,
    memory_there,
    tried,
    waiting_programs,
)
from apt_core.starting.sizes import SIZES, Size, batch_of, draft, length_of

TOKENS_PER_PARAMETER = 20
LEAST_TOKENS_PER_PARAMETER = 4
"""With so few of them, over several passes, a model is still better than a smaller one."""

START_SECONDS = 5.0
"""For imports, the model and the last checkpoint."""

MARGIN = 0.93
"""The share of the time that is planned for steps and evaluations: checkpoints, rows of metrics and
a machine that is a little slower than it was measured take the rest."""

STOPS_AFTER = 1.45
"""The run is ended, with a checkpoint, after so many times the budget: where the machine is busier
than it was when it was measured."""

EVALUATIONS, EVALUATED_STEPS = 20, 10
"""How often some held-out text is scored in the run, as much as so many steps train on."""

EVALUATION_COST = 1 / 3
"""Of a forward alone, over that of training."""

SLOW_BUILD = 0.1
"""The share of the time in which the data may be built before the run begins; one whose data takes
longer begins early."""

COMPARED = 1.5
"""Numbers of threads whose estimates differ by less are both tried."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """What the data of a run comes to: ``tokens`` to train on and to evaluate on, whether they are
    ``exact``, and the seconds in which the rest of it is built."""

    words: str
    tokens: int
    val_tokens: int
    exact: bool
    build_seconds: float = 0.0


@dataclass(frozen=True)
class Planned:
    """A profile and what it was planned by: ``seconds`` on an idle machine, ``busy_seconds`` on one
    as busy as this is, ``cpu_seconds`` of all threads."""

    text: str
    seconds: float
    busy_seconds: float
    cpu_seconds: float
    steps: int
    tokens: int
    params: int
    memory: int
    notes: list[str]


def plan_profile(budget: Budget, name: str, say: Say = lambda text: None) -> Planned:
    """The profile of a run that keeps to the budget; ``say`` is told what is being done.

    Raises ConfigError for data that cannot be read or is too little, for a device that is not there
    and for memory that suffices for no model.
    """
    budget = _resolved(budget)
    data = look_at(budget)
    say(f"data: {data.words}")
    memory = budget.memory
    if memory is None:
        memory = memory_there(
            device_of(boot(draft(budget, SIZES[0], data.tokens, 1, None), files=False))
        )
    chosen = _Choice(budget, data, memory, say)
    size, guess = chosen.size()
    return chosen.planned(name, size, guess)


def _resolved(budget: Budget) -> Budget:
    """The budget with absolute paths, and cores that are there. Raises ConfigError for more."""
    there = available_cores()
    if budget.cores is not None and not 1 <= budget.cores <= there:
        message = f"{budget.cores} cores are asked for and {there} are there"
        raise ConfigError(message, "--cores", hint="make the profile on the machine of the run")
    if not budget.data:
        raise ConfigError("names nothing", "--data", hint="a file, a folder or a pattern")
    data = [p if is_url(p) else os.path.abspath(os.path.expanduser(p)) for p in budget.data]
    return replace(budget, data=data)


def look_at(budget: Budget) -> Data:
    """Read the data as a run would, or a part of it where it is large. Raises ConfigError."""
    kernel = boot(draft(budget, SIZES[0], 2**20, 1, None))
    kernel.notices.clear()
    found, rows = planned_data(kernel)
    if not rows:
        found, rows = _of_short(budget, kernel.notices)
    told = "; ".join(row["description"] for row in rows)
    if found is not None:
        tokens, val_tokens = (
            sum(row[key] for row in rows) for key in ("train_tokens", "val_tokens")
        )
        found.close()
        words = f"{told}: {tokens:,} tokens to train on, {val_tokens:,} to evaluate on"
        return Data(words, tokens, val_tokens, exact=True)
    estimates = [row["estimated_tokens"] for row in rows]
    if any(estimate is None for estimate in estimates):
        raise ConfigError(f"the size of {told} is not known", "--data", hint="give files")
    tokens = sum(estimates)
    seconds = sum(row["build_seconds"] or 0.0 for row in rows)
    words = f"{told}: about {tokens:,} tokens, which are built in about {seconds:.0f} s"
    return Data(words, tokens, min(tokens // 10, 2_000_000), exact=False, build_seconds=seconds)


def _of_short(budget: Budget, notices: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """The data at the shortest sequences, for which little text may suffice. Raises ConfigError."""
    profile = draft(budget, SIZES[0], 0, 1, None)
    kernel = boot(profile)
    found, rows = planned_data(kernel)
    if not rows:
        why = "; ".join(notice.removeprefix("data: ") for notice in notices)
        raise ConfigError(why or "it cannot be read", "--data")
    return found, rows


class _Choice:
    """Chooses among the sizes for a budget."""

    def __init__(self, budget: Budget, data: Data, memory: int, say: Say) -> None:
        self.budget, self.data, self.memory, self.say = budget, data, memory, say
        self.threads = budget.cores or available_cores()
        self.tried_threads: list[int] = []
        self.training_seconds = budget.seconds * MARGIN - START_SECONDS
        self.training_seconds -= 0 if self.begins_early else data.build_seconds
        self.training_seconds = max(self.training_seconds, 0.5 * budget.seconds)

    @property
    def _threads(self) -> list[int]:
        """The numbers of threads to try: threads that wait for each other, and for other programs,
        may cost more than they bring."""
        return [1] if self.budget.device.startswith("cuda") else sorted({1, self.threads})

    @property
    def begins_early(self) -> bool:
        return self.data.build_seconds > SLOW_BUILD * self.budget.seconds

    @property
    def most_tokens(self) -> int:
        """The tokens of all passes."""
        return self.data.tokens * (1 if self.begins_early else self.budget.passes)

    def size(self) -> tuple[Size, Estimated]:
        """The largest model that the time, the data and the memory admit. Raises ConfigError."""
        best: tuple[Size, Estimated] | None = None
        for size in SIZES:
            guesses = self._estimates(size)
            guess = guesses[0]
            in_time = self.training_seconds / guess.seconds_per_token
            self.say(
                f"measured: d_model {size.d_model}, {size.num_layers} layers: {guess.params:,} "
                f"parameters, {1 / guess.seconds_per_token:,.0f} tokens/s, {gib(guess.memory)}"
            )
            if guess.memory > self.memory:
                if best is None:
                    message = f"the smallest model takes {gib(guess.memory)}"
                    raise ConfigError(message, "--memory", hint=f"{gib(self.memory)} are given")
                break
            enough = TOKENS_PER_PARAMETER * guess.params <= in_time
            if self.most_tokens < in_time:  # there is more time than data
                enough = LEAST_TOKENS_PER_PARAMETER * guess.params <= self.most_tokens
            if best is not None and not enough:
                break
            best = size, guess
            near = COMPARED * guess.seconds_per_token
            self.tried_threads = [g.threads for g in guesses if g.seconds_per_token < near]
            if not enough:
                break
        assert best is not None
        return best

    def _estimates(self, size: Size) -> list[Estimated]:
        """What a model of the size takes, by numbers of threads, the fastest first."""
        tokens = self.data.tokens
        length = length_of(size, tokens)
        batch = batch_of(length, self.most_tokens)
        found = [
            estimated(draft(self.budget, size, tokens, batch, threads), batch * length)
            for threads in self._threads
        ]
        return sorted(found, key=lambda each: each.seconds_per_token)

    def planned(self, name: str, size: Size, guess: Estimated) -> Planned:
        """The profile of a model of this size, after a short training of it."""
        tokens = self.data.tokens
        length = length_of(size, tokens)
        wanted = min(self.most_tokens, self.training_seconds / guess.seconds_per_token)
        batch = batch_of(length, wanted)
        trial, profile = self._tried(size, batch)
        per_step = batch * length
        share, fixed = self._evaluations(per_step)
        in_time = max(1, int((self.training_seconds / trial.step_seconds - fixed) / share))
        of_data = max(1, self.most_tokens // per_step)
        steps = min(in_time, of_data)
        computed = steps * share + fixed
        profile["training"] |= self._length(steps, per_step)
        profile["evaluation"] = {
            "eval_freq": max(1, steps // EVALUATIONS),
            "eval_batches": EVALUATED_STEPS,
            "save_best": True,
        }
        if self.begins_early:
            profile["data"]["begin_early"] = True
        planned = Planned(
            text="",
            seconds=START_SECONDS + computed * trial.step_seconds,
            busy_seconds=START_SECONDS + computed * trial.measured_seconds,
            cpu_seconds=START_SECONDS + computed * trial.cpu_seconds,
            steps=steps,
            tokens=steps * per_step,
            params=guess.params,
            memory=max(guess.memory, trial.memory),
            notes=[],
        )
        notes = self._notes(planned, in_time)
        about = self._about(planned, trial, length)
        return replace(planned, text=profile_text(name, about + notes, profile), notes=notes)

    def _tried(self, size: Size, batch: int) -> tuple[Tried, dict[str, Any]]:
        """The fastest of trials with all threads and with one, and its profile."""
        found = []
        for threads in self.tried_threads:
            profile = draft(self.budget, size, self.data.tokens, batch, threads)
            trial = tried(profile)
            of = f" with {threads} threads" if threads > 1 else " with 1 thread" * threads
            self.say(f"tried: {1 / trial.measured_seconds:,.1f} steps/s{of}")
            if not threads:
                del profile["hardware"]["num_threads"]
            found.append((trial, profile))
        return min(found, key=lambda each: each[0].step_seconds)

    def _evaluations(self, per_step: int) -> tuple[float, float]:
        """What evaluations cost, in steps: the factor on the steps for those of all held-out text
        after each pass, and how many steps those now and then and the last one take."""
        factor = 1 + self.data.val_tokens / max(1, self.data.tokens) * EVALUATION_COST
        some = EVALUATIONS * EVALUATED_STEPS + self.data.val_tokens / per_step
        return factor, some * EVALUATION_COST

    def _length(self, steps: int, per_step: int) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "max_steps": steps,
            "max_seconds": math.ceil(self.budget.seconds * STOPS_AFTER),
            "warmup_steps": max(1, min(200, steps // 20)),
            "save_freq": 0,
            "save_every_steps": max(1, steps // 4),
            "log_every_steps": max(1, min(50, steps // 20)),
        }
        if not self.begins_early:
            keys["max_epochs"] = max(1, math.ceil(steps * per_step / self.data.tokens) + 1)
        return keys

    def _about(self, planned: Planned, trial: Tried, length: int) -> list[str]:
        passes = planned.tokens / max(1, self.data.tokens)
        minutes, cpu = planned.seconds / 60, planned.cpu_seconds / 60
        return [
            f"For a budget of {self.budget.seconds / 60:g} minutes and {gib(self.memory)}, of data "
            f"{self.data.words}.",
            f"Planned: {planned.steps:,} steps, {planned.tokens:,} tokens, {passes:.2g} passes "
            f"over the data, in about {minutes:.1f} minutes ({cpu:.1f} of CPU time); it ends after "
            f"{self.budget.seconds * STOPS_AFTER / 60:.1f} in any case, with a checkpoint.",
            f"Measured: {planned.params:,} parameters on sequences of {length} tokens, "
            f"{1 / trial.step_seconds:,.1f} steps/s"
            + (f" with {trial.threads} threads" if trial.threads else "")
            + f", about "
            f"{gib(planned.memory)} of memory.",
        ]

    def _notes(self, planned: Planned, in_time: int) -> list[str]:
        notes = []
        if planned.steps < 0.6 * in_time:
            notes.append(
                f"The data is used up by {self.budget.passes} passes, before the time is: more of "
                "them, by --passes, would learn it by heart. More text would help."
            )
        if planned.tokens < LEAST_TOKENS_PER_PARAMETER * planned.params:
            notes.append("This is little text for any model: expect it to repeat what it has seen.")
        if waiting_programs() > BUSY:
            notes.append(
                "Other programs keep this machine busy. The times are those of an idle one, by the "
                f"share that was left; as busy as now it takes {planned.busy_seconds / 60:.0f} "
                "minutes, and is ended before where that is too long."
            )
        return notes


COMMENTS = {
    "d_ff": "hidden width of the feed-forward",
    "max_seq_len": "tokens that are seen at once",
    "max_steps": "what the time is enough for",
    "max_seconds": "it ends then in any case, with a checkpoint",
    "max_epochs": "not the limit: the steps are",
    "num_threads": "the fastest of those that were tried",
    "begin_early": "training begins while the data is still being built",
    "save_best": "the checkpoint with the best held-out loss is kept",
}


def profile_text(name: str, about: list[str], profile: dict[str, Any]) -> str:
    """The profile as YAML, with what it was planned by as its head."""
    lines = [f"# {line}" for text in about for line in _wrapped(text)]
    lines += [
        "#",
        "#   apt-train -p FILE",
        f"name: {_scalar(name)}",
        "version: 1.0.0",
        "plugins: []",
    ]
    for section, keys in profile.items():
        lines += ["", f"{section}:"]
        for key, value in keys.items():
            line = f"  {key}: {_scalar(value)}"
            comment = COMMENTS.get(key)
            lines.append(f"{line:<34}# {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value as YAML; JSON is a part of that."""
    return json.dumps(value, ensure_ascii=False)


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    from apt_core.printable import printable

    return wrap(printable(text, ""), 98)


def write_profile(path: Path, text: str, *, force: bool = False) -> None:
    """Write a profile. Raises ConfigError where a file is there, unless ``force`` replaces it, and
    where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError("exists already", str(path), hint="--force replaces it") from None
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {(error.strerror or str(error)).lower()}", str(path)
        ) from error
