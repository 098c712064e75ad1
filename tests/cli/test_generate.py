"""``apt-generate``: it continues what it is given, and says what is wrong with the rest."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch", reason="text is generated with torch")

from apt_core import ConfigError, GenerationRequest
from apt_core.cli.generate import app
from apt_core.cli.prompts import split_run
from apt_core.cli.sampling_options import stop_strings
from apt_core.inference import generate
from apt_core.runs import open_run
from apt_core.testing import tiny_run
from tests.cli.speaking import KEYS, speaking_run
from tests.cli.terminal import SECONDS

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome
    from tests.cli.terminal import Terminal

VOTER = "apt_plugins.voter.plugin"
Generate = Callable[..., "Outcome"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights of its own, and checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(
        steps=2,
        overrides={**KEYS, "model.max_seq_len": 32, "training.save_every_steps": 1},
        output=folder / "run",
    )
    return folder / "run"


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_run(tmp_path_factory.mktemp("parrot"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], None]:
    """``typed(text)`` is what standard input will give, which is no terminal."""

    def give(text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return give


@pytest.fixture
def said(command: Command, typed: Callable[[str], None]) -> Generate:
    typed("")

    def call(*arguments: object) -> Outcome:
        return command(app, *map(str, arguments), prog="apt-generate")

    return call


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_the_first_argument_is_the_run_where_it_names_one(folder: Path) -> None:
    (folder / "runs" / "small").mkdir(parents=True)
    (folder / "Once").touch()
    cases: dict[tuple[str, ...], tuple[str | None, list[str]]] = {
        (): (None, []),
        ("Once upon",): (None, ["Once upon"]),
        ("runs/small", "Once"): ("runs/small", ["Once"]),
        ("small", "a", "b"): ("small", ["a", "b"]),
        ("runs/gone", "a"): ("runs/gone", ["a"]),
        ("either/or is fine",): (None, ["either/or is fine"]),
        ("Once",): ("Once", []),
        ("-",): (None, ["-"]),
        ("",): (None, [""]),
        ("x" * 5000,): (None, ["x" * 5000]),
        ("a\0/b",): (None, ["a\0/b"]),
    }
    for arguments, expected in cases.items():
        assert split_run(arguments) == expected, arguments
    assert stop_strings([r"\n", r"a\\n\t", "\\"]) == ("\n", "a\\n\t", "\\")


def test_it_says_what_generate_gives(run: Path, said: Generate) -> None:
    """Text, tokens and the reason to end, for each sample, prompt and setting."""
    options = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    words = [
        word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    more = ["--repetition-penalty", "1.2", "--stop", "zz", "--logprobs", "2", "--seed", "3"]
    found = rows(said(run, "The é", "", "-n", "2", "--json", *words, *more))
    session = open_run(run)
    assert [(row["prompt"], row["sample"], row["seed"]) for row in found] == [
        ("The é", 0, 3), ("The é", 1, 4), ("", 0, 3), ("", 1, 4),
    ]  # fmt: skip
    for row in found:
        request = GenerationRequest(
            row["prompt"], **options, repetition_penalty=1.2, stop=("zz",), logprobs=2,
            seed=row["seed"],
        )  # fmt: skip
        result = generate(session, request)
        assert (row["text"], tuple(row["token_ids"])) == (result.text, result.token_ids)
        assert row["finish_reason"] == result.finish_reason
        logprobs = result.logprobs or ()
        assert [token["logprob"] for token in row["logprobs"]] == pytest.approx(
            [token.logprob for token in logprobs], abs=1e-4
        )
        assert all(len(token["top"]) == 2 for token in row["logprobs"])
    one = said(run, "The é", "--seed", "3", *words, "--repetition-penalty", "1.2", "--stop", "zz")
    assert one.out == found[0]["text"].removesuffix("\n") + "\n"
    # A message is what this model was trained on, a text, unless another format is asked for.
    Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "The é"}]}')
    asked = ("--file", "asked.jsonl", "--json", "--seed", "3", *words, *more[:-2])
    [row] = rows(said(run, *asked))
    assert row["text"] == found[0]["text"] and row["prompt"][0]["content"] == "The é"
    [row] = rows(said(run, *asked, "--format", "template"))
    assert row["prompt_tokens"] > found[0]["prompt_tokens"]
    # Step by step, and of another step.
    first = rows(said(run, "The é", "--json", "--temperature", "0", "--step", "1"))
    with_one = generate(open_run(run, step=1), GenerationRequest("The é", 256, temperature=0))
    assert first[0]["text"] == with_one.text


def test_prompts_come_from_arguments_files_and_standard_input(
    parrot: Path, said: Generate, typed: Callable[[str | bytes], None], folder: Path
) -> None:
    (folder / "lines.txt").write_bytes("\ufeffone é\r\n\n  two\n".encode())
    messages = [{"role": "user", "content": "hi 字"}]
    lines = [{"prompt": "three", "id": 7}, "four", {"messages": messages}]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "lines.jsonl").write_text(text, encoding="utf-8")
    found = rows(said(parrot, "--file", "lines.txt", "--file", "lines.jsonl", "--json", "zero"))
    assert [row["text"] for row in found] == [
        "[0] zero", "[0] one é", "[0]   two", "[0] three", "[0] four", "[0] u:hi 字",
    ]  # fmt: skip
    assert found[-1]["prompt"] == messages and found[0]["finish_reason"] == "stop"
    typed("a whole\ntext\n")
    assert said(parrot).out == "[0] a whole\ntext\n"
    typed("a whole\ntext\n")
    assert said(parrot, "before", "-").out == "[0] before\n---\n[0] a whole\ntext\n"
    typed("line 1\nline 2\n")
    done = said(parrot, "--file", "-", "--echo", "--stream")
    assert done.out == "line 1[0] line 1\n---\nline 2[0] line 2\n"
    assert said(parrot, "--prompt", "runs/small", "--no-stream").out == "[0] runs/small\n"


def test_without_a_run_the_newest_is_taken_and_named(
    parrot: Path, said: Generate, folder: Path
) -> None:
    (folder / "runs" / "small").mkdir(parents=True)
    (folder / "runs" / "small" / "1").symlink_to(parrot)
    for arguments in (["Once upon"], ["small", "Once upon"]):
        done = said(*arguments)
        assert (done.code, done.out, done.err) == (0, "[0] Once upon\n", "run: runs/small/1\n")


def test_a_stop_string_that_never_comes_changes_nothing_and_a_long_prompt_loses_its_beginning(
    run: Path, said: Generate
) -> None:
    plain, stopped = (
        rows(said(run, "The ", "--json", "--max-new-tokens", "4", *more))
        for more in ([], ["--stop", "\\n\\nNEVER"])
    )
    assert plain == stopped and plain[0]["finish_reason"] == "length"
    done = said(run, "The long text " * 8, "--json", "-n", "2")
    assert [row["dropped_tokens"] for row in rows_of(done)] == [80, 80]
    assert done.err == (
        "prompt 1: the first 80 of its 112 tokens are left out, for the context has 32\n"
    )


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_what_is_wrong_is_said_at_once_before_anything_is_opened(
    run: Path, said: Generate, typed: Callable[[str | bytes], None], folder: Path
) -> None:
    (folder / "latin.txt").write_bytes("ok\nschön\n".encode("latin-1"))
    (folder / "wide.txt").write_bytes("text".encode("utf-16"))
    (folder / "binary").write_bytes(b"ELF\0\1")
    (folder / "bad.jsonl").write_text(
        '{"prompt": 3}\n{\n{"messages": [{"role": "usr", "content": ""}]}\n'
    )
    (folder / "none.txt").write_text("\n \n")
    (folder / "empty").mkdir()
    many = said(run, "--temperature", "-1", "--top-p", "0", "--max-new-tokens", "0", "--stream",
                "--json", "runs/none")  # fmt: skip
    assert many.code == 2 and "4 problems" in many.err
    for expected in ("--temperature: is -1", "--top-p", "--max-new-tokens", "--stream does not go"):
        assert expected in many.err
    names = ["latin.txt", "wide.txt", "binary", "bad.jsonl", "none.txt", "gone.txt", "empty"]
    bad = said(run, *(word for name in names for word in ("--file", name)))
    for expected in (
        "latin.txt:2: is not UTF-8: byte 0xf6",
        "wide.txt: is UTF-16, not UTF-8 (iconv",
        "binary: holds NUL bytes",
        "bad.jsonl:1: is no prompt: its 'prompt' is no text",
        "bad.jsonl:2: is no prompt",
        "bad.jsonl:3: is no prompt: message 1 has the unknown role 'usr' (did you mean 'user'?)",
        "none.txt: holds no prompt",
        "gone.txt: --file: cannot be read: No such file",
        "empty: --file: cannot be read",
    ):
        assert expected in bad.err, bad.err
    cases = [
        (
            ["runs/gone", "Once"],
            "runs/gone: RUN: there is no such run (if it is a prompt: --prompt",
        ),
        ([], "no prompt was given, and standard input is empty"),
        (["--logprobs", "2", "a"], "--logprobs goes with --json"),
        (["a", "--weights", "first"], "there is no run with a checkpoint in it (train one"),
        ([run, "a", "--weights", "first"], "weights: is 'first' (one of last, best, average)"),
        ([run, "a", "--step", "9"], "there is no checkpoint of step 9 (there are those of steps"),
        ([run, "a\udcff"], "lone surrogate"),
        ([run, "a", "--plugin", "nix.py"], "nix.py"),
        ([folder / "empty", "a"], "there is no checkpoint in this folder"),
        (
            [run, "a", "--set", "model.d_model=32"],
            "--set model.d_model: model.d_model: is the run's own",
        ),
        ([run, "a", "--set", "model.voting.k=3"], "model.voting: unknown key"),
        (
            [run, "a", "--plugin", VOTER, "--set", "model.voting.n=3"],
            "model.voting.n: unknown key",
        ),
        ([run, "a", "--plugin", VOTER, "--set", "k"], "--set"),
    ]
    for arguments, expected in cases:
        done = said(*arguments)
        assert expected in done.err and not done.out, (arguments, done)
        assert done.code == 2
    typed(b"\xff\xfe")
    assert "standard input: is UTF-16" in said(run).err


def test_a_plugin_is_added_with_its_settings(run: Path, said: Generate) -> None:
    voting = ["--plugin", VOTER, "--set", "model.voting.k=5", "--set", "model.voting.length=4"]
    voting += ["--set", "model.voting.threshold=0.0"]
    (row,) = rows_of(said(run, "The ", "--json", "--max-new-tokens", "8", *voting))
    assert row["extra_tokens"] >= 2 * 5 * 3
    keys = {f"model.voting.{key}": value for key, value in (("k", 5), ("length", 4))}
    session = open_run(run, plugins=VOTER, overrides={**keys, "model.voting.threshold": 0.0})
    request = GenerationRequest(
        "The ", max_new_tokens=8, temperature=0.8, top_k=40, seed=row["seed"]
    )
    assert list(generate(session, request).token_ids) == row["token_ids"]
    with pytest.raises(ConfigError, match=r"model\.d_model: is the run's own"):
        open_run(run, overrides={"model.d_model": 8})


def test_a_run_whose_plugin_is_gone_names_it_and_the_way_on(
    said: Generate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("gone")
    run = speaking_run(home)
    (home / "parrot.py").unlink()
    refused = said(run, "a")
    assert refused.code == 2 and "parrot" in refused.err and "no:parrot" in refused.err
    done = said(run, "a", "--plugin", "no:parrot", "--max-new-tokens", "3", "--json")
    assert len(rows(done)[0]["token_ids"]) == 3


def test_a_terminal_sees_the_prompt_and_the_text_while_it_is_made(
    parrot: Path, terminal: Callable[..., Terminal]
) -> None:
    counting = terminal("generate", parrot, "count", "--max-new-tokens", "100000")
    counting.until("^count0 1 2 3 ")
    counting.press(b"\x03", r"\n[\d,]+ tokens in [\d.]+ s, [\d,]+ tokens/s\n$")
    assert counting.process.wait(SECONDS) == 130
    typed = terminal("generate", parrot, "\x1b[2Jbell\x07\u200d", "--max-new-tokens", "9")
    shown = typed.until(r"tokens/s; cut at --max-new-tokens\n")
    assert shown.startswith(r"\x1b[2Jbell\x07" + "\u200d[0] \\x1b[2Jb")
    assert typed.process.wait(SECONDS) == 0
    nothing = terminal("generate", parrot)
    assert "no prompt was given" in nothing.until(r"begins a new document\)\n")
    assert nothing.process.wait(SECONDS) == 2


def test_checkpoints_that_cannot_be_used_are_refused_with_the_reason(
    said: Generate, parrot: Path, folder: Path
) -> None:
    (newest,) = (parrot / "checkpoints").iterdir()
    manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    other = Path(shutil.copytree(newest, folder / newest.name))
    (other / "manifest.json").write_text(json.dumps({**manifest, "format": 9}), encoding="utf-8")
    done = said(other, "a")
    assert done.code == 1 and "checkpoint format 9, this version reads 1" in done.err
    overrides = {**KEYS, "data.tokenizer_name": "char", "model.vocab_size": 264}
    tiny_run(steps=1, overrides=overrides, output=folder / "letters")
    assert said("letters/checkpoints", "a", "--max-new-tokens", "1").code == 0
    shutil.rmtree(folder / "letters" / "tokenizer")
    done = said("letters/checkpoints", "a")
    assert done.code == 1 and "the tokenizer 'char', which was trained, is not there" in done.err
    assert "(a copied checkpoint needs its run's folder tokenizer there, too)" in done.err


def first_bytes(process: subprocess.Popen[bytes], count: int) -> bytes:
    """The first bytes that it writes; more than them stay in the pipe."""
    found = b""
    while process.stdout is not None and len(found) < count:
        more = process.stdout.read(count - len(found))
        if not more:
            break
        found += more
    return found


SCRIPT = """
import sys
from apt_core.cli.generate import main
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("forked")
def test_a_reader_that_leaves_ends_it_quietly_and_a_signal_keeps_what_is_there(
    parrot: Path, folder: Path
) -> None:
    def start(*arguments: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", SCRIPT, str(parrot), *arguments]
        words += ["--max-new-tokens", "100000"]
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )

    counted = "".join(f"{number} " for number in range(10_000))
    gone = start("count", "--stream")
    assert gone.stdout is not None and gone.stderr is not None
    assert first_bytes(gone, 6) == b"0 1 2 "
    gone.stdout.close()
    assert (gone.wait(), gone.stderr.read()) == (0, b"")
    stopped = start("count", "--stream")
    assert stopped.stdout is not None
    assert first_bytes(stopped, 6) == b"0 1 2 "
    stopped.send_signal(signal.SIGINT)
    rest, err = stopped.communicate()
    assert stopped.returncode == 130 and rest.endswith(b"\n"), err
    assert counted.startswith(f"0 1 2 {rest.decode()}".removesuffix("\n"))
    several = start("first", "count", "--json")
    assert several.stdout is not None
    assert json.loads(several.stdout.readline())["text"] == "[0] first"
    several.send_signal(signal.SIGTERM)
    rest, err = several.communicate()
    row = json.loads(rest)
    assert several.returncode == 143 and row["finish_reason"] == "interrupted", err
    assert row["text"] and counted.startswith(row["text"])


CITES = """
from apt_core import RewrittenPrompt, Source, hookimpl


@hookimpl
def apt_rewrite_prompt(request):
    sources = [Source(f"texts/{request.prompt}.md", 7, "A passage.", 0.5), Source("b.md", 1, "", 0)]
    return RewrittenPrompt(f"A passage. {request.prompt}", sources[: len(request.prompt)])
"""


def test_sources_are_named_once_a_prompt_beside_the_texts(
    said: Generate, parrot: Path, folder: Path
) -> None:
    (folder / "cites.py").write_text(CITES)
    asked = parrot, "--plugin", "cites.py", "--prompt", "a", "--prompt", "bc"
    sources = [
        "prompt 1: source: texts/a.md:7\n",
        "prompt 2: source: texts/bc.md:7\nprompt 2: source: b.md:1\n",
    ]
    for options in ((), ("--stream",)):
        done = said(*asked, "-n", "2", *options)
        assert (done.code, done.err) == (0, "".join(sources)), options
        assert done.out.count("A passage.") == 4 and ".md" not in done.out
    done = said(*asked, "--json")
    assert [len(row["sources"]) for row in rows(done)] == [1, 2] and not done.err
