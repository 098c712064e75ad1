"""Prepares text before it is tokenised: de-duplication and the held-out part."""

from __future__ import annotations


def paragraphs(text: str) -> list[str]:
    """The paragraphs of ``text``, which blank lines separate, with their indentation."""
    blocks: list[str] = []
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            blocks.append("\n".join(lines))
            lines = []
    return blocks


def deduplicate_paragraphs(text: str) -> str:
    """``text`` with each paragraph kept only where it first occurs, one blank line between."""
    return "\n\n".join(dict.fromkeys(paragraphs(text)))


def hold_out(text: str, fraction: float = 0.1) -> tuple[str, str]:
    """Cut ``text`` into (train, held out); the held-out part is the last ``fraction`` of it.

    The cut is put after the last blank line before that point, if there is one within half of the
    held-out size, else after the last line end there, else at that character, so that the held-out
    part is never smaller than ``fraction``. The two parts together are ``text``.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")
    cut = len(text) - max(1, round(len(text) * fraction)) if text else 0
    earliest = max(0, cut - (len(text) - cut) // 2)
    for boundary in ("\n\n", "\n"):
        found = text.rfind(boundary, earliest, cut)
        if found > 0:
            cut = found + len(boundary)
            break
    return text[:cut], text[cut:]
