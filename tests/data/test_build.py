"""Stores are built once, whole or not at all, and hold the same bytes however they are built."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from apt_core.data.pipeline.prepare import PipelineSettings
from apt_core.data.pipeline.split import SplitRule
from apt_core.data.store import assemble, chunks, local
from apt_core.data.store import format as store_format
from apt_core.data.store.build import build_store
from apt_core.data.store.format import StoreError
from apt_core.data.store.lock import is_locked, waiting_for
from apt_core.errors import ConfigError, ProviderError
from apt_core.providers import Document
from apt_core.providers.dataset import DataSection, DatasetProvider

MODULE = """
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.tokenizer import Encoded, TokenizerProvider, special_tokens


class Letters(TokenizerProvider):
    '''Its ids are the bytes of the text, shifted by what it was trained on.'''

    name = "letters"
    shift = 0
    identity = "letters"

    @property
    def vocab_size(self):
        return 263

    @property
    def special(self):
        return special_tokens(range(256, 263))

    def encode(self, text):
        return [(byte + self.shift) % 256 for byte in text.encode()]

    def decode(self, ids):
        kept = bytes((token - self.shift) % 256 for token in ids if token < 256)
        return kept.decode(errors="replace")

    def save(self, folder):
        (folder / "shift.txt").write_text(str(self.shift))

    def load(self, folder):
        self.shift = int((folder / "shift.txt").read_text())

    def fingerprint(self):
        return None if self.identity is None else f"{self.identity} {self.shift}"


class Forgetful(Letters):
    '''Does not save what it was trained on, nor tell of it.'''

    def save(self, folder):
        pass

    def load(self, folder):
        pass

    def fingerprint(self):
        return "forgetful"


class Picky(Letters):
    '''Refuses a text, and breaks on another.'''

    def encode(self, text):
        if text == "refused":
            raise ValueError("not this one")
        return [{}[text]] if text == "broken" else super().encode(text)


class Fatal(Letters):
    '''Kills worker processes on a text: always, or while the file is there that its settings name.
    None of them may have torch.'''

    def encode_documents(self, documents):
        if "pytest" not in sys.modules:
            if "torch" in sys.modules:
                raise RuntimeError("torch")
            text = " ".join(document.text or "" for document in documents)
            once = Path(self.config["once"])
            if "fatal" in text or ("once" in text and once.exists()):
                once.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_documents(documents)


class Slow(DatasetProvider):
    '''Says in a file when it begins, then takes its time.'''

    name = "slow"

    def documents(self):
        Path(os.environ["BEGUN"]).open("a").write(f"{os.getpid()}\\n")
        while os.path.exists(os.environ.get("HOLD", "")):
            time.sleep(0.01)
        for number in range(int(os.environ.get("DOCUMENTS", 40))):
            yield f"document {number} " * 40
            time.sleep(0.02)

    def fingerprint(self):
        return "slow"
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "kept"))
    # Processes are started although there is little text.
    monkeypatch.setattr(local, "START_AFTER", 1)
    return tmp_path / "kept" / "stores"


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A module of providers that other processes can import."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "store_parts.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("store_parts")
    sys.path.remove(str(folder))
    del sys.modules["store_parts"]


class Given(DatasetProvider):
    """Yields what it is given; lists are held-out documents."""

    name = "given"

    def __init__(self, *records, held_out=None, fingerprint="given"):
        super().__init__()
        self.records, self._held_out, self._fingerprint = records, held_out, fingerprint
        self.read = 0

    def documents(self):
        for record in self.records:
            self.read += 1
            if isinstance(record, BaseException):
                raise record
            yield record

    def held_out(self):
        return None if self._held_out is None else iter(self._held_out)

    def fingerprint(self):
        return self._fingerprint


def texts(store, tokenizer, part="train"):
    part = store.part(part)
    return [
        tokenizer.decode(part.read(*part.span(number)).tolist())
        for number in range(part.num_documents)
    ]


def mixed(count=120):
    found = []
    for number in range(count):
        if number % 3 == 0:
            found.append({"prompt": f"question {number}", "response": f"ánswer {number} " * 20})
        elif number % 3 == 1:
            turns = [("user", f"hi {number}"), ("assistant", "hello"), ("user", "end")]
            found.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        else:
            found.append(f"document {number} says é\n" * (number % 7 + 1))
    return found


