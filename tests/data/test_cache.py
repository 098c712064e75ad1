from __future__ import annotations

from apt_core.cache import cache_dir


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("APT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "apt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "apt"
