"""Reads what a user types, or a script sends: messages of one line or several."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

from apt_core.errors import ConfigError

BLOCK = '"""'
CONTINUED = "\\"

PROMPT = "> "
MORE = ". "


class Input:
    """Standard input as messages. A line that ends in ``\\`` goes on in the next; what stands
    between two ``\"\"\"`` is one message. On a terminal lines can be edited, and ``complete(text)``
    gives what a line may go on with.
    """

    def __init__(self, complete: Callable[[str], Iterable[str]]) -> None:
        self.interactive = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        self._readline = _readline(complete) if self.interactive else None

    def read(self) -> str | None:
        """The next message or command, None at the end of the input.

        Raises KeyboardInterrupt for Ctrl-C, which takes back what was typed, and ConfigError for
        what is no UTF-8.
        """
        line = self._line(PROMPT)
        if line is None:
            return None
        begin = line.lstrip()
        text = self._block(begin[len(BLOCK) :]) if begin.startswith(BLOCK) else self._lines(line)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError("the input is not UTF-8") from None
        return text

    def _block(self, first: str) -> str:
        """The rest of a block whose ``first`` line has begun."""
        lines = [first]
        while not lines[-1].rstrip().endswith(BLOCK):
            line = self._line(MORE)
            if line is None:
                return "\n".join(lines)
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        # The marks may stand on lines of their own.
        inner = lines[1:] if len(lines) > 1 and not lines[0].strip() else lines
        inner = inner[:-1] if len(inner) > 1 and not inner[-1].strip() else inner
        return "\n".join(inner)

    def _lines(self, line: str) -> str:
        lines = [line]
        while lines[-1].endswith(CONTINUED):
            lines[-1] = lines[-1].removesuffix(CONTINUED)
            more = self._line(MORE)
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        """A line without its end."""
        try:
            if self._readline is not None and sys.stdout.isatty():
                return input(prompt)
            if self.interactive:
                sys.stderr.write(prompt)
                sys.stderr.flush()
            line = sys.stdin.readline()
        except EOFError:
            return None
        except OSError:  # the terminal is gone
            return None
        return line.removesuffix("\n").removesuffix("\r") if line else None


def _readline(complete: Callable[[str], Iterable[str]]) -> Any:
    """The module that lets lines be edited, set up; None where Python comes without it."""
    try:
        import readline
    except ImportError:
        return None
    found: list[str] = []

    def completed(text: str, state: int) -> str | None:
        if state == 0:
            line = readline.get_line_buffer()
            skipped = len(line[: readline.get_endidx()]) - len(text)
            found[:] = [
                each[skipped:] for each in complete(line) if each.startswith(line) and skipped >= 0
            ]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completed)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    return readline