def section(**settings):
    return DataSection(**settings)


def content(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != store_format.CHECKED
    }


def nothing_half_made(home):
    """Whether whole stores are all that is there."""
    return all((path / "store.json").is_file() for path in home.iterdir())


# What is in a store ----------------------------------------------------------------------------


def test_documents_are_kept_in_order_with_marks_borders_and_counts(code):
    tokenizer = code.Letters()
    records = mixed()
    store = build_store(Given(*records), tokenizer, section(val_fraction=0.3), workers=1)
    train, val = store.part("train"), store.part("val")
    assert train.num_documents + val.num_documents == len(records)
    assert val.num_documents == pytest.approx(36, abs=15)
    encoded = {}
    for record in records:
        document = Document.of(record)
        one = tokenizer.encode_document(document)
        encoded[tokenizer.decode(one.ids.tolist())] = one
    order = list(encoded)
    for name, part in (("train", train), ("val", val)):
        found = texts(store, tokenizer, name)
        assert found == [text for text in order if text in set(found)]
        for number, text in enumerate(found):
            span, one = part.span(number), encoded[text]
            assert part.read(*span).tolist() == one.ids.tolist()
            learned = np.ones(len(one.ids), bool) if one.learned is None else one.learned
            assert part.marks(*span).tolist() == learned.tolist()
    answers = sum(
        len((r if isinstance(r, str) else r.get("response", "hello")).encode()) for r in records
    )
    assert train.num_bytes + val.num_bytes == answers
    manifest = store.manifest
    assert manifest.counts == {
        "read": 120, "empty": 0, "too_short": 0, "too_long": 0, "duplicates": 0,
        "near_duplicates": 0, "replaced": 0, "train": train.num_documents,
        "val": val.num_documents, "texts": 40, "pairs": 40, "conversations": 40,
    }  # fmt: skip
    assert (manifest.tokenizer, manifest.vocab_size, manifest.dtype) == ("letters", 263, "uint16")
    assert manifest.source == "given"


def test_each_step_counts_what_it_leaves_out(code):
    near = " ".join(f"word{number}" for number in range(100))
    records = [
        "", "  \n", "ab", "x" * 1000, "once said", "once said", near, near + " end",
        *(hashlib.sha256(str(number).encode()).hexdigest() for number in range(30)),
    ]  # fmt: skip
    source = Given(*records)
    source.replaced = 3
    expected = {"read": 38, "empty": 2, "too_short": 1, "too_long": 1, "replaced": 0}
    for mode, left_out in (("none", (0, 0)), ("exact", (1, 0)), ("near", (1, 1))):
        settings = section(min_chars=3, max_chars=999, deduplicate=mode)
        counts = build_store(source, code.Letters(), settings, workers=1).manifest.counts
        assert expected.items() <= counts.items()
        assert (counts["duplicates"], counts["near_duplicates"]) == left_out
        assert counts["train"] + counts["val"] == 34 - sum(left_out)


def test_the_first_of_two_equal_documents_stays_and_held_out_ones_before_all(code):
    records = ["said twice", "other", "said twice", "held out too"]
    source = Given(*records, held_out=["held out too", "held out only"])
    tokenizer = code.Letters()
    store = build_store(source, tokenizer, section(deduplicate="exact"), workers=1)
    assert texts(store, tokenizer) == ["said twice", "other"]
    assert texts(store, tokenizer, "val") == ["held out too", "held out only"]
    assert store.manifest.counts["duplicates"] == 2


