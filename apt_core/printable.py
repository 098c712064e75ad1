"""Text that a terminal shows and does not obey."""

from __future__ import annotations

from apt_core.secrets import redact


def printable(text: str, keep: str = "\n\t") -> str:
    """``text`` with control characters, lone surrogates and the like as escapes, but for those to
    ``keep``. Everything that is printed goes through here: names, messages and samples may hold
    sequences that move the cursor or rename the window, and file names may be no UTF-8. Secrets of
    profiles are masked.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    text = redact(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
