"""What sources make of files: their documents, and what they say of files that are not as they
should be."""

from __future__ import annotations

import builtins
import csv
import gzip
import io
import json
import os
import re
import threading
import time
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from apt_core.data.sources import digests, reading, text_default
from apt_core.data.sources.csv import CsvTable
from apt_core.data.sources.files import find_files, is_pattern, is_url, split_suffixes
from apt_core.data.sources.jsonl import JsonLines
from apt_core.data.sources.parquet import ParquetTable
from apt_core.data.sources.pydoc import PydocDataset
from apt_core.data.sources.python_source import PythonSource
from apt_core.data.sources.text_default import TextDataset
from apt_core.errors import ConfigError
from apt_core.providers.dataset import MixtureItem
from apt_core.providers.documents import Document, Message
from tests.optional import optional

pyarrow = optional("pyarrow", 'needs pip install "apt-kernel[data]"')
zstandard = optional("zstandard", 'needs pip install "apt-kernel[data]"')
fsspec = optional("fsspec", 'needs pip install "apt-kernel[data]"')


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")


def write(path, data):
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return str(path)


def write_rows(path, *rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_table(path, **columns):
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def documents(source, path, **more):
    return list(source({"train_path": path, **more}).documents())


def texts(path, source=TextDataset, **more):
    return [document.text for document in documents(source, path, **more)]


def problems(path, source=TextDataset, **more):
    with pytest.raises(ConfigError) as caught:
        documents(source, path, **more)
    return caught.value.problems


def message(path, source=TextDataset, **more):
    found = problems(path, source, **more)
    assert len(found) == 1, found
    assert found[0].key == "data.train_path"
    return str(found[0])


def test_a_source_tells_how_much_of_its_files_has_been_read():
    """Of compressed ones too, whatever their content is; a second reading begins at 0."""
    lines = "".join(json.dumps({"text": f"{n} " * 100}) + "\n" for n in range(2000))
    paths = [write("a.jsonl", lines), write("b.jsonl.gz", gzip.compress(lines.encode()))]
    source = JsonLines({"train_path": paths, "val_path": write_rows("c.jsonl", {"text": "x"})})
    sizes = [*map(os.path.getsize, [*paths, "c.jsonl"])]
    for _ in range(2):
        assert [*source.held_out()] and source.share_read() == sizes[2] / sum(sizes)
        shares = [source.share_read() for _ in source.documents()]
        assert shares == sorted(shares) and 0 < shares[0] < 0.6
        assert shares[1000] > 2 * shares[0] and source.share_read() == 1
    assert PydocDataset({}).share_read() is None


# Text


def test_a_text_is_one_document_with_its_line_ends_and_without_a_byte_order_mark():
    write("a.txt", "\ufeffline\r\n中\n\n\u2028 end\ufeff")
    assert documents(TextDataset, "a.txt") == [
        Document(text="line\r\n中\n\n\u2028 end\ufeff", where="a.txt")
    ]


@pytest.mark.parametrize(
    ("content", "cut"),
    [
        ("x" * 40_000 + " word" + "\n" + "z" * 40_000, 40_000),
        ("x" * 40_000 + ". \n" + "y" * 5_000 + "\n" + "z" * 40_000, 45_003),
        ("x" * 40_000 + ".\r\n" + "y" * 40_000, 40_003),
        ("x" * 40_000 + "\n\n  " + "y" * 40_000, 40_000),
        ("中" * 70_000, 65_536),
        ("x" * 65_535 + "\r\n" + "y" * 9, 65_535),
    ],
    ids=["space", "line end", "CRLF", "blank line", "character", "between CR and LF"],
)
def test_a_long_text_is_cut_where_it_hurts_least(content, cut):
    write("a.txt", content)
    found = documents(TextDataset, "a.txt")
    assert [document.text for document in found] == [content[:cut], content[cut:]]
    assert [(each.begins, each.ends) for each in found] == [(True, False), (False, True)]
    lines = content[:cut].count("\n")
    assert found[1].where == (f"a.txt:{lines + 1}" if lines else "a.txt")


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_pieces_of_a_text_are_all_of_it_wherever_its_blocks_end(block, monkeypatch):
    content = "".join(f"Zeile {number}, 中文 😀\r\n\n" for number in range(50))
    monkeypatch.setattr(text_default, "MAX_CHARS", 100)
    monkeypatch.setattr(reading, "BLOCK", block)
    found = texts(write("a.txt", content))
    assert "".join(found) == content
    assert len(found) > 5 and max(map(len, found)) <= 100


def test_blank_ends_of_a_long_text_stay_with_it(monkeypatch):
    monkeypatch.setattr(text_default, "MAX_CHARS", 20)
    write("a.txt", "\n" * 25 + "word " * 9 + "\n" * 25)
    found = documents(TextDataset, "a.txt")
    assert all(each.text.strip() for each in found)
    assert [each.begins for each in found] == [True] + [False] * (len(found) - 1)
    assert [each.ends for each in found] == [False] * (len(found) - 1) + [True]
    # Only so many of them are held in memory.
    write("a.txt", "\n" * 500 + "word")
    assert max(len(each.text) for each in documents(TextDataset, "a.txt")) <= 60


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \n\r\n\t"], ids=["", "mark", "blank"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_file_without_text_is_named(name, data):
    write(name, data)
    assert message(name).startswith(f"{name}: data.train_path: holds no text")
    write("b.txt", "text")
    assert "a." in message(["b.txt", name])


def test_documents_that_are_all_empty_are_no_text():
    write_rows("a.jsonl", {"text": ""}, {"prompt": " ", "response": "\n"})
    assert "a.jsonl: data.train_path: holds no text" in message("a.jsonl")
    write_rows("a.jsonl", {"text": ""}, {"text": "x"})
    assert texts("a.jsonl") == ["", "x"]


def test_empty_files_of_a_folder_are_left_out_and_said(caplog):
    write("d/a.txt", "")
    write("d/b.txt", "text")
    assert texts("d") == ["text"]
    assert "data.train_path: 1 hold no text, such as d/a.txt" in caplog.text
    write("d/b.txt", " ")
    assert "d/a.txt: data.train_path: none of 2 files holds text" in message("d")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"abc\xffdef", "is not UTF-8: byte 0xff at offset 3 "),
        (b"a" * 3_000_000 + b"\xc3(", "is not UTF-8: byte 0xc3 at offset 3,000,000 "),
        (b"cut \xe4\xb8", "is not UTF-8: byte 0xe4 at offset 4 "),
        (b"\xef\xbb\xbfab\x80", "is not UTF-8: byte 0x80 at offset 5 "),
        (b"\xed\xa0\x80", "is not UTF-8: byte 0xed at offset 0 "),
        (b"ab\0c", "holds a NUL byte at offset 2: it is binary, or UTF-16 "),
        (b"\x7fELF\x02\x01\x00", "holds a NUL byte at offset 6"),
        ("text".encode("utf-16"), "is UTF-16, as its byte order mark says"),
        ("text".encode("utf-32"), "is UTF-32, as its byte order mark says"),
        (b"\xfe\xff\0a", "is UTF-16, as its byte order mark says"),
        (gzip.compress(b"text", mtime=0), "it looks like gzip, so that its name should end in .gz"),
        (b"PAR1\x15\x04\xff", "it looks like parquet"),
    ],
)
def test_bytes_that_are_no_text_are_told_with_their_place(data, said):
    write("a.txt", data)
    assert f"a.txt: data.train_path: {said}" in message("a.txt") or said in message("a.txt")


