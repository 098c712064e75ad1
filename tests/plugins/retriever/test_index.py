"""Indexes over folders: what is read, kept, checked and made again."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from apt_core import ConfigError
from apt_core.data.store.format import DamagedStoreError
from apt_plugins.retriever import matrix
from apt_plugins.retriever.chunks import chunks_of
from apt_plugins.retriever.embedders import Hashing
from apt_plugins.retriever.index import Index
from apt_plugins.retriever.settings import RetrieverSettings

ROOT = Path(__file__).parents[3]


def held(vectors):
    return vectors.rows(0, len(vectors))


def index_of(folder, **settings):
    return Index(RetrieverSettings(folder=str(folder), **settings))


def test_passages_end_with_lines_and_paragraphs_within_their_size():
    text = "".join(f"line {n} of the text\n" for n in range(20))
    found = list(chunks_of(text, 1, 100, 40))
    assert all(len(passage) <= 100 for _, passage in found)
    # Each begins with the last two lines of the one before.
    assert [line for line, _ in found][:3] == [1, 4, 7] or found[1][1].split("\n")[0] in found[0][1]
    for line, passage in found:
        assert passage.splitlines()[0] == text.splitlines()[line - 1]
    covered = {number for line, p in found for number in range(line, line + len(p.splitlines()))}
    assert covered == set(range(1, 21))
    paragraphs = "a word\n" * 3 + "\n" + "another\n" * 3
    assert [line for line, _ in chunks_of(paragraphs, 7, 40, 10)] == [7, 11]
    assert list(chunks_of(" \n\n", 1, 40, 10)) == list(chunks_of("", 1, 40, 10)) == []


@pytest.mark.parametrize("text", ["word " * 50, "x" * 95, "字" * 95, "a\r\n" * 60])
def test_no_text_is_lost_and_no_passage_is_longer_than_its_size(text):
    found = list(chunks_of(text, 1, 30, 0))
    assert all(len(passage) <= 30 for _, passage in found)
    assert "".join("".join(p.split()) for _, p in found) == "".join(text.split())


def test_an_update_embeds_what_is_new_or_changed_alone(library, caplog):
    embedder = Hashing()
    first = index_of(library)
    first.vectors(embedder)
    assert first.embedded == len(first.passages) > 12
    again = index_of(library)
    again.vectors(embedder)
    assert again.path == first.path and again.embedded == 0
    (library / "shelf3.txt").unlink()
    shutil.move(library / "shelf4.txt", library / "deep" / "moved.txt")
    (library / "new.txt").write_text("A new text.\n", encoding="utf-8")
    (library / "faros.txt").write_text("Changed.\n\nAnd more.\n", encoding="utf-8")
    updated = index_of(library)
    found = held(updated.vectors(embedder))
    assert updated.embedded == 2 < len(updated.passages)
    assert np.array_equal(found, embedder.embed(list(updated.passages.texts())))
    # As one that is made anew.
    anew = index_of(library, index=str(library.parent / "elsewhere"))
    assert list(anew.passages.texts()) == list(updated.passages.texts())
    assert [anew.passages.place(n) for n in range(len(found))] == [
        updated.passages.place(n) for n in range(len(found))
    ]
    # What another size of passages gave is not taken over.
    smaller = index_of(
        library, chunk_chars=60, overlap_chars=0, index=str(library.parent / "elsewhere")
    )
    assert max(map(len, smaller.passages.texts())) <= 60
    mine = updated.root / "v-mine"
    mine.mkdir()
    updated.forget_others()
    assert {*updated.root.iterdir()} == {updated.path, mine}


def test_what_is_damaged_or_of_another_version_is_named_and_made_again(library, caplog):
    embedder = Hashing()
    index = index_of(library)
    expected = held(index.vectors(embedder))
    name = f"vectors-{embedder.identity}"
    vectors, texts = index.path / name / "vectors.npy", index.path / "passages" / "texts.bin"

    def truncated(path):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    def flipped(path):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    def linked(path):
        path.rename(path.with_name("other"))
        path.symlink_to(path.with_name("other"))

    def elsewhere(path):
        sums = path.parent / "checksums.json"
        sums.write_text(json.dumps({**json.loads(sums.read_text()), "../x": "0"}))

    for path in (vectors, texts):
        for harm in (truncated, flipped, linked, elsewhere, Path.unlink):
            caplog.clear()
            harm(path)
            made = index_of(library)
            assert np.array_equal(held(made.vectors(embedder)), expected), (path, harm)
            (message,) = [m for m in caplog.messages if "it is made again" in m]
            assert str(path.parent) in message
    earlier = index.root / f"v0-{'0' * 24}"
    shutil.move(index.path, earlier)
    again = index_of(library)
    again.vectors(embedder)
    assert again.embedded == len(expected) and earlier.exists()
    again.forget_others()
    assert not earlier.exists()


def test_what_is_cut_off_while_it_is_used_is_an_error(library, monkeypatch):
    """It ended the process with SIGBUS where it was mapped into memory."""
    small = index_of(library).vectors(Hashing())
    monkeypatch.setattr(matrix, "IN_MEMORY", 0)
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 4 * 384 * 5)
    index, query = index_of(library), Hashing().embed(["maps of islands"])[0]
    vectors = index.vectors(Hashing())
    assert np.allclose(vectors.dot(query), small.dot(query), atol=1e-6)
    first, last = index.passages.text(0), len(index.passages) - 1
    for path in index.path.rglob("*.*"):
        os.truncate(path, min(path.stat().st_size, 700))
    with pytest.raises(DamagedStoreError, match=r"vectors\.npy is shorter than it was"):
        vectors.dot(query)
    with pytest.raises(DamagedStoreError, match=r"texts\.bin is shorter than it was"):
        index.passages.text(last)
    assert index.passages.text(0) == first
    with pytest.raises(ValueError, match="is not as long as it says"):
        matrix.matrix_in(index.path / f"vectors-{Hashing().identity}" / "vectors.npy")
    # What is deleted stays with those who have opened it.
    again = index_of(library)
    found = again.vectors(Hashing())
    shutil.rmtree(again.root)
    assert np.allclose(found.dot(query), small.dot(query), atol=1e-6)
    assert again.passages.text(last) != again.passages.text(0) == first


def test_a_full_disk_is_an_error(library, small_disk):
    """It ended the process, too: what was mapped had no room when it was written."""
    (library / "more.txt").write_text("".join(f"word {n}\n\n" for n in range(900)))
    index = index_of(library, chunk_chars=20, overlap_chars=0, index=str(small_disk))
    with pytest.raises(OSError, match="No space left on device"):
        index.vectors(Hashing())
    assert not [*index.path.glob("*vectors*")]


def test_an_index_is_used_where_nothing_can_be_written(library, monkeypatch):
    index_of(library).vectors(Hashing())

    def refused(*given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("apt_core.data.store.lock.FileLock.acquire", refused)
    index = index_of(library)
    assert len(index.vectors(Hashing())) == len(index.passages) and index.embedded == 0
    (index.root / f"v1-{'0' * 24}" / "passages").mkdir(parents=True)
    index.forget_others()
    with pytest.raises(PermissionError):
        index_of(library, chunk_chars=100)


def test_two_that_build_at_once_build_once_and_delete_nothing_of_each_other(library, monkeypatch):
    embed, changed, both = Hashing.embed, [], threading.Barrier(2)

    def slowly(self, texts):
        if len(texts) > 1 and not changed:
            # Another one, whose text has changed meanwhile.
            (library / "new.txt").write_text("A new text.\n", encoding="utf-8")
            changed.append(pool.submit(build))
            time.sleep(0.3)
        return embed(self, texts)

    def build(barrier=None):
        index = index_of(library)
        if barrier is not None:
            barrier.wait(60)
        vectors = index.vectors(Hashing())
        if barrier is None:
            index.forget_others()
        return index.embedded, len(index.passages), held(vectors)

    monkeypatch.setattr(Hashing, "embed", slowly)
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(build, both) for _ in range(2)]
        counts, sizes, vectors = zip(*(each.result(60) for each in first), strict=True)
        embedded, size, others = changed[0].result(60)
    assert sum(counts) == sizes[0] == sizes[1]
    assert np.array_equal(*vectors)
    # All but the new text were there, or had been deleted, when the third began.
    assert size == sizes[0] + 1 == len(others) and embedded in (1, size)


def test_places_are_told_from_where_one_is(library, monkeypatch):
    monkeypatch.chdir(library)
    assert index_of("deep").passages.place(0) == "deep/harbours.md:1"
    monkeypatch.chdir(library / "deep")
    assert index_of(library / "deep").passages.place(0) == "harbours.md:1"
    monkeypatch.chdir("/")
    assert index_of(library / "deep").passages.place(0).endswith("library/deep/harbours.md:1")


def test_files_that_cannot_be_read_are_named_and_left_out(library, caplog):
    (library / "latin.txt").write_bytes("Über Brel\n".encode("latin-1"))
    (library / "wide.txt").write_bytes("Über Brel\n".encode("utf-16"))
    (library / "broken.jsonl").write_text('{"text": "fine"}\n{"txt": 3}\n')
    (library / "maps.txt.gz").write_bytes(gzip.compress(b"Packed maps of Brel.\n"))
    (library / "cut.txt.gz").write_bytes(gzip.compress(b"Packed maps of Brel.\n" * 99)[:40])
    (library / ".hidden.txt").write_text("hidden\n")
    (library / "empty.txt").touch()
    index = index_of(library)
    left = [message for message in caplog.messages if message.startswith("left out")]
    for name in ("latin.txt", "wide.txt", "broken.jsonl", "cut.txt.gz"):
        assert sum(name in message for message in left) == 1, left
    assert len(left) == 4
    texts = " ".join(index.passages.texts())
    assert "Packed maps of Brel." in texts and "fine" not in texts and "hidden" not in texts
    for folder, says in (
        (library / "empty.txt", "no file in it holds text"),
        ("none", "not found|No such"),
    ):
        with pytest.raises(ConfigError, match=says):
            index_of(folder)


def test_a_process_that_is_killed_leaves_nothing_half_made(library):
    from apt_plugins.retriever.parts import fault_of

    code = (
        "import os, sys; from apt_plugins.retriever import embedders, index, settings\n"
        "embedders.Hashing.weights = None\n"
        "embed = embedders.Hashing.embed\n"
        "def dies(self, texts):\n"
        "    os._exit(9) if len(texts) > 1 else None\n"
        "    return embed(self, texts)\n"
        "embedders.Hashing.embed = dies\n"
        "made = index.Index(settings.RetrieverSettings(folder=sys.argv[1]))\n"
        "print(made.passages.text(0)[:5], flush=True)\n"
        "made.vectors(embedders.Hashing())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(library)]
    died = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert died.returncode == 9 and died.stdout, died.stderr
    index = index_of(library)
    assert fault_of(index.path / "passages") is None
    assert len(index.vectors(Hashing())) == len(index.passages) == index.embedded


def test_vectors_of_hashing_are_the_same_in_every_process():
    code = (
        "from apt_plugins.retriever.embedders import Hashing\n"
        "import hashlib\n"
        "vectors = Hashing().embed(['Une carte d’île, 島の地図'])\n"
        "print(hashlib.sha256(vectors).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65
