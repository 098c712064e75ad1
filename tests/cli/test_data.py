"""``apt-data``: it builds what a run opens, and shows what is in it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from apt_core.cli.build_progress import BuildProgress
from apt_core.cli.data import app
from apt_core.providers import DatasetProvider

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome

pytest.importorskip("torch", reason="what apt-data shows is made with torch")

WEIRD = "\u202e\x1b[2J\x07 é中\u2066"

PROSE = {
    "data.train_path": "prose.txt",
    "data.val_fraction": "0.2",
}
PAIRS = {
    "data.loader": "jsonl",
    "data.train_path": "pairs.jsonl",
    "data.deduplicate": "exact",
    "data.max_length": "64",
}
MIXTURE = """\
extends: tiny_debug
name: mixture
data:
  max_length: 64
  mixture:
    - {name: prose, train_path: prose.txt, weight: 3}
    - {name: pairs, loader: jsonl, train_path: pairs.jsonl, weight: 1}
schedules:
  enable_pairs_at_step: 5
"""
PLUGIN = """\
from apt_core import ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider, TokenizerProvider


class Numbers(DatasetProvider):
    name = "numbers"

    def documents(self):
        for number in range(100):
            print("printed by the source")
            yield f"{number} and 1 are {number + 1}"


class Bytes(TokenizerProvider):
    name = "bytes"
    vocab_size = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Known(Bytes):
    def fingerprint(self):
        return "bytes"


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec("dataset", "numbers", "numbers_data:Numbers"),
        ProviderSpec("tokenizer", "bytes", "numbers_data:Bytes"),
        ProviderSpec("tokenizer", "known", "numbers_data:Known"),
    ]