def test_bytes_that_are_no_text_may_be_replaced_and_are_counted():
    write("a.txt", b"a\xffb\xff\xfe" + "\ufffd".encode() + b"\0" + b"\xe4\xb8")
    source = TextDataset({"train_path": "a.txt", "errors": "replace"})
    assert [document.text for document in source.documents()] == [
        "a\ufffdb\ufffd\ufffd\ufffd\ufffd\ufffd"
    ]
    assert source.replaced == 5
    write("a.jsonl", b'{"text": "a\xff"}\n{"text": "b\xfe"}\n')
    source = TextDataset({"train_path": "a.jsonl", "errors": "replace"})
    assert [document.text for document in source.documents()] == ["a\ufffd", "b\ufffd"]
    assert source.replaced == 2
    write("a.txt", "text".encode("utf-16"))
    assert "is UTF-16" in message("a.txt", errors="replace")


# JSON lines


def test_json_lines_give_texts_prompts_with_responses_and_conversations():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "id": 1}]
    rows = [{"text": "one\u2028two", "id": 3}, {"prompt": "q", "response": "a", "text": None}]
    write("a.jsonl", "")
    write_rows("a.jsonl", *rows, {"messages": turns})
    with open("a.jsonl", "ab") as file:
        file.write(b'\r\n\n{"text": "no line feed, \\u0000 in an escape"}')
    assert documents(JsonLines, "a.jsonl") == [
        Document(text="one\u2028two", where="a.jsonl:1"),
        Document(prompt="q", response="a", where="a.jsonl:2"),
        Document(messages=(Message("system", "s"), Message("user", "u")), where="a.jsonl:3"),
        Document(text="no line feed, \0 in an escape", where="a.jsonl:6"),
    ]
    assert documents(TextDataset, "a.jsonl") == documents(JsonLines, "a.jsonl")


