"""``apt-hooks enable|disable``: the list changes, and nothing else in the file, to the byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_core.cli.hooks import app
from apt_core.config.plugin_list import edit_plugin_list
from apt_core.config.yaml_text import parse_yaml

if TYPE_CHECKING:
    from tests.cli.conftest import Command

ENABLED = {
    "missing key": ("name: x\n", "name: x\nplugins: [new]\n"),
    "missing key, no last line end": ("name: x", "name: x\nplugins: [new]\n"),
    "empty list": ("plugins: []  # none\nname: x\n", "plugins: [new]  # none\nname: x\n"),
    "empty list, apart": ("plugins: [ ]\n", "plugins: [new ]\n"),
    "null": ("plugins: null # none\nname: x\n", "plugins: [new] # none\nname: x\n"),
    "nothing": ("plugins:  # none\nname: x\n", "plugins: [new]  # none\nname: x\n"),
    "flow": ("plugins: [a, b]  # both\n", "plugins: [a, b, new]  # both\n"),
    "flow, trailing comma": ("plugins: [a, b, ]\n", "plugins: [a, b, new, ]\n"),
    "flow, lines": (
        "plugins: [\n  a,  # one\n  b  # two\n]\n",
        "plugins: [\n  a,  # one\n  b, new  # two\n]\n",
    ),
    "block": (
        "plugins:\n  - a  # one\n  # and\n  - b  # two\n\n# next\nname: x\n",
        "plugins:\n  - a  # one\n  # and\n  - b  # two\n  - new\n\n# next\nname: x\n",
    ),
    "block, not indented": ("plugins:\n-   a\nname: x\n", "plugins:\n-   a\n- new\nname: x\n"),
    "block, options": (
        "plugins:\n  - name: a\n    priority: 3  # first\n# next\nname: x\n",
        "plugins:\n  - name: a\n    priority: 3  # first\n  - new\n# next\nname: x\n",
    ),
    "block, no last line end": ("plugins:\n- a", "plugins:\n- a\n- new"),
    "CRLF": ("plugins:\r\n  - a\r\nname: x\r\n", "plugins:\r\n  - a\r\n  - new\r\nname: x\r\n"),
    "byte order mark": ("\ufeffplugins: [a]\n", "\ufeffplugins: [a, new]\n"),
    "not ASCII": ("# für später\nplugins: [ä]\n", "# für später\nplugins: [ä, new]\n"),
}
DISABLED = {
    "flow, only": ("plugins: [old]  # one\n", "plugins: []  # one\n"),
    "flow, first": ("plugins: [old, b]\n", "plugins: [b]\n"),
    "flow, middle": ("plugins: [a, old, b]\n", "plugins: [a, b]\n"),
    "flow, last": ("plugins: [a, {name: old, priority: 1}]\n", "plugins: [a]\n"),
    "flow, twice": ("plugins: [old, a, old]\n", "plugins: [a]\n"),
    "flow, a line of its own": (
        "plugins: [\n  a,  # one\n  old,  # gone\n  b  # two\n]\n",
        "plugins: [\n  a,  # one\n  b  # two\n]\n",
    ),
    "flow, before the bracket": (
        "plugins: [a,  # one\n  old]\n",
        "plugins: [a,  # one\n  ]\n",
    ),
    "block, first": ("plugins:\n  - old\n  # b\n  - b\n", "plugins:\n  # b\n  - b\n"),
    "block, last": ("plugins:\n- a\n- old # gone\n# x\nname: x\n", "plugins:\n- a\n# x\nname: x\n"),
    "block, options": (
        "plugins:\n  - name: old\n    priority: 3\n  # note: of b\n  - b\n",
        "plugins:\n  # note: of b\n  - b\n",
    ),
    "block, only": (
        "plugins:  # note: one\n  # see: docs\n  - old\nname: x\n",
        "plugins: []  # note: one\n  # see: docs\nname: x\n",
    ),
    "CRLF": ("plugins:\r\n- a\r\n- old\r\nname: x\r\n", "plugins:\r\n- a\r\nname: x\r\n"),
}


@pytest.mark.parametrize(("before", "after"), ENABLED.values(), ids=ENABLED)
def test_enable_adds_to_the_list_as_it_is_written(
    command: Command, folder: Path, before: str, after: str
) -> None:
    profile = folder / "mine.yaml"
    profile.write_bytes(before.encode())
    done = command(app, "enable", "new", "-p", "mine.yaml")
    assert (done.code, done.out) == (0, "new enabled in mine.yaml\n")
    assert profile.read_bytes().decode() == after


@pytest.mark.parametrize(("before", "after"), DISABLED.values(), ids=DISABLED)
def test_disable_takes_the_plugin_out_and_leaves_the_rest(
    command: Command, folder: Path, before: str, after: str
) -> None:
    profile = folder / "mine.yaml"
    profile.write_bytes(before.encode())
    done = command(app, "disable", "old", "-p", "mine.yaml")
    assert (done.code, done.out) == (0, "old disabled in mine.yaml\n")
    assert profile.read_bytes().decode() == after


# Any list, with anything around it

NAMES = ["moe", "my_idea.py", "./ideas/größe.py", "pkg.mod", "yes", "1e3", "a b"]
names = st.sampled_from(NAMES)
comments = st.sampled_from(["", "  # why", "  # note: [a, - b]", "  # für später"])
others = st.lists(
    st.sampled_from(["# plugins: [x]", "name: größe", "", "model:\n  d_model: 64  # wide"]),
    unique=True,
    max_size=4,
)


def quoted(name: str) -> str:
    return f"'{name}'" if name in ("yes", "1e3") else name


@st.composite
def items(draw: st.DrawFn, name: str, indent: str) -> str:
    """One item of a block list, its comments and its options with it."""
    above = f"{indent}{comment.strip()}\n" if (comment := draw(comments)) else ""
    if draw(st.booleans()):
        return f"{above}{indent}- {quoted(name)}{draw(comments)}\n"
    options = f"{indent}  priority: {draw(st.integers(0, 100))}{draw(comments)}\n"
    return f"{above}{indent}- name: {quoted(name)}{draw(comments)}\n{options}"


@st.composite
def profiles(draw: st.DrawFn) -> tuple[str, list[str]]:
    """The text of a profile, and the names that it lists."""
    listed = draw(st.lists(names, unique=True, max_size=4))
    lines = draw(others)
    form = draw(st.sampled_from(["block", "flow", "lines"]))
    if not listed or form == "flow":
        written = f"plugins: [{', '.join(map(quoted, listed))}]{draw(comments)}\n"
    elif form == "block":
        indent = draw(st.sampled_from(["", "  ", "    "]))
        entries = [draw(items(name, indent)) for name in listed]
        written = f"plugins:{draw(comments)}\n{''.join(entries)}"
    else:
        entries = [f"  {quoted(name)},{draw(comments)}\n" for name in listed]
        written = f"plugins: [{draw(comments)}\n{''.join(entries)}]\n"
    place = draw(st.integers(0, len(lines)))
    around = ["".join(f"{line}\n" for line in part) for part in (lines[:place], lines[place:])]
    text = around[0] + written + around[1]
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"]))), listed


def read(profile: Path) -> list[str]:
    listed = parse_yaml(profile.read_text(encoding="utf-8"), "mine.yaml").data["plugins"]
    return [item["name"] if isinstance(item, dict) else item for item in listed]


anything = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", [*NAMES, "007", "null", "a: b", "a, b", "[a]", "# a"])
def test_what_is_enabled_is_read_as_the_same_text(folder: Path, name: str) -> None:
    profile = folder / "mine.yaml"
    for text in ("plugins: [x]\n", "plugins:\n- x\n", "plugins: []\n", "name: y\n"):
        profile.write_text(text)
        edit_plugin_list(profile, name, present=True)
        assert read(profile)[-1] == name


@anything
@given(written=profiles())
def test_enabling_and_disabling_again_gives_the_same_bytes(
    folder: Path, written: tuple[str, list[str]]
) -> None:
    text, listed = written
    profile = folder / "mine.yaml"
    profile.write_bytes(text.encode())
    assert edit_plugin_list(profile, "new", present=True)
    assert read(profile) == [*listed, "new"]
    edited = profile.read_bytes()
    assert not edit_plugin_list(profile, "new", present=True) and profile.read_bytes() == edited
    assert edit_plugin_list(profile, "new", present=False)
    assert profile.read_bytes() == text.encode()


@anything
@given(written=profiles(), data=st.data())
def test_disabling_keeps_every_other_line(
    folder: Path, written: tuple[str, list[str]], data: st.DataObject
) -> None:
    text, listed = written
    profile = folder / "mine.yaml"
    profile.write_bytes(text.encode())
    gone = data.draw(st.sampled_from([*listed, "absent"]))
    assert edit_plugin_list(profile, gone, present=False) == (gone in listed)
    left = [name for name in listed if name != gone]
    assert read(profile) == left
    before, after = text.encode().split(b"\n"), iter(profile.read_bytes().split(b"\n"))
    on_its_lines = [quoted(gone).encode(), b"priority:", b"plugins:"]
    kept = [line for line in before if not any(mark in line for mark in on_its_lines)]
    assert all(line in after for line in kept)


# What is not edited


def test_a_plugin_that_is_there_already_or_not_at_all_changes_nothing(
    command: Command, folder: Path
) -> None:
    profile = folder / "mine.yaml"
    profile.write_bytes(b"plugins: [moe]\n")
    again = command(app, "enable", "moe", "-p", "mine.yaml")
    assert (again.code, again.out) == (0, "moe is enabled already in mine.yaml\n")
    absent = command(app, "disable", "meo", "-p", "mine.yaml")
    assert (absent.code, absent.out) == (
        0,
        "meo is not listed in mine.yaml (did you mean 'moe'?)\n",
    )
    assert profile.read_bytes() == b"plugins: [moe]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: other\n", "edit it by hand: plugins: [a, new]"),
        ("plugins: &p\n  - a\nname: *p\n", "edit it by hand"),
        ("plugins: 3\n", "mine.yaml:1: plugins: is not a list"),
        ("plugins: [a\n", "YAML syntax"),
        ("", "the profile is empty"),
    ],
)
def test_what_cannot_be_edited_safely_is_bad_input_and_stays(
    command: Command, folder: Path, text: str, said: str
) -> None:
    (folder / "other.yaml").write_text("plugins: [a]\n")
    profile = folder / "mine.yaml"
    profile.write_text(text)
    done = command(app, "enable", "new", "-p", "mine.yaml")
    assert done.code == 2 and said in done.err
    assert profile.read_text() == text


def test_a_plugin_is_found_by_every_spelling(command: Command, folder: Path) -> None:
    profile = folder / "mine.yaml"
    for written in ("my-log", "./My_Log.py", "ideas.my_log"):
        profile.write_text(f"plugins: [{written}, a]  # two\n")
        again = command(app, "enable", "my_log.py", "-p", "mine.yaml")
        assert again.out == f"my_log.py is enabled already in mine.yaml, as {written}\n"
        assert command(app, "disable", "my_log.py", "-p", "mine.yaml").code == 0
        assert profile.read_text() == "plugins: [a]  # two\n"


def test_a_list_of_what_looks_like_numbers_is_edited(folder: Path) -> None:
    profile = folder / "mine.yaml"
    profile.write_text("plugins: [1e3, {name: 0x10, priority: 1}, on]\n")
    assert edit_plugin_list(profile, "0x10", present=False)
    assert edit_plugin_list(profile, "2.50", present=True)
    assert profile.read_text() == "plugins: [1e3, on, '2.50']\n"


@pytest.mark.parametrize(
    ("verb", "wanted"), [("disable", "b"), ("disable", "A.py"), ("enable", "new")]
)
def test_an_inherited_list_is_not_said_to_have_changed(
    command: Command, folder: Path, verb: str, wanted: str
) -> None:
    (folder / "parent.yaml").write_text("plugins: [a, {name: b, on_failure: required}]\n")
    (folder / "child.yaml").write_text("extends: parent\nname: child\n")
    done = command(app, verb, wanted, "-p", "child.yaml")
    left = {"b": "a", "A.py": "b", "new": "a, b, new"}[wanted]
    assert done.code == 2 and "disabled" not in done.out
    assert "the list is inherited (parent.yaml:1), so that nothing was changed" in done.err
    assert f"edit it by hand: plugins: [{left}], which replaces the inherited list" in done.err
    assert (folder / "child.yaml").read_text() == "extends: parent\nname: child\n"
    # What it says is true.
    with (folder / "child.yaml").open("a") as file:
        file.write(f"plugins: [{left}]\n")
    assert command(app, verb, wanted, "-p", "child.yaml").code == 0


def test_the_profile_may_be_named_as_anywhere(command: Command, folder: Path) -> None:
    local = folder / "profiles" / "mine.yaml"
    local.parent.mkdir()
    local.write_text("name: x\n")
    assert command(app, "enable", "new", "-p", "mine").code == 0
    assert "plugins: [new]\n" in local.read_text()


def test_profiles_that_come_with_apt_are_not_edited(command: Command) -> None:
    assert not os.listdir()
    done = command(app, "enable", "new", "-p", "tiny_debug")
    assert done.code == 2
    assert "write a profile of your own that says `extends: tiny_debug`" in done.err


def test_a_profile_that_cannot_be_written_is_bad_input(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine.yaml").write_text("name: mine\n")

    def refuse(path: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    done = command(app, "enable", "new", "-p", "mine.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: mine.yaml: plugins: cannot be written: permission denied "
        "(edit it by hand: plugins: [new])\n"
    )
