"""Guides as tests: their files are written, their commands run, and what they show is compared.

A fenced block with ``<!-- file: NAME -->`` before it is a file; a ``console`` block holds commands
(``$ …``) with lines that they print, in which ``…`` stands for anything. A section works with the
files of all sections of its page.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import apt_core.cli.chat
import apt_core.cli.data
import apt_core.cli.eval
import apt_core.cli.generate
import apt_core.cli.hooks
import apt_core.cli.new
import apt_core.cli.train
import apt_plugins.export.command
import apt_plugins.report.command
from apt_core.cli.run_command import run_command
from apt_core.defaults import core_providers
from apt_core.plugin_records import NOT_IN_EFFECT, STATES
from tests.optional import optional

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TUTORIAL = runpy.run_path(str(ROOT / "docs" / "run_tutorial.py"))
BLOCK, is_shown = TUTORIAL["BLOCK"], TUTORIAL["is_shown"]
APPS = {
    "apt-train": apt_core.cli.train.app,
    "apt-hooks": apt_core.cli.hooks.app,
    "apt-new": apt_core.cli.new.app,
    "apt-data": apt_core.cli.data.app,
    "apt-eval": apt_core.cli.eval.app,
    "apt-generate": apt_core.cli.generate.app,
    "apt-chat": apt_core.cli.chat.app,
    "apt-export": apt_plugins.export.command.app,
    "apt-report": apt_plugins.report.command.app,
}
TEXT = "\n\n".join(f"Line {n} of a small text says that {n} and 1 are {n + 1}." for n in range(24))
QUICK = {
    "training.warmup_steps": "1",
    "training.log_every_steps": "1",
    "data.train_path": "small_text.txt",
    "evaluation.eval_freq": "0",
    "evaluation.eval_batches": "1",
    "evaluation.sample_tokens": "0",
}
"""Makes each run a matter of a moment; what is printed has the same form."""


@dataclass(frozen=True)
class Guide:
    """A page of the documentation: its files by name, and the console blocks of each section."""

    files: dict[str, str] = field(default_factory=dict)
    consoles: dict[str, list[str]] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)


def read_guide(name: str) -> Guide:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    guide = Guide()
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        for block in BLOCK.finditer(section):
            if block["file"]:
                guide.files[block["file"]] = block["text"]
            elif block["language"] == "console":
                guide.consoles.setdefault(section.splitlines()[0], []).append(block["text"])
            else:
                guide.unnamed.append(block["text"])
    return guide


def commands(console: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with the lines that it shows."""
    for part in re.split(r"^\$ ", console, flags=re.M)[1:]:
        command, *shown = part.splitlines()
        yield command, shown


PAGES = (
    *(
        "starting.md",
        "plugins.md",
        "profiles.md",
        "data.md",
        "model.md",
        "training.md",
        "curriculum.md",
    ),
    *("scaling.md", "generation.md", "evaluation.md", "export.md"),
)
OWN_DATA = {"letters", "answers", "mixture", "helper"}
"""Profiles that are trained on the data that they name."""
GUIDES = {name: read_guide(name) for name in PAGES}
SECTIONS = [(name, section) for name, guide in GUIDES.items() for section in guide.consoles]


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """``shell(command)`` in an empty folder: the exit code and all that was printed.

    APT's own commands run in this process, which spares seconds each.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", str(site), str(ROOT)]))
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "small_text.txt").write_text(TEXT)

    def run(command: str) -> tuple[int, str]:
        command, _, file = command.partition(" < ")
        program, *arguments = shlex.split(command)
        if file:
            monkeypatch.setattr("sys.stdin", (tmp_path / file).open())
        capfd.readouterr()
        if program in APPS:
            if program == "apt-train":
                small = {"training.batch_size": "2"} if "gpt5_moe_mini" in arguments else {}
                keys = {**QUICK, **small}
                if OWN_DATA.intersection(arguments):
                    del keys["data.train_path"]
                arguments += [f"--{key}={value}" for key, value in keys.items()]
            if arguments[:1] == ["check"]:
                arguments += ["--nproc", "1"]  # runs of two processes have a test of their own
            importlib.invalidate_caches()
            code = run_command(APPS[program], program, arguments)
        else:
            if program == "pip":
                offline = "--no-deps --no-index --no-build-isolation --quiet --target site"
                arguments[1:1] = offline.split()
            words = {"pip": [sys.executable, "-m", "pip"], "python": [sys.executable]}
            code = subprocess.run([*words.get(program, [program]), *arguments]).returncode
        return code, "".join(capfd.readouterr())

    return run


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_every_block_is_a_file_or_a_console(guide: Guide) -> None:
    assert guide.unnamed == []


@pytest.mark.parametrize(("name", "section"), SECTIONS)
@pytest.mark.usefixtures("forked")
def test_the_commands_of_a_section_print_what_it_shows(
    shell: Callable[[str], tuple[int, str]], tmp_path: Path, name: str, section: str
) -> None:
    write_files(GUIDES[name], tmp_path)
    for console in GUIDES[name].consoles[section]:
        for command, shown in commands(console):
            code, printed = shell(command)
            fails = any(line.startswith("error: ") for line in shown)
            assert (code != 0) == fails, f"$ {command}\n{printed}"
            for line in shown:
                assert is_shown(line, printed), f"$ {command}\n{line}\nis not in\n{printed}"


@pytest.mark.usefixtures("forked")
def test_the_tutorial_runs_from_top_to_bottom(
    shell: Callable[[str], tuple[int, str]], tmp_path: Path
) -> None:
    """On a smaller model, and without the installation: docs/run_tutorial.py runs all of it."""
    optional("xllamacpp", "what the tutorial ends with is not installed")
    steps = [step for step in TUTORIAL["steps"]() if step.section != "Install"]
    assert [step.file for step in steps if step.file] == [
        *("questions.py", "helper.yaml", "asked.txt", "asked.jsonl", "ask.py")
    ]
    small = "model:\n  d_model: 32\n  max_seq_len: 96\n"
    answers = {}
    for step in steps:
        if step.file:
            text = step.text.replace("model:\n", small).replace("max_epochs: 150", "max_epochs: 1")
            (tmp_path / step.file).write_text(text)
            continue
        code, printed = shell(step.command)
        assert code == 0, f"$ {step.command}\n{printed}"
        for line in step.shown:
            assert is_shown(line, printed), f"$ {step.command}\n{line}\nis not in\n{printed}"
        answers[step.command] = printed
    (said,) = [out for command, out in answers.items() if command.startswith("apt-chat")]
    answer = said.partition("not the conversation\n")[0].splitlines()[0]
    # llama.cpp ends at the context, where apt-chat forgets what was first.
    assert len(answer) > 60 and answer[:60] in answers["python ask.py"]
    # So small a model says the same whatever it is asked: the certificate tells in which form.
    certificate = json.loads((tmp_path / "helper-gguf" / "certificate.json").read_text())
    assert certificate["chat_format"] == "pairs" and certificate["proven"]


def write_files(guide: Guide, folder: Path) -> None:
    files = dict(guide.files)
    if "silu.py" in files:
        # As the page says: the layer of the package is the file from above without its hook.
        files["package/apt_silu/layer.py"] = files["silu.py"].partition("@hookimpl")[0]
        files["package/apt_silu/__init__.py"] = ""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def rows_of(page: str, section: str) -> list[list[str]]:
    """The cells of the tables of a section, without their heads."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = text[text.index(f"\n## {section}\n") + 4 :].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    heads = [number - 1 for number, row in enumerate(rows) if row[0].startswith("---")]
    return [row for n, row in enumerate(rows) if n not in heads and n - 1 not in heads]


