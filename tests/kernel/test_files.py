"""Files whose names come from outside are read in bounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from apt_core.files import PIECE, read_file
from apt_core.json_files import MAX_BYTES, read_json


def test_a_small_file_takes_little_memory_whatever_it_might_hold(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text('{"a": 1}')
    tracemalloc.start()
    try:
        assert read_json(tmp_path / "small.json") == {"a": 1}
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 * PIECE < MAX_BYTES


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_a_file_up_to_the_limit_is_read_whole_and_a_larger_one_refused(
    tmp_path: Path, size: int
) -> None:
    path, data = tmp_path / "data", bytes(range(256)) * (size // 256 + 1)
    path.write_bytes(data[:size])
    assert read_file(path, size) == data[:size]
    path.write_bytes(data[: size + 1] or b"x")
    with pytest.raises(OSError, match="larger than"):
        read_file(path, size)