def test_columns_name_the_fields_of_records():
    names = {"text": "content", "prompt": "q", "response": "a", "messages": "chat", "key": "id"}
    write_rows("a.jsonl", {"content": "x", "id": 7}, {"q": "1", "a": "2"}, {"chat": [], "q": "1"})
    with pytest.raises(ConfigError, match=r"a.jsonl:3: .*'chat' is empty"):
        documents(JsonLines, "a.jsonl", columns=names)
    write_rows("a.jsonl", {"content": "x", "id": 7, "key": "no"}, {"q": "1", "a": "2"})
    found = documents(JsonLines, "a.jsonl", columns=names)
    assert [(document.parts, document.key) for document in found] == [
        (("x",), "7"),
        (("1", "2"), None),
    ]
    write_rows("a.jsonl", {"content": 3, "id": 7})
    with pytest.raises(ConfigError, match=r"a.jsonl:1: .*: 'content' is an int, not a string"):
        documents(JsonLines, "a.jsonl", columns=names)
    write_rows("a.jsonl", {"content": "x", "idd": 7})
    missing = "has no 'id', which data.columns.key names: did you mean 'idd'"
    with pytest.raises(ConfigError, match=f"a.jsonl: data.train_path: {missing}"):
        documents(JsonLines, "a.jsonl", columns=names)
    write("a.csv", "content,idd\nx,7\n")
    with pytest.raises(ConfigError, match=f"a.csv:1: data.train_path: {missing}"):
        documents(CsvTable, "a.csv", columns=names)
    write_rows("a.jsonl", {"txet": "x", "b": None})
    assert message("a.jsonl").startswith(
        "a.jsonl:1: data.train_path: has no 'text', no 'prompt' with 'response', and no "
        "'messages'; it has 'txet', 'b' (null): did you mean 'text'? (data.columns says"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense", "is not JSON: Expecting value at column 1"),
        (b'{"text": "a"', "is not JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "a"} {}', "is not JSON: Extra data"),
        (b'["text"]', "holds a JSON list, not an object"),
        (b"3", "holds a JSON number, not an object"),
        (b"{}", "it has nothing"),
        (b'{"text": 3}', "'text' is an int, not a string"),
        (b'{"text": ["a"]}', "'text' is a list, not a string"),
        (b'{"text": null}', "it has 'text' (null)"),
        (b'{"prompt": "q"}', "it has 'prompt'"),
        (b'{"prompt": "q", "response": 1}', "'response' is an int, not a string"),
        (b'{"text": "a", "text": "b"}', "has 'text' twice"),
        (b'{"text": "a", "more": {"x": 1, "x": 2}}', "has 'x' twice"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "a\xff"}', "is not UTF-8: byte 0xff at offset 28"),
        (b'{"text": "a\0"}', "holds a NUL byte at offset 28"),
        (b'{"text": ' + b"[" * 100_000, "is nested too deep"),
        (b'{"text": "a", "n": ' + b"9" * 9999 + b"}", "holds a number of more than 1,000 digits"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "digits"),
        (b'{"messages": []}', "'messages' is empty"),
        (b'{"messages": "hello"}', "'messages' is a str, not a list"),
        (b'{"messages": [{"role": "user"}]}', "message 1 has no 'role' and 'content'"),
        (b'{"messages": [{"role": "asistant", "content": ""}]}', "did you mean 'assistant'"),
        (b'{"messages": [{"role": 3, "content": ""}]}', "unknown role 3"),
        (b'{"messages": [{"role": "user", "content": null}]}', "message 1 is a NoneType"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[:30].decode("latin-1"),
)
def test_a_line_that_is_no_record_is_told_with_its_number(line, said):
    write("a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    told = message("a.jsonl")
    assert told.startswith("a.jsonl:2: data.train_path: ") and said in told


def test_twenty_bad_lines_are_named_and_the_others_counted():
    write("a.jsonl", "bad\n" * 25 + '{"text": "x"}\n')
    found = problems("a.jsonl")
    assert [problem.where for problem in found[:20]] == [f"a.jsonl:{n}" for n in range(1, 21)]
    assert str(found[20]) == "a.jsonl: data.train_path: 5 more lines cannot be read"
    write("a.jsonl", "bad\n" * 5_000)
    assert "at least 980 more lines" in str(problems("a.jsonl")[20])


def test_a_line_without_end_takes_no_memory(monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 1 << 20)
    with open("a.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": 3}\n')
    tracemalloc.start()
    found = problems("a.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert [str(problem).split(" (")[0] for problem in found] == [
        "a.jsonl:1: data.train_path: is longer than 1 MiB",
        "a.jsonl:2: data.train_path: 'text' is an int, not a string",
    ]


# Tables


def test_a_csv_gives_a_document_a_row():
    write("a.csv", '\ufeffid,text\r\n1,"one, ""two""\r\nthree"\r\n\r\n2,\r\n')
    assert documents(CsvTable, "a.csv") == [
        Document(text='one, "two"\r\nthree', where="a.csv:2"),
        Document(text="", where="a.csv:5"),
    ]
    write("a.tsv", "response\tprompt\na\tq, q\n")
    assert documents(TextDataset, "a.tsv") == [
        Document(prompt="q, q", response="a", where="a.tsv:2")
    ]
    with open("c.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["messages", "text"])
        table.writerow([json.dumps([{"role": "user", "content": "hi"}]), ""])
        table.writerow(["", "t" * 200_000])
    chat, text = documents(TextDataset, "c.csv")
    assert chat.messages == (Message("user", "hi"),) and len(text.text) == 200_000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("id,txt\n1,a\n", "a.csv:1: data.train_path: has no 'text'"),
        ("text,id\na,1\nb\n", "a.csv:3: data.train_path: has 1 cells, the first row 2"),
        ("text,text\na,b\n", "a.csv:1: data.train_path: has the column 'text' twice"),
        ('text\n"open\n', "a.csv:2: data.train_path: is no CSV: unexpected end of data in the row"),
        ('text\n"a"b\n', "a.csv:2: data.train_path: is no CSV"),
        ("messages\n[{}]\n", "a.csv:2: data.train_path: message 1 has no 'role' and 'content'"),
        (b"text\n\xff\n", "a.csv:2: data.train_path: is not UTF-8: byte 0xff at offset 5"),
    ],
)
def test_a_csv_that_is_none_is_told_with_its_line(data, said):
    write("a.csv", data)
    assert said in message("a.csv")


def test_rows_of_csv_have_the_numbers_of_their_first_lines_beside_bad_ones():
    write("a.csv", b'text\n"a\nb"\n\xff\n\n"c\n\n"\nd,e\nf\n')
    found = [problem.where for problem in problems("a.csv")]
    assert found == ["a.csv:4", "a.csv:9"]


def test_parquet_gives_a_document_a_row(monkeypatch):
    write_table("a.parquet", id=list(range(5_000)), text=[f"text {n}" for n in range(5_000)])
    found = documents(ParquetTable, "a.parquet")
    assert [document.text for document in found] == [f"text {n}" for n in range(5_000)]
    assert found[4_999].where == "a.parquet:5000"
    write_table("b.parquet", prompt=["q", None], response=["a", "b"], text=[None, "t"])
    assert [document.parts for document in documents(TextDataset, "b.parquet")] == [
        ("q", "a"),
        ("t",),
    ]
    turns = [{"role": "user", "content": "hi"}]
    write_table("c.parquet", messages=[turns], text=["not read"])
    assert documents(TextDataset, "c.parquet")[0].messages == (Message("user", "hi"),)
    categories = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    write_table("d.parquet", text=categories)
    assert texts("d.parquet") == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": ["a"]}, "a.parquet: data.train_path: has no 'text'"),
        ({"text": [1]}, "a.parquet:1: data.train_path: 'text' is an int, not a string"),
        ({"text": ["a", None]}, "a.parquet:2: data.train_path: has no 'text'"),
        ({"text": [b"a", b"\xff"]}, "a.parquet:2: data.train_path: is not UTF-8: byte 0xff"),
        ({"messages": [[{"role": "me", "content": ""}]]}, "a.parquet:1: data.train_path: message"),
    ],
)
def test_a_parquet_table_of_something_else_is_told_with_its_row(columns, said):
    write_table("a.parquet", **columns)
    assert said in message("a.parquet")


def test_parquet_that_is_damaged_is_told(tmp_path):
    write_table("a.parquet", text=["abc" * 1000] * 100)
    with open("a.parquet", "rb") as file:
        data = file.read()
    for bad in (b"text", data[: len(data) // 2], data[:-9] + b"\xff" * 9, b"PAR1" * 4):
        write("a.parquet", bad)
        assert "a.parquet: data.train_path: is no parquet file that can be read" in message(
            "a.parquet"
        )
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, pyarrow.array([b"a\xff"], pyarrow.binary()).buffers()
    )
    write_table("a.parquet", text=invalid)
    assert "a.parquet:1: data.train_path: is not UTF-8: byte 0xff at offset 1" in message(
        "a.parquet"
    )
    assert texts("a.parquet", errors="replace") == ["a\ufffd"]


# Compression


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, lambda data: zstandard.ZstdCompressor().compress(data)],
    ids=["gz", "zst"],
)
def test_compressed_files_are_read_as_what_they_hold(compress, request):
    suffix = ".gz" if "gz" in request.node.name else ".zst"
    write_table("a.parquet", text=["row"])
    with open("a.parquet", "rb") as file:
        table = file.read()
    for name, data, expected in [
        ("a.txt", b"text \xe4\xb8\xad\r\n", ["text 中\r\n"]),
        ("a.JSONL", b'{"text": "line"}\n', ["line"]),
        ("a.csv", b"text\ncell\n", ["cell"]),
        ("a.parquet", table, ["row"]),
    ]:
        assert texts(write(name + suffix, compress(data))) == expected
    # Frames one after the other, as parallel compressors write them; random, so that none is small.
    noise = "".join(chr(33 + (n * n) % 90) for n in range(50_000))
    parts = [noise[:20_000], noise[20_000:]]
    write("b.txt" + suffix, b"".join(compress(part.encode()) for part in parts))
    assert "".join(texts("b.txt" + suffix)) == noise
    whole = compress(os.urandom(100_000).hex().encode())
    for length in (len(whole) // 2, len(whole) - 1, 12):
        write("c.txt" + suffix, whole[:length])
        told = message("c.txt" + suffix)
        assert f"c.txt{suffix}: data.train_path: is truncated: its {suffix} stream" in told
    write("c.txt" + suffix, b"no stream of this kind")
    assert "is damaged" in message("c.txt" + suffix)
    write("c.txt" + suffix, whole[: len(whole) // 2] + b"\xff" * 64 + whole[len(whole) // 2 + 64 :])
    assert "c.txt" + suffix in message("c.txt" + suffix)
    write("c.txt" + suffix, compress(b"ok \xff"))
    assert "is not UTF-8: byte 0xff at offset 3" in message("c.txt" + suffix)
    write("c.txt" + suffix, b"")
    assert "holds no text" in message("c.txt" + suffix)


def test_a_json_file_is_a_list_of_records_or_records_one_after_the_other(monkeypatch):
    rows = [
        {"text": "ä\n] , [ {", "more": [1.5e3, -1, None, {"a": [[]]}]},
        {"prompt": 'q "', "response": "\u2028 \\"},
        {"messages": [{"role": "user", "content": "hello"}]},
    ]
    write_rows("a.jsonl", *rows)
    expected = [document.parts for document in documents(TextDataset, "a.jsonl")]
    forms = {
        "list": json.dumps(rows, ensure_ascii=False),
        "indented": "\ufeff\n " + json.dumps(rows, indent=3) + "\n\n",
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "objects": " ".join(json.dumps(row, indent=1) for row in rows),
    }
    for block in (7, 8, 1 << 20):
        monkeypatch.setattr(reading, "BLOCK", block)
        for name, text in forms.items():
            write(f"{name}.json", text)
            for source in (TextDataset, JsonLines):
                found = documents(source, f"{name}.json")
                assert [document.parts for document in found] == expected, (name, block)
            assert found[2].where == f"{name}.json: record 3"
        for text, told in {
            '[{"text": "a"},\n {"text": "b" "c"}]': "a.json:2: .*is not JSON: Expecting ',' delim",
            '[{"text": "a"}\n {"text": "b"}]': "a.json:2: .*is not JSON: Expecting ','",
            '[{"text": "a"},]': "is not JSON: Expecting value",
            '[{"text": "a"}, {"text": "b': "is not JSON: Unterminated string",
            '[{"text": "a"}\n': "a.json:2: .*the list has no end",
            '[{"text": "a"}] x': "is not JSON: Extra data",
            '{"text": "a"}]': "is not JSON: Extra data",
            "words": "is not JSON: Expecting value",
            '[3, {"text": "b"}]': "record 1 holds a JSON number, not an object",
            '{"metadata": {}, "samples": []}': "record 1 has no 'text'.*'metadata', 's",
            '[{"text": "a", "text": "b"}]': "has 'text' twice",
            "[" * 99999: "is nested too deep",
            "[]": "holds no text",
        }.items():
            write("a.json", text)
            assert re.search(told, message("a.json")), text
    # Of a folder it is not read.
    write("folder/a.txt", "text")
    write("folder/package.json", "{}")
    assert texts("folder") == ["text"]
    monkeypatch.setattr("apt_core.data.sources.jsonl.MAX_RECORD", 1 << 16)
    monkeypatch.setattr(reading, "BLOCK", 1 << 10)
    write("a.json", json.dumps([{"text": "x" * (1 << 18)}]))
    with pytest.raises(ConfigError, match="has a record of more than 0 MiB"):
        documents(TextDataset, "a.json")
    write("a.json", json.dumps([{"text": "x" * 100}] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in TextDataset({"train_path": "a.json"}).documents()) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 1 << 19
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_unpacks_to_much_more_is_read_in_bounded_memory(suffix, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 1 << 20)
    data = b"x" * (192 << 20)
    if suffix == ".gz":
        small = gzip.compress(data[: 64 << 20], 1) * 3
    else:
        small = zstandard.ZstdCompressor().compress(data)
    del data
    assert len(small) < 1 << 20
    write("a.txt" + suffix, small)
    write("a.jsonl" + suffix, small)
    tracemalloc.start()
    source = TextDataset({"train_path": "a.txt" + suffix})
    assert sum(len(each.text) for each in source.documents()) == 192 << 20
    told = message("a.jsonl" + suffix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"a.jsonl{suffix}:1: data.train_path: is longer than 1 MiB" in told
    assert peak < 100 << 20


def test_a_zst_frame_that_asks_for_too_much_memory_is_refused():
    settings = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    write("a.txt.zst", compressor.compress(b"text" * 10) + compressor.flush())
    assert "is damaged" in message("a.txt.zst") and "memory" in message("a.txt.zst")


# Paths


def test_folders_patterns_and_lists_are_read_in_a_stated_order_and_each_file_once():
    for name in ("d/b.txt", "d/a/c.md", "d/中 文.txt", "d/.hidden.txt", "d/.git/x.txt", "e.log"):
        write(name, name)
    write("d/x.bin", b"\0")
    write("d/README", "readme")
    write_rows("d/z.jsonl", {"text": "row"})
    os.symlink("..", "d/a/back")
    os.symlink("b.txt", "d/same.txt")
    os.mkfifo("d/pipe.txt")
    os.symlink("nowhere", "d/dangling.bin")
    assert texts("d") == ["d/a/c.md", "d/b.txt", "row", "d/中 文.txt"]
    assert texts(["e.log", "d/b.txt", "d"]) == [
        "e.log",
        "d/b.txt",
        "d/a/c.md",
        "row",
        "d/中 文.txt",
    ]
    assert texts("d/*.txt") == ["d/b.txt", "d/中 文.txt"]
    assert texts("d/**/*.md") == ["d/a/c.md"]
    assert texts("d/REA*") == ["readme"]
    assert texts(["file://" + os.path.abspath("e.log")]) == ["e.log"]
    assert texts("d", JsonLines) == ["row"]
    found = find_files("d", (".txt",), "data.train_path")
    assert found.skipped == {
        "hidden": 2,
        ".bin": 2,
        ".md": 1,
        ".jsonl": 1,
        "no suffix": 1,
        "no file": 1,
    }
    assert "skipped: 2 × .bin" in TextDataset({"train_path": "d"}).describe()
    write("[1].txt", "brackets")
    assert texts("[1].txt") == ["brackets"]


def test_a_name_that_is_no_utf8_is_shown_with_escapes():
    write(os.fsdecode(b"d/a\xff.txt"), b"\xff")
    assert "d/a\\udcff.txt: data.train_path: is not UTF-8" in message("d")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone.txt", "gone.txt: data.train_path: cannot be read: No such file or directory"),
        ("gone/*.txt", "gone/*.txt: data.train_path: no file matches this pattern"),
        ("empty", "empty: data.train_path: the folder has no file to read (in a folder the suffix"),
        ("other", "the folder has no file to read, but 1 × hidden, 2 × .bin (in a folder"),
        ("pipe", "pipe: data.train_path: cannot be read: it is a pipe, not a file"),
        ("/dev/zero", "/dev/zero: data.train_path: cannot be read: it is a device, not a file"),
        ("dangling", "dangling: data.train_path: cannot be read: No such file or directory"),
        ("loop", "loop: data.train_path: cannot be read: Too many levels of symbolic links"),
        ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read: File name too long"),
        ("/proc/self/mem", "/proc/self/mem: data.train_path: cannot be read: Input/output error"),
        ("nosuch://a.txt", "nosuch://a.txt: data.train_path: cannot be read: "),
        ("memory://gone.txt", "memory://gone.txt: data.train_path: is not found"),
        ("memory://gone/*.txt", "no file matches this pattern"),
    ],
)
def test_what_is_no_file_is_told(path, said):
    os.mkdir("empty")
    write("other/.a", "")
    write("other/a.bin", "")
    write("other/b.bin", "")
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    assert said in message(path)


def test_all_paths_that_lead_nowhere_are_told_at_once():
    assert len(problems(["gone.txt", "gone/*", "memory://gone"])) == 3
    with pytest.raises(ConfigError, match=r"data\.train_path: no text to train on"):
        documents(JsonLines, None)


def test_what_may_not_be_read_is_told(monkeypatch):
    write("d/a.txt", "text")
    real = os.open

    def refuse(path, *args, **more):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert message("d") == "d/a.txt: data.train_path: cannot be read: Permission denied"
    real_scan = os.scandir

    def refuse_folder(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scan(path)

    os.makedirs("d/inner")
    monkeypatch.setattr(os, "scandir", refuse_folder)
    assert "inner: data.train_path: cannot be read: Permission denied" in message("d")


@pytest.mark.parametrize("name", ["pyarrow", "zstandard", "fsspec", "adlfs"])
def test_a_package_that_is_not_installed_is_named_with_how_to_install_it(name, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **more):
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(module, *args, **more)

    write_table("a.parquet", text=["a"])
    write("a.txt.zst", zstandard.ZstdCompressor().compress(b"a"))
    path = {
        "pyarrow": "a.parquet",
        "zstandard": "a.txt.zst",
        "fsspec": "memory://a",
        "adlfs": "abfs://box/a.txt",
    }[name]
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        told = message(path)
    assert name in told and "install" in told


def test_a_file_that_changes_while_it_is_read_is_told():
    write("a.txt", "x" * 300_000)
    source = TextDataset({"train_path": "a.txt"})
    found = source.documents()
    next(found)
    write("a.txt", "y" * 400_000)
    with pytest.raises(ConfigError, match=r"a\.txt: .*has changed since the run began to read it"):
        list(found)
    source = TextDataset({"train_path": "a.txt"})
    source.fingerprint()
    os.remove("a.txt")
    write("a.txt", "z" * 400_000)
    with pytest.raises(ConfigError, match="has changed since"):
        next(source.documents())


# URLs


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_urls_of_fsspec_are_read_like_files(memory):
    memory.pipe("/corpus/b.txt", b"b")
    memory.pipe("/corpus/a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))
    memory.pipe("/corpus/x.bin", b"\0")
    memory.pipe("/corpus/.hidden.txt", b"h")
    assert texts("memory://corpus") == ["a", "b"]
    assert texts("memory://corpus/*.txt") == ["b"]
    assert texts(["memory://corpus/b.txt", "memory://corpus"]) == ["b", "a"]
    source = TextDataset({"train_path": "memory://corpus"})
    assert source.describe().startswith("memory://corpus (2 files, ")
    memory.pipe("/corpus/b.txt", b"b\xff")
    assert "memory:///corpus/b.txt: data.train_path: is not UTF-8: byte 0xff" in message(
        "memory://corpus"
    )
    with io.BytesIO() as archive:
        import zipfile

        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("in/a.txt", "zipped")
        write("a.zip", archive.getvalue())
    assert texts("zip://in/*.txt::a.zip") == ["zipped"]


def test_files_are_read_from_a_server():
    write("served/a.jsonl", '{"text": "served"}\n' * 1_000)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory="served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        assert texts(f"{base}/a.jsonl") == ["served"] * 1_000
        source = TextDataset({"train_path": f"{base}/a.jsonl"})
        assert source.fingerprint() == TextDataset({"train_path": "served/a.jsonl"}).fingerprint()
        assert f"{base}/gone.txt: data.train_path: is not found" in message(f"{base}/gone.txt")
    finally:
        server.shutdown()
        server.server_close()
    assert f"{base}/a.jsonl: data.train_path: is not found: ClientConnector" in message(
        f"{base}/a.jsonl"
    )


def test_paths_are_told_apart():
    assert [is_url(path) for path in ("s3://b/a", "zip://a::b.zip", "/a", "c:x", "a/b://c")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not is_pattern("https://host/a.txt?query=1") and is_pattern("a?.txt")
    assert split_suffixes("x/.hidden.gz") == ("", ".gz")


# Fingerprints and descriptions


def test_a_fingerprint_changes_with_the_content_and_with_how_it_is_read_alone(monkeypatch):
    def fingerprint(path="a.txt", source=TextDataset, **more):
        return source({"train_path": path, **more}).fingerprint()

    write("a.txt", "one")
    first = fingerprint()
    assert fingerprint() == first
    write("d/b.txt", "one")
    assert fingerprint("d") == first
    write("d/c.txt", "two")
    both = fingerprint("d")
    others = [
        both,
        fingerprint(["d/c.txt", "d/b.txt"]),
        fingerprint(source=JsonLines),
        fingerprint(errors="replace"),
        fingerprint(columns={"text": "body"}),
        fingerprint(val_path="a.txt"),
        fingerprint(val_path="d/c.txt"),
    ]
    write("a.txt", "two")
    others.append(fingerprint())
    os.rename("a.txt", "a.csv")
    others.append(fingerprint("a.csv"))
    assert len({first, *others}) == len(others) + 1
    # A second write within the clock's tick leaves size and time as they were.
    status = os.stat("d/b.txt")
    with open("d/b.txt", "r+b") as file:
        file.write(b"two")
    os.utime("d/b.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint("d") != both


def test_a_file_is_hashed_once(monkeypatch):
    write("d/a.txt", "one")
    write("d/b.txt", "two")
    monkeypatch.setattr(digests.time, "time", lambda: time.time_ns() / 1e9 + digests.SETTLED)
    hashed = []
    real = digests._sha256
    monkeypatch.setattr(
        digests, "_sha256", lambda file, key: hashed.append(file.where) or real(file, key)
    )

    def fingerprint():
        hashed.clear()
        return TextDataset({"train_path": "d"}).fingerprint()

    first = fingerprint()
    assert hashed == ["d/a.txt", "d/b.txt"]
    assert fingerprint() == first and hashed == []
    write("d/b.txt", "2")
    second = fingerprint()
    assert second != first and hashed == ["d/b.txt"]
    # Size and time as they were, long after.
    status = os.stat("d/a.txt")
    with open("d/a.txt", "r+b") as file:
        file.write(b"ONE")
    os.utime("d/a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat("d/a.txt").st_mtime_ns == status.st_mtime_ns
    assert fingerprint() != second and hashed == ["d/a.txt"]
    (kept,) = (digests._folder()).iterdir()
    for damage in ("{", "[]", '{"a": 3}', "\0"):
        kept.write_text(damage)
        fingerprint()
        assert hashed == ["d/a.txt", "d/b.txt"]
    monkeypatch.setenv("APT_CACHE", "/dev/null")
    assert fingerprint() != first


def test_a_source_says_what_it_reads():
    write("a.txt", "text" * 1_000)
    write("b.txt", "text")
    describe = lambda **more: TextDataset(more).describe()  # noqa: E731
    assert describe(train_path="a.txt") == "a.txt (4.0 kB)"
    assert describe(train_path=["a.txt", "b.txt"]) == "a.txt, b.txt (2 files, 4.0 kB)"
    assert (
        describe(train_path="a.txt", val_path="b.txt")
        == "a.txt (4.0 kB); validated on b.txt (4 bytes)"
    )
    assert "not on unseen text" in describe(train_path="a.txt", val_path="a.txt")
    source = TextDataset({"train_path": "a.txt", "val_path": "b.txt"})
    assert [document.text for document in source.held_out()] == ["text"]
    assert TextDataset({"train_path": "a.txt"}).held_out() is None
    item = TextDataset(MixtureItem(name="web", train_path="gone.txt"))
    item.data_key = "data.mixture[2]"
    with pytest.raises(
        ConfigError, match=r"gone.txt: data\.mixture\[2\]\.train_path: cannot be read"
    ):
        list(item.documents())


# What comes with Python


def test_the_language_reference_has_a_document_a_topic_and_repeats_no_paragraph():
    found = list(PydocDataset().documents())
    blocks = [block for document in found for block in document.text.split("\n\n")]
    assert len(found) > 50 and len(set(blocks)) == len(blocks)
    assert sum(document.num_chars for document in found) > 200_000
    assert found == list(PydocDataset().documents())
    assert found[0].where == "pydoc_data.topics:assert"
    assert PydocDataset().fingerprint() == PydocDataset().fingerprint() != None  # noqa: E711
    write("b.txt", "val")
    source = PydocDataset({"val_path": "b.txt"})
    assert source.fingerprint() != PydocDataset().fingerprint()
    assert [document.text for document in source.held_out()] == ["val"]
    assert "pydoc_data.topics of Python" in source.describe() and "b.txt" in source.describe()


def test_the_standard_library_is_code_without_tests_and_what_was_installed():
    source = PythonSource()
    found = list(source.documents())
    names = [document.where for document in found]
    assert {"lib:ast.py", "lib:json/decoder.py"} <= set(names)
    assert names == sorted(names) and len(set(names)) == len(names)
    assert not [
        name for name in names if {"test", "tests", "site-packages"} & set(name[4:].split("/"))
    ]
    assert sum(document.num_chars for document in found) > 5_000_000
    assert source.fingerprint() == PythonSource().fingerprint()
    assert f"{len(source.found('source').files):,} modules" in source.describe()
