"""The engine of Ray makes the store that local processes make, whatever becomes of its own."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest

from apt_core.data.store import input as chunking
from apt_core.data.store.build import build_store
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.errors import ConfigError
from apt_core.providers.dataset import DataSection, DatasetProvider

TOKENIZER = """\
import os
import signal
from pathlib import Path

from apt_core.providers import TokenizerProvider

MARK = Path({mark!r})


class Bytes(TokenizerProvider):
    vocab_size = 256

    def encode(self, text):
        if "killed once" in text and os.getpid() != {builder} and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()

    def fingerprint(self):
        return "bytes"
"""


class Lines(DatasetProvider):
    def documents(self) -> Iterator[str]:
        for number in range(400):
            yield f"line {number}{' killed once' if number == 200 else ''}"

    def fingerprint(self) -> str:
        return "lines"


@pytest.mark.timeout(180)
def test_ray_makes_the_same_bytes_though_a_process_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    mark = tmp_path / "mark"
    code = TOKENIZER.format(mark=str(mark), builder=os.getpid())
    (tmp_path / "bytes_for_ray.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(chunking, "CHUNK_DOCUMENTS", 20)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from bytes_for_ray import Bytes  # type: ignore[import-not-found]

    made = {}
    for engine, workers in (("local", 1), ("ray", 2)):
        monkeypatch.setenv("APT_CACHE", str(tmp_path / engine))
        store = build_store(Lines(), Bytes(), DataSection(), engine=engine, workers=workers)
        files = {p.name: p.read_bytes() for p in store.folder.iterdir() if p.suffix != ".json"}
        made[engine] = store.manifest, files
    assert mark.exists()
    assert made["local"] == made["ray"] and len(made["ray"][1]) >= 4


def test_ray_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "ray", None)
        with pytest.raises(ConfigError, match=r"needs Ray.*pip install \"apt-kernel\[ray\]\""):
            build_store(Lines(), ByteTokenizer(), DataSection(), engine="ray")
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"cannot use the cluster at {address}: .*refused"):
        build_store(Lines(), ByteTokenizer(), DataSection(), engine="ray")
    assert not [*tmp_path.glob("stores/*.building-*")]
