"""Data that cannot be trained on: apt-train says which file, line or key, ends with 2 and leaves
neither a run nor a half-made store behind."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import yaml

from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT

SHORT = ("--training.max_steps", "1", "--training.max_epochs", "1")

PLUGIN = """
from apt_core import ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider


class Nothing(DatasetProvider):
    def documents(self):
        return iter(())


class Numbers(DatasetProvider):
    def documents(self):
        yield "text"
        yield 3


class Fails(DatasetProvider):
    def documents(self):
        yield "text"
        raise KeyError("gone")


class Words(DatasetProvider):
    def documents(self):
        for number in range(400):
            yield {"text": f"the words of document {number} are these"}


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec("dataset", each.__name__.lower(), each)
        for each in (Nothing, Numbers, Fails, Words)
    ]
"""


@pytest.fixture
def train(tmp_path, monkeypatch, apt_train):
    """Call apt-train on a tiny profile with these settings of ``data``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sources.py").write_text(PLUGIN, encoding="utf-8")

    def call(*arguments, name="run", **data):
        profile = {**TINY_PROFILE, "data": data}
        Path("bad.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
        return apt_train(*SHORT, *arguments, name=name, of="bad.yaml")

    return call


def half_made() -> list[str]:
    """What is in the folder of stores but locks and whole stores."""
    stores = Path(os.environ["APT_CACHE"]) / "stores"
    found = (path for path in stores.glob("*") if path.suffix != ".lock")
    return [path.name for path in found if not (path / "store.json").is_file()]


def rows(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


GOOD = TEXT.encode()
LINES = [{"text": f"line {number} of some words"} for number in range(400)]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "a.txt: data.train_path: holds no text"),
        ("a.txt", b"\n \n", "a.txt: data.train_path: holds no text"),
        ("a.txt", b"a", "nothing can be learned from it"),
        ("a.txt", b"text of one window alone", "one optimizer step takes "),
        ("a.txt", b"\x7fELF\0\0" * 99, "a.txt: data.train_path: holds a NUL byte at offset 4: it"),
        ("a.txt", GOOD + b"\xff", f"is not UTF-8: byte 0xff at offset {len(GOOD):,} (convert"),
        ("a.txt", GOOD.decode().encode("utf-16"), "a.txt: data.train_path: is UTF-16, as its"),
        ("a.txt.gz", gzip.compress(GOOD)[:-20], "a.txt.gz: data.train_path: is truncated: its .gz"),
        ("a.jsonl", rows(*LINES) + b"{]", "a.jsonl:401: data.train_path: is not JSON: "),
        ("a.jsonl", rows(*LINES, {"body": "x"}), "a.jsonl:401: data.train_path: has no 'text'"),
        ("a.jsonl", rows(*LINES, {"text": 3}), "a.jsonl:401: data.train_path: 'text' is an int"),
        ("a.jsonl", rows({"messages": [{"role": "bot", "content": "x"}]}), "unknown role 'bot'"),
        ("a.jsonl", rows({"messages": []}), "a.jsonl:1: data.train_path: 'messages' is empty"),
        ("a.csv", b"id,body\n1,x\n", "a.csv:1: data.train_path: has no 'text'"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_named(train, name, data, said):
    Path(name).write_bytes(data)
    run = train(train_path=name)
    assert run.code == 2 and said in run.err and "Traceback" not in run.err
    assert half_made() == []
    if name == "a.jsonl":
        if data.endswith(b"{]"):
            plan = train("--dry-run", train_path=name)
            assert said in " ".join((plan.out + plan.err).split())
        # As what to evaluate on it is no better.
        Path("good.txt").write_text(TEXT, encoding="utf-8")
        run = train(train_path="good.txt", val_path=name, name="second")
        assert run.code == 2 and said.replace("train_path", "val_path") in run.err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone.txt", "data.train_path: there is no file 'gone.txt'"),
        ("no*.txt", "data.train_path: no file matches 'no*.txt'"),
        (["text.txt", "gone.txt"], "data.train_path: there is no file 'gone.txt'"),
        ("folder", "folder: data.train_path: the folder has no file to read, but 1 × .bin"),
        ("pipe", "pipe: data.train_path: cannot be read: it is a pipe, not a file"),
        ("abfs://box/a.txt", "is not installed"),
        ("memory://gone.txt", "memory://gone.txt: data.train_path: is not found"),
    ],
)
def test_a_path_that_leads_to_no_text_is_named(train, path, said):
    os.mkdir("folder")
    Path("folder/a.bin").write_bytes(b"\0")
    os.mkfifo("pipe")
    run = train(train_path=path)
    assert run.code == 2 and said in run.err and "Traceback" not in run.err
    assert half_made() == []
    if path in ("gone.txt", "folder", "memory://gone.txt"):
        plan = train("--dry-run", train_path=path)
        assert plan.code == 0 and said in plan.out


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (
            {
                "min_chars": 9,
                "mixture": [{"name": "a", "train_path": "text.txt", "val_path": "one.txt"}],
            },
            2,
            "data.mixture[0].val_path: the text to evaluate on has 0 tokens",
        ),
        ({"loader": "nothing"}, 2, "yields no document"),
        ({"loader": "numbers"}, 2, "document 2 of documents() is an int, not a document"),
        ({"loader": "fails"}, 1, "KeyError: 'gone'"),
        ({"loader": "words", "min_chars": 1000}, 2, "400 too short"),
        ({"mixture": [{"name": "a", "loader": "words", "weight": 0}]}, 2, "all weights are 0"),
        ({"mixture": [{"name": "a", "loader": "words"}, {"name": "b", "loader": "nothing"}]}, 2,
         "yields no document"),
    ],
)  # fmt: skip
def test_a_source_that_gives_nothing_to_train_on_is_named(train, data, code, said):
    Path("one.txt").write_text("a", encoding="utf-8")
    run = train("--plugin", "sources.py", **data)
    assert run.code == code and said in run.err
    assert code == 1 or "Traceback" not in run.err


def test_what_can_be_trained_on_is(train):
    """The same paths, suffixes and settings lead to runs where the data is good."""
    Path("a.txt").write_bytes(GOOD + b"\xff" + GOOD)
    run = train(train_path="a.txt", errors="replace")
    assert run.code == 0 and ", 1 replaced" in run.out, run.err
    Path("d").mkdir()
    Path("d/中 文.txt.gz").write_bytes(gzip.compress(GOOD))
    Path("d/a.jsonl").write_bytes(rows(*({"body": record["text"]} for record in LINES)))
    run = train(train_path=["d/*.gz", "d"], columns={"text": "body"}, name="second")
    assert run.code == 0, run.err
    assert "2 files" in run.manifest["data"]["description"]
    run = train("--plugin", "sources.py", loader="words", name="third")
    assert run.code == 0, run.err
