"""A few inputs of each target, and the harness itself: it tells what it is there to tell."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fuzz_runs
import pytest
from fuzz_runs import fuzz, source_of
from fuzz_targets import TARGETS, Target

from apt_core.errors import ConfigError

FUZZING = Path(__file__).resolve().parent


@pytest.mark.usefixtures("forked")
@pytest.mark.long
def test_only_declared_errors_come_of_a_few_inputs_of_each_target(tmp_path: Path) -> None:
    """In a process of its own: it forks, which threads of other tests would not survive."""
    result = tmp_path / "fuzz.json"
    command = [sys.executable, str(FUZZING), "--quick", "--jobs", "1", "--json", str(result)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(result.read_text(encoding="utf-8"))
    assert [row["kind"] for row in told["rows"]] == list(TARGETS)
    for row in told["rows"]:
        assert row["tried"] >= 10 and {"accepted", "refused"} & row["outcomes"].keys()


class Ways(Target):
    """Every way in which an input may end."""

    name, share = "ways", 1

    def make(self, rng: random.Random) -> int:
        return rng.randrange(10**9)

    def feed(self, given: int) -> str:
        way = self.ways[given]
        if way == "refused":
            raise ConfigError("no")
        if way == "raises":
            raise KeyError("x")
        if way == "hangs":
            time.sleep(60)
        if way == "dies":
            os._exit(3)
        if way == "writes":
            Path("../outside").write_text("x")
        while way == "spins":
            pass
        if way == "eats":
            bytearray(fuzz_runs.MEMORY + (64 << 20))
        return "accepted"

    def __init__(self, kept: Path) -> None:
        names = ("fine", "refused", "raises", "hangs", "dies", "writes", "eats", "spins")
        self.ways = {self.make(source_of(0, self.name, n)): way for n, way in enumerate(names)}


def test_the_harness_tells_each_way_in_which_an_input_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_runs, "DEADLINE", 0.2)
    monkeypatch.setattr(fuzz_runs, "PATIENCE", 2)
    target = Ways(tmp_path)
    tally = fuzz(target, 0, range(8), tmp_path.resolve(), jobs=1)
    assert tally.outcomes == {"accepted": 1, "refused": 1, "unexpected": 6}
    errors: dict[int, Any] = {finding.number: finding.error for finding in tally.findings}
    assert errors[2] == "KeyError: 'x'" and "TooLong" in errors[3] and "died: 3" in errors[4]
    assert "outside of its folder" in errors[5] and "MemoryError" in errors[6]
    assert "TooLong" in errors[7]


def test_an_input_is_made_of_its_seed_and_number_alone(tmp_path: Path) -> None:
    for name in ("profile-text", "plugins", "data"):
        one, other = TARGETS[name](tmp_path), TARGETS[name](tmp_path)
        for number in (3, 1, 3):
            made = [target.make(source_of(5, name, number)) for target in (one, other)]
            assert made[0] == made[1]
