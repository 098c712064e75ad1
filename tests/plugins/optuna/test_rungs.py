"""Who goes on from a rung, and when."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from apt_plugins.optuna.rungs import Climber, bracket_of, promotable, shares, step_of


def test_rungs_are_shares_of_a_trial():
    assert shares(2, 0.3) == (0.5, 1.0) and shares(3, 1.0) == (1.0,)
    assert [step_of(share, 9) for share in shares(3, 0.1)] == [1, 3, 9]
    assert step_of(0.001, 5) == 1


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_the_best_come_to_the_end_whatever_the_order(workers, count):
    draw = random.Random(count)
    quality = [draw.random() for _ in range(count)]
    trials: dict[int, tuple[dict[int, float], str]] = {}
    running: list[int] = []
    while True:
        climbers = [
            Climber(n, 0, dict(values), trains=state == "trains", waits=state == "waits")
            for n, (values, state) in trials.items()
        ]
        going = promotable(climbers, 3, 3, all_there=len(trials) == count)
        if len(running) < workers and (going or len(trials) < count):
            number = going[0] if going else len(trials)
            trials[number] = (trials.get(number, ({}, ""))[0], "trains")
            running.append(number)
        elif running:
            number = running.pop(draw.randrange(len(running)))
            values = trials[number][0]
            values[len(values)] = quality[number]
            trials[number] = values, "waits" if len(values) < 3 else "ended"
        else:
            break
    ended = Counter(len(values) for values, _ in trials.values())
    best = quality.index(min(quality))
    assert len(trials[best][0]) == 3, "the best one is promoted everywhere"
    assert ended[3] == 1 if count < 3 else ended[1] > ended[3] >= 1


def test_few_wait_until_nobody_can_come_any_more():
    waiting = [Climber(n, 0, {0: float(n)}, waits=True) for n in range(2)]
    assert promotable(waiting, 2, 3, all_there=False) == []
    assert promotable([*waiting, Climber(2, trains=True)], 2, 3, all_there=True) == []
    assert promotable(waiting, 2, 3, all_there=True) == [0]
    own = Climber(5, 0, {0: 9.0}, waits=True, always=True)
    assert promotable([*waiting, own], 2, 4, all_there=False) == [5]


def test_brackets_are_spread_over_the_trials():
    assert Counter(bracket_of(n, 3, 3) for n in range(17)) == {0: 9, 1: 5, 2: 3}