@pytest.mark.parametrize(("section", "kind"), [("Sources", "dataset"), ("Tokenizers", "tokenizer")])
def test_the_guide_to_data_has_every_provider_of_the_core(section: str, kind: str) -> None:
    told = {row[0].strip("`") for row in rows_of("data.md", section)}
    assert told == {spec.name for spec in core_providers("1") if spec.kind == kind}


BAD_INPUT: dict[str, tuple[bytes | str, str]] = {
    "an empty file": (b"", ""),
    "a text of one token": (b"x", ""),
    "a binary file": (b"ELF\0\1\2", ""),
    "a truncated gz": (gzip.compress(b"text " * 1000)[:-20], "text.gz"),
    "bytes that are no UTF-8": (b"ab\xff", ""),
    "a missing column": ("id,words\n1,some\n", "text.csv"),
    "documents of which nothing is learned": (
        '{"messages": [{"role": "user", "content": "hello"}]}\n',
        "text.jsonl",
    ),
    "less text than one step takes": (b"0123456789" * 10, ""),
    "weights of a mixture that are all 0": (
        b"",
        "{name: a, train_path: small_text.txt, weight: 0}",
    ),
    "a source that yields nothing": (b"", "--plugin nothing.py --data.loader nothing"),
    "a tokenizer with more ids than the model": (b"text " * 100, "--model.vocab_size 100"),
}
"""The content of a file, and its name, or other arguments."""

NOTHING = """
from apt_core import ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider


class Nothing(DatasetProvider):
    def documents(self):
        return iter(())


@hookimpl
def apt_register_providers():
    return [ProviderSpec("dataset", "nothing", Nothing)]
"""


def test_bad_data_is_refused_in_the_words_of_the_guide(
    shell: Callable[[str], tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "nothing.py").write_text(NOTHING)
    told = dict(row for row in rows_of("data.md", "Bad input"))
    assert told.keys() == BAD_INPUT.keys()
    for what, (content, more) in BAD_INPUT.items():
        name = more if "." in more and " " not in more else "text.txt"
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        arguments = f"--data.train_path {name}"
        if more.startswith("{"):
            arguments = f"--set 'data.mixture=[{more}]'"
        elif more.startswith("--"):
            arguments = more if "plugin" in more else f"{arguments} {more}"
        code, printed = shell(f"apt-data stats -p tiny_debug {arguments}")
        assert code == 2 and "error: " in printed, f"{what}: {printed}"
        assert told[what].strip("`") in printed, f"{what}: {printed}"
    assert not [*tmp_path.glob("cache/stores/*.building-*")]


def test_five_words_name_what_is_not_in_effect() -> None:
    """The guide has the table of the code, and no plugin gets a state beside it."""
    guide = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| \*(\w+)\* \| (.+) \|$", guide, re.M)) == NOT_IN_EFFECT
    assert {*STATES} == {"available", "active", *NOT_IN_EFFECT} - {"inactive"}
    for path in (ROOT / "apt_core").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        given = re.findall(
            r'set_state\([^)]*?, "(\w+)"|record\.state(?: = |, record.reason = )"(\w+)"', code
        )
        assert {state for pair in given for state in pair if state} <= {*STATES}, path
