"""Run every block of docs/tutorial.md from top to bottom, in an empty folder.

python docs/run_tutorial.py            in a virtual environment of its own
python docs/run_tutorial.py --here     with what is installed already, after the section on that
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
NEEDED = ("apt_core", "apt_plugins", "profiles", "tests", "setup.cfg", "pyproject.toml",
          "README.md", "LICENSE", "constraints.txt")  # fmt: skip
"""What an installation is made from."""
MARK = "\x1e"


@dataclass(frozen=True)
class Step:
    """A file to write, or a command with the lines that it is said to print."""

    section: str
    file: str = ""
    text: str = ""
    command: str = ""
    shown: tuple[str, ...] = ()


def steps(page: Path = PAGE) -> Iterator[Step]:
    """The blocks of the page, in order."""
    for part in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
        section = part.partition("\n")[0]
        for block in BLOCK.finditer(part):
            if block["file"]:
                yield Step(section, file=block["file"], text=block["text"])
                continue
            if block["language"] != "console":
                raise ValueError(f"a block of {block['language']} is neither a file nor a console")
            for lines in re.split(r"^\$ ", block["text"], flags=re.M)[1:]:
                command, *shown = lines.splitlines()
                yield Step(section, command=command, shown=tuple(shown))


def is_shown(expected: str, printed: str) -> bool:
    """Whether a line is among those that were printed; … stands for anything."""
    pattern = re.compile(".*".join(re.escape(" ".join(p.split())) for p in expected.split("…")))
    return any(pattern.search(" ".join(line.split())) for line in printed.splitlines())


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the blocks of docs/tutorial.md in order.")
    parser.add_argument("--here", action="store_true", help="use what is installed already")
    here = parser.parse_args(args).here
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "APT_CACHE": str(folder / "cache")}
        if here:
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        else:
            _copy_to(folder)
        return _run(
            [s for s in steps() if not (here and s.section == "Install")], folder, environment
        )


def _copy_to(folder: Path) -> None:
    """Copy what an installation is made from: building leaves files where it is done."""
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)


def _run(todo: Sequence[Step], folder: Path, environment: dict[str, str]) -> int:
    """Run the steps in one shell, which keeps what a command sets; 1 where one fails or prints
    something else."""
    shell = subprocess.Popen(
        [shutil.which("bash") or "/bin/bash"],
        cwd=folder, env=environment, text=True, errors="replace",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert shell.stdin is not None and shell.stdout is not None
    for step in todo:
        if step.file:
            (folder / step.file).write_text(step.text, encoding="utf-8")
            continue
        print(f"$ {step.command}", flush=True)
        # The shell itself reads its commands from stdin: no program may.
        redirect = "" if "<" in step.command or step.command.startswith(". ") else " < /dev/null"
        shell.stdin.write(f"{step.command}{redirect}\nprintf '{MARK}%d\\n' $?\n")
        shell.stdin.flush()
        printed = ""
        for line in shell.stdout:
            text, mark, code = line.partition(MARK)
            printed += text
            print(text, end="", flush=True)
            if mark:
                break
        missing = [line for line in step.shown if not is_shown(line, printed)]
        if int(code) or missing:
            shell.kill()
            what = f"ended with {code.strip()}" if int(code) else f"did not print: {missing}"
            print(f"\nerror: in {step.section!r}, {step.command!r} {what}", file=sys.stderr)
            return 1
    shell.stdin.close()
    shell.wait()
    print(f"\nall of {PAGE.relative_to(ROOT)} was run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
