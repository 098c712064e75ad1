"""Looks at the text of a query, before any database does."""

from __future__ import annotations

import re

_QUOTED = re.compile(
    r"--[^\n]*|/\*.*?\*/"  # comments
    r"|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'"  # texts
    r'|"(?:[^"]|"")*"|`[^`]*`',  # names
    re.DOTALL,
)
_READS = re.compile(r"[\s(]*(select|with|values|table)\b", re.IGNORECASE)
_ORDER = re.compile(r"\border\s+by\b", re.IGNORECASE)
_DRAWS = re.compile(r"\b(rand|random|newid|uuid|gen_random_uuid)\s*\(", re.IGNORECASE)


def fault_of(query: str) -> tuple[str, str]:
    """What is wrong with a query as a source of documents, with a hint; empty texts where nothing
    is. It must read, be one statement, and decide the order of its rows.

    >>> fault_of("SELECT text FROM documents ORDER BY id")
    ('', '')
    >>> fault_of("SELECT text FROM (SELECT * FROM documents ORDER BY id) AS d")[1]
    'end it with ORDER BY and a key that is unique'
    """
    plain = without_end(_QUOTED.sub(_blank, query))
    if ";" in plain:
        return "is more than one statement", "give one SELECT"
    if not _READS.match(plain):
        return "is no SELECT, and nothing else is sent to the database", ""
    order = _ORDER.search(_outermost(plain))
    if order is None:
        return (
            "has no ORDER BY of its own, so that its rows may come in another order each time",
            "end it with ORDER BY and a key that is unique",
        )
    if _DRAWS.search(plain, order.end()):
        return "draws the order of its rows, so that no run can be repeated", "order by a column"
    return "", ""


def without_end(query: str) -> str:
    """The query without the semicolon at its end."""
    return query.rstrip().rstrip(";").rstrip()


def _blank(match: re.Match[str]) -> str:
    """As many characters of a name, so that places stay what they are."""
    text = match[0]
    return " " * len(text) if text.startswith(("--", "/*")) else "x" * len(text)


def _outermost(text: str) -> str:
    """``text`` of the same length in which what stands in parentheses is blank, but for the ones
    around all of it."""
    inner = text.strip()
    while inner.startswith("(") and _end_of_first(inner) == len(inner) - 1:
        start = text.index("(")
        stop = text.rindex(")")
        text = f"{text[:start]} {text[start + 1 : stop]} {text[stop + 1 :]}"
        inner = text.strip()
    depth, found = 0, []
    for character in text:
        depth -= character == ")"
        found.append(character if depth <= 0 else " ")
        depth += character == "("
    return "".join(found)


def _end_of_first(text: str) -> int:
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return -1
