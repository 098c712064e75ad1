"""Token stores on disk: what is written is read, wherever shards end, and nothing damaged is."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from apt_core.data.store import format as store_format
from apt_core.data.store import reader
from apt_core.data.store.format import (
    FORMAT,
    PARTS,
    DamagedStoreError,
    StoreManifest,
    check_files,
    read_manifest,
    write_manifest,
)
from apt_core.data.store.parts import ArrayPart
from apt_core.data.store.reader import TokenStore
from apt_core.data.store.writer import PartWriter
from apt_core.providers.tokenizer import Encoded


def documents(count=40, vocab_size=300, marked=True, seed=0):
    """Encoded documents of 0 to 30 tokens, of which every third has tokens that are not learned."""
    draws = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = draws.integers(0, vocab_size, draws.integers(0, 31)).astype(np.uint16)
        learned = draws.random(len(ids)) < 0.5 if marked and number % 3 == 2 else None
        found.append(Encoded(ids, learned))
    return found


def write(folder, parts, vocab_size=300, dtype="uint16", **facts):
    folder.mkdir()
    rows = {}
    for name in PARTS:
        writer = PartWriter(folder, name, dtype)
        for number, document in enumerate(parts.get(name, [])):
            writer.add(document.ids, document.learned, number, bytes([number % 256] * 32))
        rows[name] = writer.close()
    facts = {"format": FORMAT, "key": "k", "source": "s", "tokenizer": "t", **facts}
    manifest = StoreManifest(
        **facts, vocab_size=vocab_size, dtype=dtype, settings={}, counts={}, parts=rows
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store_format, "SHARD_TOKENS", 50)


@pytest.mark.parametrize("vocab_size", [256, 300, 70_000])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("max_open", "in_memory"), [(64, 0), (1, 0), (1, 2**20)])
def test_a_stored_part_answers_as_one_in_memory(
    tmp_path, vocab_size, marked, max_open, in_memory, monkeypatch
):
    monkeypatch.setattr(reader, "MAX_OPEN", max_open)
    monkeypatch.setattr(reader, "SEARCHED", 2)
    dtype = {256: "uint8", 300: "uint16", 70_000: "uint32"}[vocab_size]
    given = documents(60, min(vocab_size, 65_000), marked)
    store = TokenStore.open(write(tmp_path / "s", {"train": given}, vocab_size, dtype))
    store.hold_in_memory(in_memory)
    part = store.part("train")
    expected = ArrayPart.of(given)
    total = expected.num_tokens
    assert len(store.manifest.parts["train"].shards) > 10
    for name in ("num_tokens", "num_documents", "marked"):
        assert getattr(part, name) == getattr(expected, name)
    assert part.num_bytes == sum(range(60))
    assert part.num_learned == int(expected.marks(0, total).sum())
    assert part.dtype == np.dtype(dtype)
    starts = np.arange(0, total)
    for length in (1, 7, 120):
        assert np.array_equal(part.windows(starts, length), expected.windows(starts, length))
        rows = part.learned(starts, length)
        assert np.array_equal(rows, expected.learned(starts, length))
        for start in starts:
            marks = expected.marks(start, start + length)
            assert np.array_equal(rows[start][: len(marks)], marks)
            assert not rows[start][len(marks) :].any()
    for start, stop in [(0, total), (49, 51), (3, 3), (total - 2, total + 9), (total, total + 1)]:
        assert np.array_equal(part.read(start, stop), expected.read(start, stop))
        assert np.array_equal(part.marks(start, stop), expected.marks(start, stop))
    places, lengths = np.array([0, 48, total - 3, 48]), np.array([total, 5, 3, 60])
    for each in (part, expected):
        found = each.stretches(places, lengths)
        assert (found.learned is not None) == marked
        for start, length, begin in zip(places, lengths, found.begins, strict=True):
            here, there = slice(begin, begin + length), (start, start + length)
            assert np.array_equal(found.ids[here], expected.read(*there))
            if found.learned is not None:
                assert np.array_equal(found.learned[here], expected.marks(*there))
        assert each.stretches(places[:0], lengths[:0]).begins.tolist() == []
    for first, last in [(0, 60), (5, 40), (17, 18), (0, 0), (60, 60), (30, 30)]:
        assert np.array_equal(part.spans(first, last), expected.spans(first, last))
    assert [part.document_at(t) for t in range(total)] == [
        expected.document_at(t) for t in range(total)
    ]
    assert part.span(7) == tuple(expected.spans(7, 8).tolist())
    store.close()  # and begin again
    assert np.array_equal(part.read(0, total), expected.read(0, total))
    # The part without documents.
    val = store.part("val")
    assert (val.num_tokens, val.num_documents, val.marked) == (0, 0, False)
    assert val.read(0, 5).tolist() == val.marks(0, 5).tolist() == []
    assert val.spans(0, 0).tolist() == [0]


def test_what_is_beyond_a_part_is_refused(tmp_path):
    store = TokenStore.open(write(tmp_path / "s", {"train": documents()}))
    part = store.part("train")
    for call in (
        lambda: part.windows(np.array([-1]), 3),
        lambda: part.span(part.num_documents),
        lambda: part.spans(3, part.num_documents + 1),
        lambda: part.document_at(part.num_tokens),
        lambda: part.document_at(-1),
        lambda: store.part("val").windows(np.array([0]), 3),
    ):
        with pytest.raises(ValueError, match="part"):
            call()


def test_shards_hold_whole_documents_and_their_size_changes_no_hash(tmp_path, monkeypatch):
    given = [Encoded(np.arange(size, dtype=np.uint16)) for size in (30, 20, 1, 120, 40, 10)]
    rows = []
    for shard_tokens in (50, 10_000):
        monkeypatch.setattr(store_format, "SHARD_TOKENS", shard_tokens)
        folder = write(tmp_path / str(shard_tokens), {"train": given})
        rows.append(read_manifest(folder).parts["train"])
    assert [shard.tokens for shard in rows[0].shards] == [50, 1, 120, 50]
    assert [shard.documents for shard in rows[0].shards] == [2, 1, 1, 2]
    assert len(rows[1].shards) == 1
    for name in ("tokens_sha256", "documents_sha256", "tokens", "learned", "bytes"):
        assert getattr(rows[0], name) == getattr(rows[1], name)


def test_the_hash_of_tokens_tells_borders_and_marks(tmp_path):
    ids = np.arange(40, dtype=np.uint16)
    given = {
        "one": [Encoded(ids)],
        "two": [Encoded(ids[:20]), Encoded(ids[20:])],
        "cut elsewhere": [Encoded(ids[:24]), Encoded(ids[24:])],
        "marked": [Encoded(ids, ids > 9)],
        "marked elsewhere": [Encoded(ids, ids > 10)],
    }
    hashes = {
        name: read_manifest(write(tmp_path / name, {"train": part})).parts["train"].tokens_sha256
        for name, part in {**given, "all marked": [Encoded(ids, ids >= 0)]}.items()
    }
    assert hashes.pop("all marked") == hashes["one"]
    assert len({*hashes.values()}) == len(given)


def test_marks_are_kept_only_by_shards_with_something_that_is_not_learned(tmp_path):
    plain = Encoded(np.zeros(29, np.uint16))
    all_learned = Encoded(np.zeros(29, np.uint16), np.ones(29, bool))
    masked = Encoded(np.zeros(29, np.uint16), np.arange(29) > 3)
    given = [plain, all_learned, plain, masked, plain]
    store = TokenStore.open(write(tmp_path / "s", {"train": given}))
    part = store.part("train")
    assert [shard.marked for shard in store.manifest.parts["train"].shards] == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert part.marked and part.num_learned == 5 * 29 - 4
    assert np.flatnonzero(~part.marks(0, 145)).tolist() == [87, 88, 89, 90]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace(path, value):
    path.unlink()
    value(path)


def edit(path, change, seal=True):
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    if seal:
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def row(content):
    return content["parts"]["train"]["shards"][0]


HUGE = 2**59
DAMAGE = {
    "no manifest": ("store.json", lambda p: p.unlink(), "cannot be read"),
    "half a manifest": ("store.json", lambda p: p.write_text(p.read_text()[:99]), "cannot be read"),
    "manifest of bytes": ("store.json", lambda p: p.write_bytes(b"\xff\0"), "cannot be read"),
    "a list": ("store.json", lambda p: p.write_text("[]"), "no mapping"),
    "deep": ("store.json", lambda p: p.write_text("[" * 100_000), "cannot be read"),
    "pipe": ("store.json", lambda p: replace(p, os.mkfifo), "it is a pipe"),
    "another version": (
        "store.json", lambda p: edit(p, lambda c: c.update(format=99)), "of version 99"),
    "changed manifest": (
        "store.json", lambda p: edit(p, lambda c: c.update(vocab_size=9), False), "own hash"),
    "no parts": ("store.json", lambda p: edit(p, lambda c: c.update(parts={})), "no part 'train'"),
    "negative": (
        "store.json", lambda p: edit(p, lambda c: row(c).update(tokens=-1)), "greater than"),
    "more than there is": (
        "store.json", lambda p: edit(p, lambda c: row(c).update(tokens=HUGE)), "not those of its"),
    "huge": (
        "store.json",
        lambda p: edit(
            p,
            lambda c: (
                row(c).update(tokens=HUGE),
                c["parts"]["train"].update(
                    tokens=sum(s["tokens"] for s in c["parts"]["train"]["shards"])
                ),
                None,
            )[-1],
        ),
        "bytes, not",
    ),
    "unknown file": (
        "store.json", lambda p: edit(p, lambda c: row(c)["sha256"].update({"../x": "0" * 64})),
        "store.json"),
    "other files": (
        "store.json", lambda p: edit(p, lambda c: row(c)["sha256"].pop("ends")), "other files"),
    "small vocabulary": (
        "store.json", lambda p: edit(p, lambda c: c.update(vocab_size=9)), "beyond"),
    "no shard": ("train-00001.ids", lambda p: p.unlink(), "No such file"),
    "truncated ids": ("train-00001.ids", lambda p: os.truncate(p, 3), "has 3 bytes"),
    "longer ends": ("train-00000.ends", lambda p: p.write_bytes(p.read_bytes() * 2), "bytes, not"),
    "one bit of ids": ("val-00000.ids", flip, "does not match"),
    "one bit of marks": ("train-00001.learned", flip, "does not match"),
    "one bit of ends": ("train-00000.ends", flip, "train-00000.ends"),
    "a folder": ("train-00000.ids", lambda p: replace(p, os.mkdir), "is not a file"),
    "a link": (
        "train-00000.ids", lambda p: replace(p, lambda q: q.symlink_to("/dev/zero")), "not a file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_at_the_opening_of_a_store(tmp_path, damage):
    folder = write(tmp_path / "s", {"train": documents(), "val": documents(9)})
    TokenStore.open(folder)
    name, act, message = DAMAGE[damage]
    if name == "store.json" and "vocabulary" in damage:
        (folder / "checked.json").unlink()
    act(folder / name)
    with pytest.raises(DamagedStoreError, match=message):
        TokenStore.open(folder)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"train-00000.ids": 7}', b"\xff"])
def test_content_is_compared_once_unless_a_file_changes(tmp_path, content, monkeypatch):
    folder = write(tmp_path / "s", {"train": documents()})
    read = []
    real = store_format._check_content
    monkeypatch.setattr(
        store_format,
        "_check_content",
        lambda path, *rest: (read.append(path.name), real(path, *rest)),
    )
    TokenStore.open(folder)
    first, read[:] = len(read), []
    assert first > 10
    TokenStore.open(folder)
    assert read == []
    (folder / "train-00001.ids").touch()
    TokenStore.open(folder)
    assert read == ["train-00001.ids"]
    # A damaged record is no reason to trust a file.
    (folder / "checked.json").write_bytes(content)
    TokenStore.open(folder)
    assert len(read) == 1 + first


def test_many_shards_are_opened_by_looking_at_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_format, "SHARD_TOKENS", 1)
    given = [Encoded(np.full(1, number % 300, np.uint16)) for number in range(200)]
    folder = write(tmp_path / "s", {"train": given})
    store_format.note_checked(folder)
    looked = []
    real = os.lstat
    monkeypatch.setattr(
        os, "lstat", lambda path, *a, **k: (looked.append(path), real(path, *a, **k))[1]
    )
    opened = []
    monkeypatch.setattr(store_format, "open_file", lambda path: opened.append(path))
    store = TokenStore.open(folder)
    assert len(looked) == 400 and not opened
    part = store.part("train")
    assert part.windows(np.arange(0, 200, 50), 50).ravel().tolist() == [
        number % 300 for number in range(200)
    ]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    folder = write(tmp_path / "s", {"train": documents()})
    part = TokenStore.open(folder).part("train")
    os.truncate(folder / "train-00000.ids", 2)
    with pytest.raises(DamagedStoreError, match=r"train-00000\.ids is shorter"):
        part.read(0, 20)
    os.unlink(folder / "train-00001.ids")
    with pytest.raises(DamagedStoreError, match=r"train-00001\.ids: No such file"):
        part.read(50, part.num_tokens)


def test_threads_share_a_part_that_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN", 1)
    given = documents(200, marked=False)
    part = TokenStore.open(write(tmp_path / "s", {"train": given})).part("train")
    expected = ArrayPart.of(given).windows(np.arange(0, 2000, 3), 90)
    wrong = []

    def read():
        for _ in range(5):
            if not np.array_equal(part.windows(np.arange(0, 2000, 3), 90), expected):
                wrong.append("other ids")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    part.close()
    assert np.array_equal(part.windows(np.arange(0, 2000, 3), 90), expected)


def test_a_full_disk_leaves_the_writer_closed(tmp_path):
    writer = PartWriter(tmp_path, "train", "uint16")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            for _ in range(3):
                writer.add(np.zeros(2**20, np.uint16), None, 0, b"")
        writer.abandon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    open_files = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not any(path.startswith(str(tmp_path)) for path in open_files)


def test_reading_takes_no_memory_beside_what_is_returned_and_held(tmp_path, monkeypatch):
    monkeypatch.setattr(store_format, "SHARD_TOKENS", 2**24)
    given = [Encoded(np.zeros(2**23, np.uint16)) for _ in range(6)]
    folder = write(tmp_path / "s", {"train": given})
    code = (
        "import sys, numpy as np\n"
        "from apt_core.data.store.reader import TokenStore\n"
        "def read(what): return int(open('/proc/self/status').read().split(what)[1].split()[0])\n"
        "store = TokenStore.open(sys.argv[1])\n"
        "part, size = store.part('train'), store.part('train').num_tokens * 2\n"
        "for limit in size - 1, size:\n"
        "    store.hold_in_memory(limit)\n"
        "    before = read('VmHWM:')\n"
        "    for start in range(0, part.num_tokens - 2**14, 2**14):\n"
        "        part.windows(np.array([start]), 2**14)\n"
        "    print(read('VmHWM:') - before)\n"
        "before = read('VmRSS:')\n"
        "store.close()\n"
        "print(before - read('VmRSS:'))\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    (read, held, freed), torch_imported = map(int, output[:3]), output[3]
    # Of 100 MB that are read, or held in memory.
    assert read < 8_000
    assert 80_000 < held < 110_000 and freed > 80_000
    assert torch_imported == "False"


def test_a_store_in_a_folder_that_cannot_be_written_is_checked_each_time(tmp_path, monkeypatch):
    folder = write(tmp_path / "s", {"train": documents()})

    def refuse(path, text):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(store_format, "write_atomically", refuse)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert not (folder / "checked.json").exists()