def test_documents_of_one_key_are_on_one_side_and_few_are_split_inside(code):
    tokenizer = code.Letters()
    records = [{"text": f"{key} {number}", "key": key} for number in range(9) for key in "abcdefgh"]
    store = build_store(Given(*records), tokenizer, section(val_fraction=0.4), workers=1)
    sides = [{text[0] for text in texts(store, tokenizer, part)} for part in ("train", "val")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set("abcdefgh")
    # One text: its end is held out.
    lone = build_store(
        Given("a" * 90 + "\n\n" + "b" * 10, fingerprint="l"), tokenizer, section(), workers=1
    )
    assert texts(lone, tokenizer) == ["a" * 90 + "\n\n"]
    assert texts(lone, tokenizer, "val") == ["b" * 10]
    assert lone.manifest.counts["read"] == 1
    # Two prompts: one of them is.
    pairs = [{"prompt": "p", "response": str(number)} for number in range(2)]
    store = build_store(Given(*pairs, fingerprint="p"), tokenizer, section(), workers=1)
    assert [store.part(part).num_documents for part in ("train", "val")] == [1, 1]


def test_a_piece_of_a_text_has_an_end_only_where_the_text_ends(home, code):
    tokenizer, eos = code.Letters(), 256

    def ids(store, part):
        found = store.part(part)
        return [found.read(*found.span(n)).tolist() for n in range(found.num_documents)]

    pieces = [
        Document("ab", begins=True, ends=False),
        Document("cd", begins=False, ends=False),
        Document("ef", begins=False),
    ]
    source = Given(*pieces, held_out=pieces[:1])
    store = build_store(source, tokenizer, section(), workers=1)
    assert ids(store, "train") == [[*b"ab"], [*b"cd"], [*b"ef", eos]]
    assert ids(store, "val") == [[*b"ab"]]
    lone = build_store(Given("a" * 90 + "b" * 10, fingerprint="l"), tokenizer, section(), workers=1)
    assert ids(lone, "train") == [[*b"a" * 90]]
    assert ids(lone, "val") == [[*b"b" * 10, eos]]
    # Sources that are known by their documents alone are told apart by it.
    folders = {
        build_store(Given(each, fingerprint=None), tokenizer, section(), workers=1).folder
        for each in (Document("a" * 99), Document("a" * 99, ends=False))
    }
    assert len(folders) == 2


def test_what_is_held_out_has_a_limit(home, code):
    tokenizer = code.Letters()
    records = [f"{number:03} " + "x" * 96 for number in range(400)]
    settings = {"val_fraction": 0.3}

    def held_out(*records, workers=1, **more):
        given = section(**settings, **more)
        store = build_store(Given(*records, fingerprint=None), tokenizer, given, workers=workers)
        parts = [texts(store, tokenizer, part) for part in ("train", "val")]
        wanted = [r if isinstance(r, str) else r["text"] for r in records]
        assert sorted(parts[0] + parts[1]) == sorted(wanted)
        return parts[1]

    whole, some = held_out(*records, max_val_chars=None), held_out(*records, max_val_chars=1234)
    assert 90 < len(whole) < 150 and len(some) == 12
    assert set(some) < set(whole) and some == sorted(some)
    # Neither their order, nor who tokenises them, nor what else is held out decides.
    assert set(held_out(*records[::-1], max_val_chars=1234)) == set(some)
    assert held_out(*records, workers=2, max_val_chars=1234) == some
    assert set(held_out(*records, max_val_chars=500)) < set(some)
    assert held_out(*records) == whole
    # Documents of one key stay together; one is held out even if it is too long.
    keyed = [{"text": record, "key": record[:2]} for record in records]
    found = held_out(*keyed, max_val_chars=2000)
    assert len(found) == 20 and len({text[:2] for text in found}) == 2
    assert len(held_out(*keyed, max_val_chars=50)) == 10


def test_what_a_run_may_be_evaluated_on_already_stays_held_out(home, code, monkeypatch):
    tokenizer = code.Letters()
    records = [
        {"text": f"{number:03} " + "x" * 96, "key": str(number % 150)} for number in range(400)
    ]
    settings = section(val_fraction=0.3, max_val_chars=3000)
    monkeypatch.setattr(store_format, "shard_tokens", lambda number: 3000)
    begun = build_store(Given(*records), tokenizer, settings, workers=1)
    first = begun.manifest.begun.documents
    found = texts(begun, tokenizer, "val")
    assert 5 < first < len(found) and found[:first] == sorted(found[:first])
    monkeypatch.setattr(store_format, "shard_tokens", lambda number: 10**6)
    later = build_store(Given(*records, fingerprint="later"), tokenizer, settings, workers=1)
    assert later.manifest.begun is None and set(found) != set(texts(later, tokenizer, "val"))
    # All of a key stay on the side that was shown.
    keys = [
        {int(text[:3]) % 150 for text in texts(begun, tokenizer, part)} for part in ("train", "val")
    ]
    assert not keys[0] & keys[1]
    assert sum(begun.part(part).num_documents for part in ("train", "val")) == 400


def test_a_file_system_without_links_changes_no_byte(home, code, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(store_format, "shard_tokens", lambda number: 3000)
    records = [f"{number:03} " + "x" * 96 for number in range(200)]
    store = build_store(Given(*records), code.Letters(), section(), workers=1)
    whole = content(store.folder)
    shutil.rmtree(store.folder)
    monkeypatch.setattr(os, "link", refuse)
    again = build_store(Given(*records), code.Letters(), section(), workers=1)
    assert again.manifest.begun is not None and content(again.folder) == whole


def test_who_asks_whether_a_store_is_being_built_does_not_build_it(tmp_path):
    lock = tmp_path / "key.lock"
    assert not is_locked(lock) and not lock.exists()
    with waiting_for(lock, "a store"):
        assert is_locked(lock)
    lock.touch()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another one who asks
        assert not is_locked(lock)


@pytest.mark.parametrize(
    ("deduplicate", "several"), [("none", (2, 700, 50)), ("near", (3, 900, 7))]
)
def test_workers_and_chunks_change_no_byte(home, code, deduplicate, several, monkeypatch):
    """Nor do they import torch, which takes each of them seconds."""
    records = [*mixed(), "x" * 5000, *mixed(40), "said again", *mixed(5)]
    found, started = [], []
    start = local.Worker.start
    monkeypatch.setattr(
        local.Worker, "start", lambda self, first: (started.append(self), start(self, first))
    )
    settings = section(deduplicate=deduplicate)
    for workers, chars, documents in [(1, 1 << 20, 4096), (1, 100, 3), several]:
        monkeypatch.setattr("apt_core.data.store.input.CHUNK_CHARS", chars)
        monkeypatch.setattr("apt_core.data.store.input.CHUNK_DOCUMENTS", documents)
        monkeypatch.setenv("APT_CACHE", str(home / f"{workers}-{chars}"))
        started.clear()
        tokenizer = code.Fatal({"once": ""})
        tokenizer.shift = 5
        store = build_store(Given(*records), tokenizer, settings, workers=workers)
        assert len(started) == (0 if workers == 1 else workers)
        found.append(content(store.folder))
    assert all(each == found[0] for each in found)


def test_a_tokenizer_that_no_other_process_can_make_encodes_in_this_one(code, caplog, tmp_path):
    class Local(code.Letters):
        pass

    forgetful = code.Forgetful()
    forgetful.shift = 3
    unsaved = code.Letters()
    unsaved.save = lambda folder: None
    odd = code.Letters(threading.Lock())
    documents = [Document.of(record) for record in mixed(60)]
    given = [chunks.pack_chunk(documents[n : n + 10], 0) for n in range(0, 60, 10)]
    for number, (tokenizer, reason) in enumerate(
        [
            (code.Letters(), ""),
            (Local(), "no other process can import"),
            (odd, "its settings are a lock that is no JSON"),
            (forgetful, "in another process it makes other ids"),
            (unsaved, "FileNotFoundError"),
        ]
    ):
        caplog.clear()
        encoder = chunks.ChunkEncoder(tokenizer, PipelineSettings(), SplitRule.of_fraction(0.1))
        folder = tmp_path / str(number)
        folder.mkdir()
        with caplog.at_level(logging.WARNING, "apt.data"):
            results = list(local.run_local(encoder, given, 2, folder))
        assert results == [encoder(chunk) for chunk in given]
        assert reason in caplog.text
        assert bool(caplog.text) == bool(reason)


# Bad input -------------------------------------------------------------------------------------


def bad_ids(code, **methods):
    return type("Bad", (code.Letters,), methods)()


BAD_INPUT = {
    "nothing": ([], {}, ConfigError, r"dataset:given \(.*Given\) yields no document"),
    "one empty text": ([""], {}, ConfigError, "none of the 1 documents .*: 1 empty"),
    "all filtered": (["a", "b", " "], {"min_chars": 9}, ConfigError, "left: 1 empty, 2 too short"),
    "one token": (["a"], {}, ConfigError, "data.train_path: the training text of .* has 0"),
    "prompts": (
        [{"messages": [{"role": "user", "content": "hello"}]}] * 2, {}, ConfigError,
        r"data.train_path: .* has \d+ tokens, none of which is to be learned .*responses"),
    "no document": (["a", 7], {}, ConfigError, r"given .*: document 2 of documents\(\) is an int"),
    "no text": ([{"x": 1}], {}, ConfigError, "document 1 .* it has 'x'"),
    "unknown role": (
        [{"messages": [{"role": "boss", "content": ""}]}], {}, ConfigError, "unknown role 'boss'"),
    "half a character": ([Document(text="\ud800")], {}, ConfigError, "surrogate"),
    "error": (["a", OSError("dead connection")], {}, ProviderError,
        r"dataset:given \(.*Given\) failed in documents\(\) \(.*build.py:\d+\): OSError: dead"),
    "own error": ([ConfigError("bad line", where="f:7")], {}, ConfigError, "^f:7: bad line$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_an_error_that_names_its_author_and_leaves_nothing(home, code, case):
    records, settings, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        build_store(Given(*records), code.Letters(), section(**settings), workers=1)
    assert list(home.iterdir()) == []


def test_errors_of_a_tokenizer_name_it_and_the_document(home, code):
    records = [*(f"fine {number}" for number in range(30)), "wrong", "fine"]

    def fails(self, text):
        if "wrong" in text:
            raise ZeroDivisionError("by it")
        return code.Letters.encode(self, text)

    def refuses(self, text):
        raise ValueError("no such text")

    empty = np.empty(0, np.uint16)
    cases = [
        ({"encode": fails}, ProviderError, r"letters .* failed on given documents\(\) 31 \("),
        ({"encode": refuses}, ConfigError, r"given documents\(\) 1: .*letters .* no such text"),
        ({"encode_array": lambda self, text: [1.0]}, ConfigError, "no 1-D array"),
        ({"encode_array": lambda self, text: np.array([999])}, ConfigError, "999"),
        ({"encode_documents": lambda self, documents: []}, ProviderError, "0 of 32"),
        ({"encode_document": lambda self, document: None}, ConfigError, "a NoneType"),
        ({"encode_document": lambda self, document: code.Encoded([1])}, ConfigError, "a list"),
        ({"encode_document": lambda self, document: code.Encoded(empty, np.ones(3, bool))},
            ConfigError, r"marks that are no array of booleans, one an id \(0\)"),
        ({"fingerprint": lambda self: 1 // 0}, ProviderError, r"failed in fingerprint\(\)"),
    ]  # fmt: skip
    for methods, error, message in cases:
        with pytest.raises(error, match=message):
            build_store(Given(*records), bad_ids(code, **methods), section(), workers=1)
    assert not home.exists() or list(home.iterdir()) == []


def test_errors_in_a_worker_are_those_of_this_process(home, code, monkeypatch):
    monkeypatch.setattr("apt_core.data.store.input.CHUNK_CHARS", 100)
    records = [*(f"fine {number} " * 9 for number in range(60)), "refused"]
    errors = []
    for records_end in (["refused"], ["broken"]):
        for workers in (1, 2):
            source = Given(*records[:-1], *records_end)
            with pytest.raises((ConfigError, ProviderError)) as caught:
                build_store(source, code.Picky(), section(), workers=workers)
            errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1] and errors[2] == errors[3]
    assert errors[0][0] is ConfigError and "given documents() 61: " in errors[0][1]
    assert errors[2][0] is ProviderError and "store_parts.py:" in errors[2][1]
    assert list(home.iterdir()) == []


# Once, whole, or not at all -----------------------------------------------------------------------


def test_a_store_is_opened_where_it_is_unless_something_of_it_changes(home, code):
    tokenizer, records = code.Letters(), mixed(40)
    first = build_store(Given(*records), tokenizer, section(), workers=1)
    again = Given(*records)
    assert build_store(again, code.Letters(), section(), workers=1).folder == first.folder
    # What is not in use changes nothing either.
    idle = section(near_threshold=0.5, build_workers=3, packing="pad", max_length=7)
    assert build_store(again, tokenizer, idle).folder == first.folder
    assert again.read == 0
    folders = {first.folder}
    shifted = code.Letters()
    shifted.shift = 1
    changed = Given(*records, fingerprint="another")
    columns = Given(*records)
    columns.data_section = section(columns={"text": "body"})

    class Other(Given):
        pass

    for source, by, settings in [
        (changed, tokenizer, section()),
        (columns, tokenizer, section()),
        (Other(*records), tokenizer, section()),
        (again, shifted, section()),
        (again, code.Forgetful(), section()),
        (again, tokenizer, section(normalize="NFC")),
        (again, tokenizer, section(min_chars=2)),
        (again, tokenizer, section(max_chars=10**6)),
        (again, tokenizer, section(deduplicate="exact")),
        (again, tokenizer, section(val_fraction=0.2)),
    ]:
        folders.add(build_store(source, by, settings, workers=1).folder)
    assert len(folders) == 11
    assert nothing_half_made(home)


def test_a_source_without_a_fingerprint_is_read_to_know_it(home, code, caplog):
    def source(*more):
        return Given(*mixed(40), *more, fingerprint=None)

    with caplog.at_level(logging.INFO, "apt.data"):
        first = build_store(source(), code.Letters(), section(), workers=1)
    assert "given" in caplog.text and "all of it is read" in caplog.text
    again = source()
    assert build_store(again, code.Letters(), section()).folder == first.folder
    assert again.read == 40
    other = build_store(source("more"), code.Letters(), section(), workers=1)
    assert other.folder != first.folder

    class Growing(Given):
        def documents(self):
            self.records += ("grown",)
            return super().documents()

    with pytest.raises(StoreError, match=r"given .* changed while it was read"):
        build_store(Growing(*mixed(40), fingerprint=None), code.Letters(), section(), workers=1)
    assert len(list(home.iterdir())) == 2 and nothing_half_made(home)


def test_without_a_fingerprint_of_the_tokenizer_a_store_ends_with_its_last_user(home, code):
    tokenizer = code.Letters()
    tokenizer.identity = None
    stores = [build_store(Given(*mixed(40)), tokenizer, section(), workers=1) for _ in range(2)]
    assert len({store.folder for store in stores}) == 2
    part = stores[0].part("train")
    stores.clear()
    assert [path for path in home.iterdir() if path.is_dir()] == [part._files._folder]
    assert part.read(0, 3).shape == (3,)
    del part
    assert list(home.iterdir()) == []


def test_a_cache_that_cannot_be_used_is_said_and_the_run_goes_on(
    home, code, monkeypatch, caplog, tmp_path
):
    home.parent.mkdir()
    home.write_text("no folder")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with caplog.at_level(logging.WARNING, "apt.data"):
        store = build_store(Given(*mixed(40)), code.Letters(), section(), workers=1)
    assert "the token store is not kept" in caplog.text
    assert store.part("train").num_documents
    assert len(list(temporary.iterdir())) == 1
    del store
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "store.json").unlink(),
        lambda folder: (folder / "store.json").write_text("{}"),
        lambda folder: (folder / "train-00000.ids").write_bytes(b"x"),
        lambda folder: (folder / "train-00000.ids").write_bytes(
            b"x" * (folder / "train-00000.ids").stat().st_size
        ),
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
    ],
    ids=["no manifest", "other manifest", "truncated", "other content", "a file"],
)
def test_a_damaged_store_is_built_anew_and_said_so(home, code, damage, caplog):
    first = build_store(Given(*mixed(40)), code.Letters(), section(), workers=1)
    whole = content(first.folder)
    damage(first.folder)
    with caplog.at_level(logging.INFO, "apt.data"):
        second = build_store(Given(*mixed(40)), code.Letters(), section(), workers=1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "is built anew: " in caplog.text
    assert second.folder == first.folder and content(second.folder) == whole
    assert list(home.iterdir()) == [second.folder]
    shutil.rmtree(second.folder)
    second.folder.symlink_to("nowhere")
    third = build_store(Given(*mixed(40)), code.Letters(), section(), workers=1)
    assert content(third.folder) == whole and list(home.iterdir()) == [third.folder]


def test_a_tokenizer_whose_fingerprint_leaves_something_out_is_noticed(home, code, caplog):
    tokenizer = code.Forgetful()
    first = build_store(Given(*mixed(40)), tokenizer, section(), workers=1)
    before = content(first.folder)
    tokenizer.shift = 1
    with caplog.at_level(logging.WARNING, "apt.data"):
        second = build_store(Given(*mixed(40)), tokenizer, section(), workers=1)
    assert second.folder == first.folder and content(second.folder) != before
    assert "letters (store_parts.Forgetful) makes other ids under the same" in caplog.text
    assert texts(second, tokenizer)[0] in {
        tokenizer.decode(tokenizer.encode_document(Document.of(record)).ids.tolist())
        for record in mixed(40)
    }
    caplog.clear()
    build_store(Given(*mixed(40)), tokenizer, section(), workers=1)
    assert not caplog.text


@pytest.mark.parametrize("limit", [0, 200, 5_000, 40_000])
@pytest.mark.parametrize("deduplicate", ["none", "near"])
def test_a_full_disk_is_an_error_that_leaves_nothing(home, code, limit, deduplicate):
    records = [f"document {number} " * 50 for number in range(100)]
    source, settings = Given(*records), section(deduplicate=deduplicate)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot be written in .*stores: .*APT_CACHE"):
            build_store(source, code.Letters(), settings, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(home.iterdir()) == []
    build_store(source, code.Letters(), settings, workers=1)


def test_a_disk_that_fills_up_while_building_leaves_nothing(
    home, code, small_disk, monkeypatch, tmp_path
):
    """Whichever file meets the full disk: those of the store, of what was seen, of the workers."""
    records = [f"{number}: " + f"{number % 7} words " * 400 for number in range(150)]
    source, settings = Given(*records), section(deduplicate="exact")
    monkeypatch.setenv("APT_CACHE", str(small_disk))
    stores, ballast = small_disk / "stores", small_disk / "ballast"
    stores.mkdir()
    for free in (0, 2, 8, 32, 64, 128):
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - free * 4096)
        for workers in (1, 2) if free in (0, 8, 64) else (1,):
            with pytest.raises(StoreError, match=r"No space|is full|no room"):
                build_store(source, code.Letters(), settings, workers=workers)
            assert not any(path.is_dir() for path in stores.iterdir())
        ballast.unlink()
    built = build_store(source, code.Letters(), settings, workers=2)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "roomy"))
    roomy = build_store(source, code.Letters(), settings, workers=1)
    assert content(built.folder) == content(roomy.folder)


PROGRAM = """
import logging
import sys
from apt_core.data.store import local
from apt_core.data.store.build import build_store
from apt_core.providers.dataset import DataSection
from store_parts import Letters, Slow
local.START_AFTER = 1
import apt_core.data.store.input as source
source.CHUNK_CHARS = 500
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
store = build_store(Slow(), Letters(), DataSection(), workers=int(sys.argv[1]))
print(store.part("train").tokens_sha256)
"""


@pytest.fixture
def start(code, tmp_path, monkeypatch):
    """Start programs that build one store, all of which are ended at last."""
    begun = tmp_path / "begun"
    monkeypatch.setenv("BEGUN", str(begun))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(code.__file__))
    programs = []

    def start(workers=1, wait=True):
        count = begun.read_text().count("\n") if begun.exists() else 0
        command = [sys.executable, "-c", PROGRAM, str(workers)]
        pipe = subprocess.PIPE
        program = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, process_group=0)
        programs.append(program)
        until(lambda: not wait or (begun.exists() and begun.read_text().count("\n") > count))
        return program

    start.begun = begun
    yield start
    for program in programs:
        program.kill()
        program.communicate()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_of_two_processes_one_builds_and_the_other_waits_and_says_so(
    start, home, tmp_path, monkeypatch
):
    hold = tmp_path / "hold"
    hold.touch()
    monkeypatch.setenv("HOLD", str(hold))
    programs = [start(), start(wait=False)]
    said = programs[1].stderr.readline()
    hold.unlink()
    outputs = [program.communicate(timeout=120) for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert outputs[0][0] == outputs[1][0] != ""
    assert "built the token store" in outputs[0][1]
    assert f"waiting for the token store, which process {programs[0].pid} makes" in said
    assert "built" not in outputs[1][1]
    assert start.begun.read_text() == f"{programs[0].pid}\n"
    assert len(list(home.iterdir())) == 1


def children_of(process):
    found = []
    for folder in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(folder)}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (ValueError, OSError):
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(folder))
    return found


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGTERM, 2)],
)
def test_a_build_that_is_ended_leaves_no_store_and_no_process(
    start, home, code, number, workers, monkeypatch
):
    monkeypatch.setenv("DOCUMENTS", "10000")
    program = start(workers)
    until(lambda: len(children_of(program.pid)) == (0 if workers == 1 else workers))
    children = children_of(program.pid)
    until(lambda: len(list(home.glob("*.building-*/work-*/*.ids"))) == 1)
    os.killpg(program.pid, number) if number == signal.SIGINT else program.send_signal(number)
    program.communicate(timeout=60)
    until(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))
    names = sorted(path.name for path in home.iterdir())
    assert not any((path / "store.json").exists() for path in home.iterdir())
    # Nobody can clean up after these; the next builder does, also of another store.
    assert len(names) == (0 if number == signal.SIGINT else 2)
    store = build_store(Given(*mixed(40)), code.Letters(), section(), workers=1)
    assert list(home.iterdir()) == [store.folder]
    monkeypatch.setenv("DOCUMENTS", "30")
    monkeypatch.setattr(code.time, "sleep", lambda seconds: None)
    assert build_store(code.Slow(), code.Letters(), section(), workers=1).part("train").num_tokens


