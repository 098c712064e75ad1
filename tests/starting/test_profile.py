"""``apt-new profile``: a profile for a budget, from what was measured here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from apt_core.cli.new import app
from apt_core.kernel import boot
from apt_core.starting import measuring, profile
from apt_core.starting.budget import Budget
from apt_core.starting.measuring import Estimated, Tried
from apt_core.starting.sizes import SIZES, batch_of, length_of

if TYPE_CHECKING:
    from tests.cli.conftest import Command

TEXT = "\n\n".join(f"Line {n} of a text: {n} and 1 are {n + 1}." for n in range(4000))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 100 GFLOP/s, on which a model takes 32 bytes a parameter."""

    def estimated(draft: dict[str, dict[str, int]], tokens_per_step: int) -> Estimated:
        model = draft["model"]
        params = 12 * model["num_layers"] * model["d_model"] ** 2
        threads = draft["hardware"].get("num_threads", 0)
        return Estimated(params, 6 * params / 1e11, 32 * params + 2**28, threads)

    def tried(draft: dict[str, dict[str, int]]) -> Tried:
        tokens = draft["training"]["batch_size"] * draft["model"]["max_seq_len"]
        step = estimated(draft, tokens).seconds_per_token * tokens
        return Tried(step, step, step, 2**28, draft["hardware"].get("num_threads", 0))

    monkeypatch.setattr(profile, "estimated", estimated)
    monkeypatch.setattr(profile, "tried", tried)
    monkeypatch.setattr(profile, "waiting_programs", lambda: 0.0)


@pytest.fixture
def texts(folder: Path) -> str:
    (folder / "ein Tëxt").mkdir()
    for n in range(6):
        (folder / "ein Tëxt" / f"größe {n}.txt").write_text(TEXT, encoding="utf-8")
    return "ein Tëxt"


