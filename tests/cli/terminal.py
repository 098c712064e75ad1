"""A command in a terminal of its own."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 120
"""How long a terminal is waited for at the most."""

SCRIPT = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C and a hangup are for whoever has the terminal
from apt_core.__main__ import main
main()
"""

PROMPT = r"(?:^|\n)> $"
MORE = r"\n\. $"


class Terminal:
    """``python -m apt_core`` with ``arguments`` in ``folder``; close it in the end."""

    def __init__(self, *arguments: object, folder: Path) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
            start_new_session=True,
        )
        os.close(theirs)

    def until(self, pattern: str) -> str:
        """What it prints up to the first match of ``pattern``."""
        printed = b""
        end = time.monotonic() + SECONDS
        while True:
            text = printed.decode(errors="replace").replace("\r\n", "\n")
            if re.search(pattern, text):
                return text
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {text!r}"
            try:
                printed += os.read(self.ours, 1 << 16)
            except OSError:  # the other end is closed
                assert pattern == "", f"no {pattern!r} in {text!r}"
                return text

    def say(self, text: str, pattern: str = PROMPT) -> str:
        """Type a line, and return what is printed then up to the next prompt, without either."""
        os.write(self.ours, f"{text}\n".encode())
        printed = self.until(pattern)
        return re.sub(pattern, "", printed.partition("\n")[2])

    def press(self, key: bytes, pattern: str = PROMPT) -> str:
        os.write(self.ours, key)
        return self.until(pattern)

    def wait_for_idle(self) -> None:
        """Wait until it sleeps. Python's readline does not hear a signal that comes between a key
        and its waiting for the next one."""
        end = time.monotonic() + SECONDS
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end
            time.sleep(0.001)

    def hang_up(self) -> None:
        os.close(self.ours)
        self.ours = -1

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.ours >= 0:
            os.close(self.ours)