"""


@pytest.fixture(autouse=True)
def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE", str(folder / "cache"))
    monkeypatch.syspath_prepend(str(folder))
    paragraphs = [f"Paragraph {n} of the prose: {'word ' * (n % 7)}" for n in range(60)]
    (folder / "prose.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    rows = [{"prompt": f"{n} + {n} =", "response": f"{2 * n}{WEIRD}"} for n in range(40)]
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in [*rows, *rows[:3], {"prompt": "", "response": " "}]:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "mixture.yaml").write_text(MIXTURE)
    (folder / "numbers_data.py").write_text(PLUGIN)


@pytest.fixture
def data(command: Command) -> Callable[..., Outcome]:
    """``data("stats", PAIRS, "--json")`` of the smallest profile with these keys."""

    def call(verb: str, keys: dict[str, str] | str, *arguments: str) -> Outcome:
        words = ["-p", keys] if isinstance(keys, str) else ["-p", "tiny_debug"]
        for key, value in {} if isinstance(keys, str) else keys.items():
            words += [f"--{key}", value]
        return command(app, verb, *words, *arguments, prog="apt-data")

    return call


def rows_of(outcome: Outcome) -> Any:
    """What a command answered with --json, whatever its log on stderr says."""
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_build_makes_stores_once_and_says_what_they_hold(data: Callable[..., Outcome]) -> None:
    words = ["--plugin", "numbers_data.py", "--data.tokenizer_name"]
    (row,) = rows_of(data("build", PAIRS, *words, "known", "--json", "--workers", "1"))
    assert row["name"] is None and row["built"] and row["seconds"] > 0 and row["kept"]
    assert row["train"]["documents"] + row["val"]["documents"] == 40
    assert row["counts"]["duplicates"] == 3 and row["counts"]["empty"] == 1
    assert Path(row["folder"]).parent.name == "stores" and Path(row["folder"]).is_dir()
    printed = data("build", PAIRS, *words, "known")
    assert f"{row['train']['tokens']:,} tokens" in printed.out and row["folder"] in printed.out
    assert "was there already" in printed.out and "1 empty, 3 exact duplicates" in printed.out
    (again,) = rows_of(data("build", PAIRS, *words, "known", "--json"))
    assert again == {**row, "built": False, "seconds": 0.0}
    printed = data("build", PAIRS, *words, "bytes")
    assert "not kept: the tokenizer has no fingerprint" in printed.out
    # The same content under another name: the store is shared, and is not said to be of the first.
    Path("pairs.jsonl").rename("renamed.jsonl")
    renamed = data("build", {**PAIRS, "data.train_path": "renamed.jsonl"}, *words, "known")
    assert "was there already" in renamed.out and row["folder"] in renamed.out
    assert "renamed.jsonl (" in renamed.out and "pairs.jsonl" not in renamed.out
    Path("renamed.jsonl").rename("pairs.jsonl")
    rows = rows_of(data("build", "mixture.yaml", "--json"))
    assert [row["name"] for row in rows] == ["prose", "pairs"]


def test_inspect_shows_windows_as_the_model_sees_them(data: Callable[..., Outcome]) -> None:
    views = rows_of(data("inspect", PAIRS, "--json", "--window", "0", "--count", "1000"))
    assert len(views) == views[0]["windows"]
    seen = {}
    for view in views:
        assert (view["part"], view["source"], view["step"]) == ("train", None, None)
        for document in view["documents"]:
            learned, rest = ("".join(p.get("text", "") for p in document["pieces"]
                             if p["learned"] is wanted) for wanted in (True, False))  # fmt: skip
            seen[document["where"]] = rest, learned
    # Lines of the file count from 1, and of repeated ones the first stays.
    lines = Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    for where, (rest, learned) in seen.items():
        row = json.loads(lines[int(where.rpartition(":")[2]) - 1])
        assert (rest, learned) == (row["prompt"] + "\n", row["response"])
    assert len(seen) == sum(len(view["documents"]) for view in views) > 30


def test_what_inspect_prints_is_obeyed_by_no_terminal(
    data: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = data("inspect", PAIRS, "--step", "2", "--count", "2")
    assert plain.code == 0 and plain.out.count("in step 2: 64 positions") == 2
    assert "| ⟦" in plain.out and "(pairs.jsonl:" in plain.out
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = data("inspect", PAIRS, "--step", "2", "--count", "2")
    assert "⟦" not in coloured.out and "\x1b[32m" in coloured.out
    for outcome in (plain, coloured):
        assert "\\u202e\\x1b[2J\\x07 é中\\u2066" in outcome.out
        assert not {*"\u202e\x07\u2066"} & {*outcome.out} and "\x1b[2J" not in outcome.out


def test_names_of_files_are_shown_as_what_they_are(
    data: Callable[..., Outcome], folder: Path
) -> None:
    (folder / "a\x1b[2J\u202e\n.txt").write_text("words " * 100)
    keys = {"data.train_path": "a*.txt"}
    for words in (["inspect"], ["stats"], ["build"]):
        outcome = data(*words, keys)
        assert outcome.code == 0 and "a\\x1b[2J\\u202e\\n.txt" in outcome.out
        assert "\x1b" not in outcome.out and "\u202e" not in outcome.out


def test_a_terminal_is_shown_how_far_a_build_is() -> None:
    class Half(DatasetProvider):
        def documents(self) -> Iterator[str]:
            return iter(())

        def share_read(self) -> float | None:
            return 0.5

    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    with BuildProgress(console) as progress:
        progress.of_source("prose", Half())(1234, 56789, 2_000_000)
        progress.of_source("there already", Half())
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())
    assert re.search(r"prose .* 1,234 documents, 56,789 tokens [\d.]+ MB/s -?[\d:-]+", shown)
    assert "there already" not in shown
    assert [build.built for build in progress.builds.values()] == [True, False]


def test_inspect_finds_windows_by_step_part_and_source(data: Callable[..., Outcome]) -> None:
    (view,) = rows_of(data("inspect", PROSE, "--json", "--part", "val"))
    assert view["part"] == "val" and view["window"] == 0
    assert view["documents"][0]["where"].startswith("prose.txt")
    early = rows_of(data("inspect", "mixture.yaml", "--json", "--step", "2", "--count", "9"))
    assert {view["source"] for view in early} == {"prose"} and len(early) == 2
    both = rows_of(data("inspect", "mixture.yaml", "--json", "--step", "6", "--nproc", "4",
                        "--count", "9", "--origins", "0"))  # fmt: skip
    assert {view["source"] for view in both} == {"prose", "pairs"} and len(both) == 8
    assert {d["where"] for view in both for d in view["documents"]} == {None}
    words = ["--source", "pairs", "--window", "1", "--json"]
    (view,) = rows_of(data("inspect", "mixture.yaml", *words))
    assert (view["source"], view["window"]) == ("pairs", 1)


def test_a_source_of_a_plugin_is_shown_and_what_it_prints_is_kept_apart(
    data: Callable[..., Outcome],
) -> None:
    keys = {"data.loader": "numbers", "data.packing": "pad", "data.max_length": "32"}
    words = ["--plugin", "numbers_data.py"]
    (view,) = rows_of(data("inspect", keys, *words, "--json", "--window", "3"))
    (document,) = view["documents"]
    number = int(document["where"].rpartition(" ")[2]) - 1
    text = "".join(piece.get("text", "") for piece in document["pieces"])
    assert text == f"{number} and 1 are {number + 1}"
    outcome = data("stats", keys, *words)
    assert outcome.code == 0 and "printed by the source" not in outcome.out


def test_stats_are_those_of_the_data(data: Callable[..., Outcome], folder: Path) -> None:
    figures = rows_of(data("stats", PAIRS, "--json", "--plot", "lengths.png"))
    (source,) = figures["sources"]
    train, val = source["train"], source["val"]
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert source["packing"] == "documents" and figures["mixture"] is None
    assert source["held_out"] == val["tokens"] / (val["tokens"] + train["tokens"])
    assert 0 < train["learned"] < 1 and 0 < train["padding"] < 1
    assert figures["steps_per_epoch"] == -(-train["windows"] // figures["windows_per_step"])
    assert sum(count for *_, count in train["lengths"]["histogram"]) == train["documents"]
    printed = data("stats", PAIRS)
    assert printed.code == 0
    for text in ("exact duplicates", "fertility: 1 bytes a token", "packing: documents", "███"):
        assert text in printed.out
    if source["fertility"]["tokens_per_word"]:
        assert f"{source['fertility']['tokens_per_word']:.3g} tokens a word" in printed.out


def test_stats_tell_the_weights_of_a_mixture(data: Callable[..., Outcome]) -> None:
    mixture = rows_of(data("stats", "mixture.yaml", "--json"))["mixture"]
    first, second, *_ = mixture["steps"]
    assert (first["step"], first["weights"]) == (1, {"prose": 1.0, "pairs": 0.0})
    assert (second["step"], second["weights"]) == (5, {"prose": 0.75, "pairs": 0.25})
    assert set(mixture["at_end"]) == {"prose", "pairs"}
    asked = rows_of(data("stats", "mixture.yaml", "--json", "--at", "4", "--at", "7"))["mixture"]
    assert [row["step"] for row in asked["steps"]] == [4, 7]
    printed = data("stats", "mixture.yaml")
    assert "75.0%" in printed.out and "epochs at the end of the run: prose" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "no profile was given (apt-data build --profile tiny_debug)"),
        (["build", "-p", "tiny_debug", "--engine", "rya"], "there is no engine 'rya'"),
        (["build", "-p", "tiny_debug", "--address", "auto"], "--address goes with --engine ray"),
        (["build", "-p", "tiny_debug", "--data.train_pth", "x"], "data.train_pth"),
        (["build", "-p", "tiny_debug", "--stric"], "there is no option --stric"),
        (["build", "-p", "tiny_debug", "--data.train_path", "none.txt"], "none.txt"),
        (["inspect", "-p", "tiny_debug", "--part", "vla"], "no part 'vla' (did you mean 'val'?)"),
        (["inspect", "-p", "tiny_debug", "--step", "1", "--window", "1"], "exclude each other"),
        (["inspect", "-p", "tiny_debug", "--window", "99999"], "numbered 0 to"),
        (["inspect", "-p", "tiny_debug", "--step", "99999"], "there is no step 99,999"),
        (["inspect", "-p", "tiny_debug", "--source", "x"], "the profile has no data.mixture"),
        (["inspect", "-p", "mixture.yaml", "--source", "pair"], "did you mean 'pairs'?"),
        (["stats", "-p", "tiny_debug", "--plot", "x.nonsense"], "--plot x.nonsense"),
        (["stats", "-p", "tiny_debug", "--plot", "no/where.png"], "No such file or directory"),
    ],
)
def test_bad_input_is_one_error(command: Command, arguments: list[str], message: str) -> None:
    outcome = command(app, *arguments, prog="apt-data")
    assert outcome.code == 2 and outcome.out == ""
    error = outcome.err[outcome.err.index("error: ") :]
    assert message in error and "Traceback" not in error


def test_a_picture_needs_matplotlib(
    data: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_core.cli.data.find_spec", lambda name: None)
    outcome = data("stats", PAIRS, "--plot", "x.png")
    assert (outcome.code, outcome.out) == (2, "")
    hint = "--plot needs matplotlib, which is not installed (pip install matplotlib)"
    assert hint in outcome.err