def test_the_plan_keeps_to_the_budget(
    command: Command, texts: str, measured: None, folder: Path
) -> None:
    outcome = command(
        app, "profile", "--data", texts, "--minutes", "10", "--memory", "4GiB", "--device", "cpu",
        "--cores", "1", prog="apt-new",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    text = (folder / "ein Tëxt.yaml").read_text(encoding="utf-8")
    config = boot("ein Tëxt.yaml").config
    assert config.name == "ein Tëxt" and config.training.max_seconds == 870
    per_step = config.training.batch_size * config.seq_len
    assert config.training.max_steps is not None
    params = 12 * config.model.num_layers * config.model.d_model**2
    tokens = config.training.max_steps * per_step
    assert tokens >= 4 * params
    seconds = tokens * 6 * params / 1e11
    assert 5 * 60 <= seconds <= 10 * 60 or "used up" in text  # or all passes are done
    assert "# Planned: " in text and "minutes" in outcome.out
    assert yaml.safe_load(text)["data"]["train_path"] == str(folder / texts)


@pytest.mark.parametrize(
    ("tokens", "seconds", "memory", "least", "most"),
    [
        (50_000_000, 600, 2**40, 5, 10),  # time decides
        (50_000_000, 60, 2**40, 0.5, 1),
        (50_000_000, 60_000, 2**29, 500, 1000),  # memory decides the size, time the steps
        (20_000, 600, 2**40, 0, 1),  # the passes do
    ],
)
def test_time_data_and_memory_bound_it(
    measured: None, tokens: int, seconds: float, memory: int, least: float, most: float
) -> None:
    budget = Budget(["x"], seconds, memory, "cpu", 1)
    data = profile.Data("some", tokens, tokens // 10, exact=True)
    choice = profile._Choice(budget, data, memory, lambda text: None)
    planned = choice.planned("x", *choice.size())
    assert least <= planned.seconds / 60 <= most
    assert planned.tokens <= budget.passes * tokens + 2**19
    assert planned.memory <= memory
    assert planned.tokens >= 4 * planned.params
    if tokens == 20_000:
        assert any("used up" in note for note in planned.notes)
    larger = profile._Choice(budget, profile.Data("", 10 * tokens, 0, True), memory, print)
    assert SIZES.index(larger.size()[0]) >= SIZES.index(choice.size()[0])


def test_too_little_memory_names_what_is_needed(measured: None) -> None:
    data = profile.Data("some", 10**6, 0, exact=True)
    choice = profile._Choice(Budget(["x"], 60, 1, "cpu", 1), data, 2**20, lambda text: None)
    with pytest.raises(profile.ConfigError, match="the smallest model takes 256 MiB"):
        choice.size()


def test_large_data_is_trained_on_while_it_is_built(measured: None) -> None:
    data = profile.Data("much", 10**10, 10**6, exact=False, build_seconds=900)
    choice = profile._Choice(Budget(["x"], 600, None, "cpu", 1), data, 2**34, lambda text: None)
    planned = choice.planned("x", *choice.size())
    written = yaml.safe_load(planned.text)
    assert written["data"]["begin_early"] is True and "max_epochs" not in written["training"]
    assert 5 <= planned.seconds / 60 <= 10


@pytest.mark.parametrize(
    ("tokens", "length"), [(10**9, 2048), (20_000, 256), (2_000, 16), (10, 16), (0, 16)]
)
def test_little_text_has_short_sequences(tokens: int, length: int) -> None:
    assert length_of(SIZES[-1], tokens) == length
    assert batch_of(length, 10 * tokens) >= 1


def test_the_busier_the_machine_the_smaller_the_share_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "waiting_programs", lambda: 0.0)
    assert measuring._share_of_own(10.0, 1.0, 1) == 1.0
    monkeypatch.setattr(measuring, "waiting_programs", lambda: 5.0)
    assert measuring._share_of_own(10.0, 1.0, 1) == pytest.approx(0.1)
    assert measuring._share_of_own(10.0, 10.0, 2) == pytest.approx(0.5)
    assert measuring._share_of_own(10.0, 1.0, 0) == 1.0  # on a GPU


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--data, --minutes are missing (give --data FOLDER --minutes 10"),
        (["--data", "x"], "--minutes is missing"),
        (["--data", "gone", "--minutes", "1"], "gone"),
        (["--data", "empty", "--minutes", "1"], "empty"),
        (["--data", "pictures", "--minutes", "1"], ".png"),
        (["--data", "t.txt", "--minutes", "soon"], "'soon' is no length of time"),
        (["--data", "t.txt", "--minutes", "0.1"], "is not between 15 seconds and a year"),
        (["--data", "t.txt", "--minutes", "1", "--memory", "lots"], "no amount of memory"),
        (["--data", "t.txt", "--minutes", "1", "--cores", "100000"], "100000 cores are asked for"),
        (["--data", "t.txt", "--minutes", "1", "--device", "gpu"], "did you mean cuda"),
        (["--data", "t.txt", "--minutes", "1", "-o", "there.yaml"], "--force replaces it"),
        (["--data", "t.txt", "--minutes", "1", "-o", "/proc/x/y.yaml"], "cannot be written"),
        (["--data", "void.txt", "--minutes", "1"], "void.txt"),
    ],
)
def test_what_no_profile_can_be_made_of_is_bad_input(
    command: Command, folder: Path, measured: None, options: list[str], says: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG")
    (folder / "t.txt").write_text(TEXT)
    (folder / "void.txt").touch()
    (folder / "there.yaml").write_text("mine")
    before = sorted(folder.iterdir())
    outcome = command(app, "profile", *options, prog="apt-new")
    assert outcome.code == 2 and says in outcome.err, outcome.err
    assert sorted(folder.iterdir()) == before and (folder / "there.yaml").read_text() == "mine"


def test_pairs_of_prompt_and_response_are_data_too(
    command: Command, folder: Path, measured: None
) -> None:
    rows = [f'{{"prompt": "{n} + 1?", "response": "{n + 1}"}}\n' for n in range(500)]
    (folder / "pairs.jsonl").write_text("".join(rows))
    options = ["--data", "pairs.jsonl", "--minutes", "1", "--device", "cpu"]
    assert command(app, "profile", *options, prog="apt-new").code == 0
    assert boot("pairs.yaml").config.data.train_path == str(folder / "pairs.jsonl")


def test_a_short_training_is_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TRIAL_SECONDS", 0.05)
    (folder / "t.txt").write_text(TEXT)
    data = {"train_path": str(folder / "t.txt")}
    model = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "max_seq_len": 16}
    draft = {
        "model": model, "training": {"batch_size": 2}, "data": data,
        "hardware": {"device": "cpu", "num_threads": 1},
    }  # fmt: skip
    guess, trial = measuring.estimated(draft, 32), measuring.tried(draft)
    assert guess.params > 1000 and guess.seconds_per_token > 0 and guess.memory > 2**20
    assert trial.step_seconds > 0 and trial.memory > 2**20 and trial.threads == 1
    assert [path.name for path in folder.iterdir()] == ["t.txt"]
