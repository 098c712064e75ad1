"""Input without an end, or of absurd size: refused in a sentence, with work in proportion to it."""

from __future__ import annotations

import difflib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apt_core import discovery
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.code_source import source_sha256
from apt_core.config import Source, parse_override, read_profile, validate
from apt_core.config.source import Marks
from apt_core.config.yaml_text import MAX_NODES, parse_yaml
from apt_core.errors import ConfigError, Problem, did_you_mean
from apt_core.files import read_file, read_lines


@pytest.fixture(params=["pipe", "device", "socket", "folder"])
def no_file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Something of the file system that is no file, called x.py."""
    monkeypatch.chdir(tmp_path)
    path = Path("x.py")
    bound = socket.socket(socket.AF_UNIX)
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            bound.bind(str(path))
        case "folder":
            path.mkdir()
    yield path
    bound.close()


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_never_waited_for(no_file: Path) -> None:
    Path("child.yaml").write_text("extends: ./x.py\n")
    for profile in (no_file, "child.yaml"):
        with pytest.raises(ConfigError, match=r"it is a|is a directory"):
            read_profile(profile)
    with pytest.raises(discovery.LoadError, match=r"is a folder|is not a regular file"):
        discovery.load(str(no_file), {})
    package = Path("package")
    package.mkdir()
    for name in ("__init__.py", "plugin.py"):
        (package / name).write_text("")
    no_file.rename(package / "x.py")

    code = compile("def hook(): pass", str(package / "plugin.py"), "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    assert source_sha256(names["hook"]) == ""


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_file(path) == read_file(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="larger than"):
        read_file(path, 99)
    path.write_bytes(b"ab\n" + b"x" * 100 + b"\ncd")
    assert list(read_lines(path, 10)) == [b"ab\n", b"x" * 10, b"cd"]


def test_a_plugin_file_that_no_person_wrote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(discovery.LoadError, match="larger than 10 MB"):
        discovery.load(str(path), {})


def test_values_are_counted_while_they_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = 0

    def count(self: Any, anchor: Any) -> yaml.Node:
        nonlocal composed
        composed += 1
        return original(self, anchor)

    original = yaml.composer.Composer.compose_scalar_node
    monkeypatch.setattr(yaml.composer.Composer, "compose_scalar_node", count)
    with pytest.raises(ConfigError, match="more than 50,000 keys and values"):
        parse_yaml("a: [" + "1," * 60_000 + "1]", "x")
    assert composed <= MAX_NODES


def test_few_unknown_keys_are_compared_with_all_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def count(*arguments: Any, **options: Any) -> list[str]:
        nonlocal compared
        compared += 1
        return []

    monkeypatch.setattr(difflib, "get_close_matches", count)
    profile = {f"key{i}": i for i in range(1000)} | {"model": {f"k{i}": i for i in range(1000)}}
    checked = validate(Source.from_dict(profile))
    assert len(checked.problems) == 2000 and 0 < compared <= 500


class Counted(str):
    """A key that counts how often it is looked at."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Counted.looks += 1
        return str.__hash__(self)


def test_putting_one_profile_on_another_looks_at_each_key_a_few_times() -> None:
    def source(name: str) -> Source:
        data = {Counted(f"k{i}"): i for i in range(1000)}
        places = {(key,): f"{name}:{key}" for key in data}
        return Source(name, data, marks=Marks({(): name, **places}))

    parent, child = source("parent"), source("child")
    Counted.looks = 0
    merged = parent.below(child)
    assert Counted.looks <= 50_000
    assert merged.where("k7") == "child:k7"


def test_the_first_problems_are_printed_and_the_others_counted() -> None:
    text = str(ConfigError([Problem(f"wrong {i}") for i in range(200_000)]))
    assert text.startswith("200,000 problems:\n  - wrong 0\n")
    assert text.endswith("\n  - wrong 49\n  and 199,950 more")
    text = str(ConfigError(Problem("x" * 10**6, "k" * 10**6, "w" * 10**6, "h" * 10**6)))
    assert len(text) < 9_000 and "(1,000,000 characters)" in text
    assert did_you_mean("d" * 201, ["d" * 201]) == ""


def test_no_more_arguments_and_plugins_than_a_person_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("many.yaml").write_text("plugins:\n" + "".join(f"- p{i}\n" for i in range(2000)))
    monkeypatch.setattr("apt_core.config.parse_override", pytest.fail)
    monkeypatch.setattr("apt_core.activation.load", pytest.fail)
    known = ["-p", "tiny_debug", "--dry-run"]
    for arguments, said in (
        ([*known, *["--set", "a.b=1"] * 3000], "more than 2,000 arguments"),
        ([*known, *["word"] * 3000], "more than 2,000 arguments"),
        ([*known, "--plugin", ",".join(f"p{i}" for i in range(2000))], "names 2,000 plugins"),
        (["-p", "many.yaml", "--dry-run"], "plugins: holds more than the 1,000 items"),
    ):
        assert run_command(app, "apt-train", arguments) == 2
        assert said in capsys.readouterr().err
    monkeypatch.undo()
    override = parse_override("name=x")
    with pytest.raises(ConfigError, match="1,001 keys are given"):
        Source.from_dict({}).with_overrides([override] * 1001)
    with pytest.raises(ConfigError, match=r"a key of 100,000 parts"):
        parse_override(".".join("a" * 100_000) + "=1")


def test_the_deepest_profile_that_is_read_does_not_exhaust_the_stack() -> None:
    limit = sys.getrecursionlimit()
    assert limit <= 10_000
    for depth in (30, 39, 41, 900, 100_000):
        text = "a: " + "[" * depth + "]" * depth
        try:
            validate(Source.from_dict(parse_yaml(text, "x").data))
        except ConfigError as error:
            assert depth > 30 and "nested" in str(error)


def test_a_key_that_is_no_text_is_refused() -> None:
    """Arguments of a command may be any bytes, which are half surrogate pairs then."""
    with pytest.raises(ConfigError, match="is no key"):
        parse_override("\udcff=1")
    (problem,) = Source.from_dict({"\ud800": 1}).problems
    assert "is no key: half a surrogate pair" in problem.message
