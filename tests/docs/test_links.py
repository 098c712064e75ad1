"""Links of every page lead to files and headings that there are, also in pages that Sphinx does not
build."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(
    r"(?<!\\)\]\(([^()\s]+)\)|<(?:img|a|source)\b[^>]*?(?:src|srcset|href)=\"([^\"]+)\""
)
BLOCK = re.compile(r"^(```|~~~).*?^\1$|^    .*?$", re.M | re.S)


def links(text: str) -> list[str]:
    """The targets of links and pictures, those in code left out."""
    text = re.sub(r"`[^`\n]+`", "``", BLOCK.sub("", text))
    return [markdown or html for markdown, html in LINK.findall(text)]


@cache
def anchors(path: Path) -> set[str]:
    """What a heading is called in links, on GitHub as with Sphinx."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(f"{name}-{number}" if number else name)
    return found


def dead(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere. Addresses outside of the project are not looked up."""
    bad = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            if not target.startswith(("https://", "mailto:")):
                bad.append(target)
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        inside = path.is_relative_to(ROOT) and path.exists()
        if not inside or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            bad.append(target)
    return bad


def test_a_dead_link_is_noticed() -> None:
    page = ROOT / "docs" / "report.md"
    text = "[a](nofile.md) [b](plugins.md#no-such) [c](#nothing) [d](http://x.y) `[e](no.md)`"
    assert dead(page, text) == ["nofile.md", "plugins.md#no-such", "#nothing", "http://x.y"]
    assert dead(page, '![a](figures/no.png) <img src="no.svg"> [b](../../out.md)') == [
        *("figures/no.png", "no.svg", "../../out.md")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead(page, page.read_text(encoding="utf-8")) == []
