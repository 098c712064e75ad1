from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_core.data.loaders import PydocDataset, TextDataset
from apt_core.data.loaders.text_default import read_text
from apt_core.data.preprocess import deduplicate_paragraphs, hold_out, paragraphs
from apt_core.errors import ConfigError, Problem


def load(path, **more):
    return TextDataset({"train_path": str(path), **more}).load()


def test_a_repeated_paragraph_is_kept_where_it_first_stands():
    text = "one\ntwo\n\n  three  \n \n\none\ntwo\n\nfour\n"
    assert deduplicate_paragraphs(text) == "one\ntwo\n\n  three\n\nfour"


@given(st.text(alphabet="ab \n"))
def test_deduplication_loses_no_paragraph_and_repeats_none(text):
    before, after = paragraphs(text), paragraphs(deduplicate_paragraphs(text))
    assert after == list(dict.fromkeys(before))


@given(st.text(alphabet="ab\n", min_size=2), st.floats(0.05, 0.95))
def test_the_held_out_part_is_the_end_and_not_smaller_than_asked(text, fraction):
    train, held_out = hold_out(text, fraction)
    assert train + held_out == text
    assert len(held_out) >= max(1, round(len(text) * fraction))


def test_the_cut_is_between_paragraphs_where_it_can_be():
    text = "\n\n".join(f"paragraph {number} of some length" for number in range(100))
    train, held_out = hold_out(text)
    assert train.endswith("\n\n")
    assert held_out.startswith("paragraph")
    assert 0.1 <= len(held_out) / len(text) < 0.15


def test_the_embedded_text_shares_no_paragraph_between_its_parts():
    data = PydocDataset().load()
    train, val = paragraphs(data.train), paragraphs(data.val)
    assert not set(train) & set(val)
    assert len(set(train)) == len(train)
    assert 0.09 < len(data.val) / (len(data.train) + len(data.val)) < 0.12
    assert len(data.train) > 200_000
    assert data.sha256[:12] in data.description
    assert PydocDataset().load() == data


def test_text_is_read_as_it_is_and_its_last_tenth_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffline\r\n中\n\n".encode() * 50)
    data = load(path)
    assert (data.train + data.val).encode() == path.read_bytes()[3:]
    assert data.sha256 != load(path, val_path=str(path)).sha256


def test_validation_text_is_a_file_of_its_own_where_given(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("val")
    data = load(tmp_path / "a.txt", val_path=str(tmp_path / "b.txt"))
    assert (data.train, data.val) == ("train", "val")
    same = load(tmp_path / "a.txt", val_path=str(tmp_path / "a.txt"))
    assert "not on unseen text" in same.description


def test_json_lines_give_text_or_prompt_and_response(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"text": "one\u2028two"}, {"prompt": "q", "response": "a", "id": 3}]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(lines, encoding="utf-8")
    assert load(path, val_path=str(path)).train == "one\u2028two\n\nq\na"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "a JSON list, not an object"),
        ('{"txt": "a"}', "neither 'text' nor 'prompt' and 'response'"),
        ('{"text": 3}', "not a string"),
        ('{"text": "\\ud800"}', r"lone surrogate (\ud800)"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:2"
    assert reason in problem.message
    assert problem.key == "data.train_path"


def test_every_bad_line_of_both_files_is_told_at_once(tmp_path):
    bad, worse = tmp_path / "bad.jsonl", tmp_path / "worse.txt"
    bad.write_text("{\n{}\n")
    worse.write_bytes(b"fine \xff")
    with pytest.raises(ConfigError) as caught:
        load(bad, val_path=str(worse))
    assert [problem.where for problem in caught.value.problems] == [
        f"{bad}:1",
        f"{bad}:2",
        str(worse),
    ]
    assert "byte 0xff at offset 5" in str(caught.value)
    assert caught.value.problems[-1].key == "data.val_path"


@pytest.mark.parametrize("name", ["absent.txt", "empty.txt", "empty.jsonl", "folder"])
def test_a_file_without_text_is_bad_input(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for empty in ("empty.txt", "empty.jsonl"):
        (tmp_path / empty).write_text("\n")
    with pytest.raises(ConfigError, match=r"cannot be read|holds no text"):
        load(tmp_path / name)
    with pytest.raises(ConfigError, match=r"data\.train_path: no text to train on"):
        TextDataset().load()


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device")):
        problems: list[Problem] = []
        assert read_text(path, "data.train_path", problems) == ""
        assert f"cannot be read: it is a {kind}, not a file" in str(problems[0])


def test_a_text_that_memory_does_not_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.txt"
    with path.open("wb") as file:
        file.truncate(1 << 43)
    problems: list[Problem] = []
    assert read_text(path, "data.train_path", problems) == ""
    assert "8796.1 GB" in str(problems[0]) and "of memory are left" in str(problems[0])


def test_lines_of_data_that_cannot_be_read_are_named_up_to_a_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 1000)
    problems: list[Problem] = []
    read_text(path, "data.train_path", problems)
    assert len(problems) == 21 and "980 more lines cannot be read" in str(problems[-1])
