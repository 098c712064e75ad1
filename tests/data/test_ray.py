"""The engine of Ray makes the bytes of local processes, also where its workers are killed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from apt_core.data.store import format as store_format
from apt_core.data.store import local
from apt_core.data.store.build import build_store
from apt_core.errors import ConfigError
from apt_core.providers.dataset import DataSection, DatasetProvider

MODULE = """
import os
import signal
from pathlib import Path

from apt_core.providers.tokenizer import TokenizerProvider


class Mortal(TokenizerProvider):
    '''Kills its process at the word "fatal", as often as there are files in a folder, and writes in
    a file where it was called with "refused".'''

    name = "mortal"
    vocab_size = 256

    def encode(self, text):
        folder = Path(self.config["folder"])
        if os.getpid() != self.config["builder"]:
            if "fatal" in text and (files := list(folder.glob("kill*"))):
                files[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / f"worker-{os.getpid()}").touch()
        if "refused" in text:
            with open(folder / "refusals", "a") as file:
                file.write("x")
            raise ValueError("has no id for it")
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def fingerprint(self):
        return "mortal"
"""


class Lines(DatasetProvider):
    """Documents, one of which is given."""

    name = "lines"

    def __init__(self, middle: str = "fatal") -> None:
        super().__init__()
        self.middle = middle

    def documents(self):
        for number in range(60):
            text = self.middle if number == 30 else f"Ünïcode {number} " * (number + 1)
            yield {"text": text} if number % 2 else {"prompt": f"{number}?", "response": text}

    def fingerprint(self):
        return self.middle


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """An own cluster of two workers, as the engine starts it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    from apt_core.data.store.ray import _connected, _imported

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        before, ray = signal.getsignal(signal.SIGTERM), _imported()
        with _connected(ray, 2):
            yield ray
        assert not ray.is_initialized()
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "ray_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(local, "START_AFTER", 1)
    monkeypatch.setattr("apt_core.data.store.input.CHUNK_CHARS", 1500)
    yield tmp_path
    sys.modules.pop("ray_parts", None)


def built(folder, monkeypatch, engine, source, **settings):
    monkeypatch.setenv("APT_CACHE", str(folder / f"cache-{engine}"))
    parts = importlib.import_module("ray_parts")
    tokenizer = parts.Mortal({"folder": str(folder), "builder": os.getpid()})
    section = DataSection(**settings)
    source.data_section = section
    return build_store(source, tokenizer, section, engine=engine, workers=2)


def content(store):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in store.folder.iterdir()
        if path.is_file() and path.name != store_format.CHECKED
    }


def test_ray_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="needs Ray") as caught:
        built(folder, monkeypatch, "ray", Lines())
    assert "apt-kernel[ray]" in caught.value.problems[0].hint
    assert not [*folder.glob("cache-ray/stores/*.building-*")]


def test_a_cluster_that_does_not_answer_is_named(folder, monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read at the import
    pytest.importorskip("ray", reason="Ray is not installed")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"cannot use the cluster at {address}: .*refused"):
        built(folder, monkeypatch, "ray", Lines())


def test_ray_and_local_processes_make_the_same_bytes_also_when_a_worker_is_killed(
    cluster, folder, monkeypatch
):
    expected = content(built(folder, monkeypatch, "local", Lines()))
    used = list(folder.glob("worker-*"))
    assert used
    for path in used:
        path.unlink()
    (folder / "kill").touch()
    store = built(folder, monkeypatch, "ray", Lines())
    assert content(store) == expected
    assert "train-00000.learned" in expected
    assert not (folder / "kill").exists()
    assert list(folder.glob("worker-*"))
    assert cluster.is_initialized()  # it was there before


def test_a_document_that_kills_each_worker_ends_the_build(cluster, folder, monkeypatch):
    for number in range(9):
        (folder / f"kill{number}").touch()
    with pytest.raises(store_format.StoreError, match=r"lines documents\(\) \d+.*3 attempts"):
        built(folder, monkeypatch, "ray", Lines())
    # The first attempt and its repetitions.
    assert len(list(folder.glob("kill*"))) == 9 - local.ATTEMPTS
    assert [path.name for path in (folder / "cache-ray/stores").iterdir()] == []


def test_a_tokenizer_that_refuses_a_document_is_not_asked_again(cluster, folder, monkeypatch):
    with pytest.raises(ConfigError, match="has no id for it") as caught:
        built(folder, monkeypatch, "ray", Lines("refused"))
    assert caught.value.problems[0].where == "lines documents() 31"
    # All documents at once, then one by one to find the one.
    assert (folder / "refusals").read_text() == "xx"


def listening(name: str) -> set[str]:
    """The addresses, as the kernel writes them, on which processes of this name listen."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if name in (process / "cmdline").read_text(errors="replace"):
                sockets |= {os.readlink(each) for each in (process / "fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *rest = row.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.add(address.partition(":")[0])
    return found


def test_a_cluster_of_its_own_is_reached_from_this_machine_alone(cluster):
    assert listening("raylet")
    assert all(address.endswith("0100007F") for address in listening("raylet"))
