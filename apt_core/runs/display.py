"""How objects of a run look in a notebook: a small table, without style or script of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

MAX_CHARACTERS = 300


def html_facts(title: str, facts: Mapping[str, object]) -> str:
    """A table of a fact a row, below a title."""
    rows = "".join(f"<tr><th>{_cell(key)}</th><td>{_cell(v)}</td></tr>" for key, v in facts.items())
    return f"<table><caption>{_cell(title)}</caption><tbody>{rows}</tbody></table>"


def html_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a head, below a title."""
    head = "".join(f"<th>{_cell(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows
    )
    return (
        f"<table><caption>{_cell(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _cell(value: object) -> str:
    text = str(value)
    return escape(text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…")
