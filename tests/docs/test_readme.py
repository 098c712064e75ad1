"""The Chinese README is in step with the English one: the same commands, links and parts."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
)


def test_both_have_the_same_blocks_in_the_same_order() -> None:
    blocks = re.compile(r"^```\w+\n.*?^```$", re.M | re.S)
    assert blocks.findall(CHINESE) == blocks.findall(ENGLISH) and blocks.findall(ENGLISH)


def test_both_have_the_same_commands_folders_and_parts() -> None:
    rows = re.compile(r"^\| (`.+?) \| ", re.M)
    assert rows.findall(CHINESE) == rows.findall(ENGLISH) and len(rows.findall(ENGLISH)) > 20
    parts = [len(re.findall(r"^## ", text, re.M)) for text in (ENGLISH, CHINESE)]
    assert parts[0] == parts[1]


def test_both_lead_to_the_same_pages() -> None:
    own = {"README.md", "README.zh-CN.md"}
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - own for text in (ENGLISH, CHINESE)]
    assert links[0] == links[1]


def test_options_that_are_told_of_are_the_same() -> None:
    """In the text, outside of blocks."""
    options = [
        set(re.findall(r"--[a-z][\w-]*", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)))
        for text in (ENGLISH, CHINESE)
    ]
    assert options[0] == options[1]
