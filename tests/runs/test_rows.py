"""Files of rows, as a run that is killed, a full disk and a stranger leave them."""

from __future__ import annotations

import errno
import json
import os

import pytest

from apt_core.runs.rows import RowFile, read_rows

LINES = {
    "no JSON": b"not json",
    "a list": b"[1, 2]",
    "no step": b'{"loss": 1}',
    "a step as text": b'{"step": "5"}',
    "a negative step": b'{"step": -1}',
    "no whole step": b'{"step": 1e999}',
    "a bool": b'{"step": true}',
    "a step of 400 digits": b'{"step": 1' + b"0" * 400 + b"}",
    "depth": b"[" * 100_000,
    "no UTF-8": b'{"step": 1, "sample": "\xff"}',
    "too long": b'{"step": 1, "sample": "' + b"x" * 2000 + b'"}',
    "a zero byte": b"\x00",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def read(path):
    notes = []
    return list(read_rows(path, notes, 1000)), notes


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_is_no_row_costs_nothing_but_itself(path, line):
    path.write_bytes(b'{"step": 1}\n' + line + b'\n\n{"step": 2}\n')
    assert read(path) == (
        [{"step": 1}, {"step": 2}],
        ["1 lines of rows.jsonl cannot be read and are left out"],
    )


def test_a_last_row_that_was_cut_is_told_and_the_next_one_is_whole(path):
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read(path) == ([{"step": 1}], ["the last row of rows.jsonl is cut off and left out"])
    file = RowFile(path)
    file.append({"step": 3, "loss": float("nan"), "text": "naïve \ud800 \x1b\n"})
    written = path.read_bytes()
    file.close()
    assert json.loads(written.splitlines()[-1])["loss"] == "nan"
    rows, notes = read(path)
    assert rows == [{"step": 1}, {"step": 3, "loss": "nan", "text": "naïve \ud800 \x1b\n"}]
    assert notes == ["1 lines of rows.jsonl cannot be read and are left out"]


def test_rows_wait_for_room_on_the_disk(path, monkeypatch, caplog):
    file = RowFile(path)
    file.append({"step": 1})
    real = file._file.write

    class Full:
        fileno, close = file._file.fileno, file._file.close

        def write(self, data):
            if len(data) > 3:  # what the disk has room for goes onto it
                return real(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    whole, file._file = file._file, Full()
    file.append({"step": 2})
    file.append({"step": 3})
    assert caplog.text.count("rows wait for room on the disk") == 1
    file._file = whole
    file.append({"step": 4})
    file.close()
    assert read(path) == ([{"step": n} for n in (1, 2, 3, 4)], [])


def test_no_row_is_read_from_or_written_to_another_folder(path, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "secret").write_text('{"step": 1}\n')
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rows.jsonl").symlink_to(other / "secret")
    rows, notes = read(folder / "rows.jsonl")
    assert rows == []
    assert notes == ["rows.jsonl cannot be read: it is a link that leads out of its folder"]
    RowFile(folder / "rows.jsonl").append({"step": 2})
    assert (other / "secret").read_text() == '{"step": 1}\n'


def test_a_pipe_is_not_waited_for(path):
    os.mkfifo(path)
    assert read(path) == ([], ["rows.jsonl cannot be read: it is a pipe, not a file"])


def test_a_missing_file_is_told(path):
    assert read(path) == ([], ["there is no rows.jsonl"])