def test_a_killed_worker_is_replaced_and_changes_no_byte(home, code, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("apt_core.data.store.input.CHUNK_CHARS", 300)
    file = tmp_path / "once"
    records = [f"document {number} " * 20 for number in range(100)]
    records[60] = "once " * 50
    found = []
    for workers in (1, 2):
        monkeypatch.setenv("APT_CACHE", str(home / str(workers)))
        file.touch()
        with caplog.at_level(logging.WARNING, "apt.data"):
            tokenizer = code.Fatal({"once": str(file)})
            store = build_store(Given(*records), tokenizer, section(), workers=workers)
        found.append(content(store.folder))
    assert found[0] == found[1] and not file.exists()
    told = "was ended by SIGKILL; its documents are given to another"
    assert caplog.text.count(told) == 1
    # One that kills each of them.
    records[60] = "fatal " * 50
    source = Given(*records, fingerprint="fatal")
    with pytest.raises(StoreError, match=r"3 processes .* given documents\(\) 61 .*SIGKILL"):
        build_store(source, code.Fatal({"once": str(file)}), section(), workers=2)
    assert list((home / "2" / "stores").iterdir()) == [store.folder]


def test_a_long_build_says_how_far_it_is(code, monkeypatch, caplog):
    monkeypatch.setattr(assemble, "LOG_SECONDS", 0.0)
    monkeypatch.setattr("apt_core.data.store.input.CHUNK_CHARS", 500)
    source = Given(*(f"document {number} " * 20 for number in range(50)))
    source.share_read = lambda: source.read / len(source.records)
    told = []
    with caplog.at_level(logging.INFO, "apt.data"):
        build_store(
            source, code.Letters(), section(), workers=1, progress=lambda *facts: told.append(facts)
        )
    lines = [record.getMessage() for record in caplog.records if "building" in record.msg]
    assert len(lines) == len(told) > 5
    assert lines[-1].startswith("building the token store: 50 documents, 1")
    assert lines[-1].endswith("100% of the source") and " MB/s, " in lines[-1]
    assert told[-1][0] == 50 and told[-1][2] == sum(map(len, source.records))
    assert [fact[0] for fact in told] == sorted({fact[0] for fact in told})


def test_an_unknown_engine_is_refused(code):
    with pytest.raises(ConfigError, match=r"no engine 'dask'.*local, ray"):
        build_store(Given("a"), code.Letters(), section(), engine="dask")
