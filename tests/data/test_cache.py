from __future__ import annotations

import hashlib

import numpy as np
import pytest

from apt_core.cache import cache_dir, cached_array


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


class Maker:
    def __init__(self, values=range(1000)):
        self.values, self.calls = values, 0

    def __call__(self):
        self.calls += 1
        return np.array(self.values, dtype=np.uint16)


def entry(home):
    (path,) = (home / "arrays").iterdir()
    return path


def test_an_array_is_made_once_and_then_mapped(home):
    make = Maker()
    first, second = cached_array("key", make), cached_array("key", make)
    assert make.calls == 1
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable
    assert first.tolist() == second.tolist() == list(range(1000))
    cached_array("other key", make)
    assert make.calls == 2


def sealed(data):
    return data + hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-40],
        lambda data: data[:500] + b"?" + data[501:],
        lambda data: sealed(b"no array"),
        lambda data: sealed(data[:200]),
        lambda data: sealed(data[:-32].replace(b"(1000,)", b"(9e99,)")),
    ],
    ids=["emptied", "truncated", "one byte changed", "sealed text", "sealed part", "sealed shape"],
)
def test_a_damaged_entry_is_made_anew(home, damage):
    make = Maker()
    cached_array("key", make)
    path = entry(home)
    path.write_bytes(damage(path.read_bytes()))
    assert cached_array("key", make).tolist() == list(range(1000))
    assert make.calls == 2
    cached_array("key", make)
    assert make.calls == 2


def test_without_a_home_the_array_is_made_and_not_kept(tmp_path, monkeypatch, caplog):
    """As for a user whom no password file knows: nothing is written into a folder named ~."""

    def unknown(*arguments):
        raise KeyError("uid not found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for variable in ("APT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cached_array("key", Maker()).tolist() == list(range(1000))
    assert "no home directory is known" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled(home):
    with pytest.raises(ValueError):
        cached_array("key", lambda: np.array([object()]))
    assert list((home / "arrays").iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_the_cache_alone(home, caplog):
    home.write_text("a file where the folder would be")
    make = Maker()
    assert cached_array("key", make).tolist() == list(range(1000))
    assert "cannot keep an array in the cache" in caplog.text


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("APT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "apt"
