"""``apt-chat``, at a terminal and in a script."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="an answer is computed with torch")

from apt_core.cli.chat import app
from tests.cli.speaking import speaking_run
from tests.cli.terminal import MORE, PROMPT, SECONDS

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome
    from tests.cli.terminal import Terminal


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_run(tmp_path_factory.mktemp("parrot"))


def test_a_conversation_at_a_terminal(
    terminal: Callable[..., Terminal], parrot: Path, folder: Path
) -> None:
    """Remembered, taken back, answered again, stopped, kept and loaded."""
    chat = terminal("chat", parrot, "--seed", "5")
    begin = chat.until(PROMPT)
    assert "a context of 512 tokens" in begin and "/help lists the commands" in begin
    # Three turns are remembered.
    assert chat.say("red") == "[5] u:red"
    assert chat.say("grün 字") == "[6] u:red|a:[5]|u:grün 字"
    chat.say("blue \\", MORE)
    assert chat.say("sky") == "[7] u:red|a:[5]|u:grün 字|a:[6]|u:blue \nsky"
    # The last one is taken back, and the one before is answered again, with another seed.
    assert chat.say("/undo") == "taken back: blue …"
    assert chat.say("/retry") == "[8] u:red|a:[5]|u:grün 字"
    # Messages of several lines, and with a slash.
    chat.say('"""', MORE)
    chat.say("a", MORE)
    chat.say("", MORE)
    assert chat.say('b"""') == "[9] u:red|a:[5]|u:grün 字|a:[8]|u:a\n\nb"
    assert chat.say("//usr/bin").endswith("|u:a\n\nb|a:[9]|u:/usr/bin")
    assert chat.say("/undo") == "taken back: /usr/bin"
    assert chat.say("/system be true") == ""
    assert chat.say("c").startswith("[11] s:be true|u:red|")
    # Ctrl-C stops an answer, which stays, and not the session; at the prompt it ends nothing.
    os.write(chat.ours, b"count\n")
    chat.until("count\n0 1 2 3 ")
    assert chat.press(b"\x03").endswith("\n(stopped)\n> ")
    history = chat.say("/history")
    assert history.startswith("system: be true\nuser: red\nassistant: [5] u:red\nuser: grün 字\n")
    stopped = re.search(r"assistant \(interrupted\): (0 1 2 3 .*)$", history, re.S)
    assert stopped is not None
    os.write(chat.ours, b"half a l")
    chat.until("half a l")
    chat.wait_for_idle()
    assert "(Ctrl-D or /exit ends)" in chat.press(b"\x03")
    # Kept, forgotten, loaded.
    assert chat.say("/save kept.json") == "kept in kept.json"
    kept = json.loads((folder / "kept.json").read_text(encoding="utf-8"))
    assert kept["messages"][-1] == {
        "role": "assistant",
        "content": stopped[1],
        "finish_reason": "interrupted",
    }
    assert kept["messages"][3] == {"role": "user", "content": "grün 字"}
    assert chat.say("/clear") == ""
    assert chat.say("d") == "[13] s:be true|u:d"
    assert chat.say("/load kept.json") == "5 turns; /history shows them"
    assert chat.say("/history") == history
    (folder / "other.json").write_text('{"a": 1}')
    assert "other.json: is there, and is no conversation" in chat.say("/save other.json")
    assert "other.json: is no conversation" in chat.say("/load other.json")
    assert chat.say("/history") == history
    # Settings, and what is none.
    assert chat.say("/set max_new_tokens 4") == ""
    assert chat.say("/set stop") == "stop []"
    assert re.fullmatch(r"\[14\]\n\(cut at 4 tokens; .*\)|\[14\] \n\(cut at 4 .*\)", chat.say("e"))
    for line, expected in {
        "/set temperatur 1": "there is no setting 'temperatur' (did you mean 'temperature'?)",
        "/set temperature=-1": "error: temperature: is -1",
        "/set top_k many": "error: top_k: 'many' is no whole number",
        "/set format templat": "error: format: there is no format 'templat' (did you mean",
        "/histroy": "there is no command /histroy (did you mean '/history'?; //histroy sends it",
        "/load": "/load needs its FILE",
        "/undo it": "/undo takes nothing",
        "/load none.json": "none.json: the conversation cannot be read: No such file",
    }.items():
        assert expected in chat.say(line), line
    assert chat.say('/set stop ["t"]') == ""
    assert chat.say("/set").splitlines()[-3:] == ['stop ["t"]', "seed 5", 'format "template"']
    assert "/retry " in chat.say("/help")
    # A tab completes commands.
    assert chat.press(b"/hist\t\n").startswith("/history")
    assert "5 turns" in chat.press(b"/lo\tkep\t\n")
    # Ctrl-D ends.
    os.write(chat.ours, b"\x04")
    chat.until("")
    assert chat.process.wait(SECONDS) == 0


def test_a_terminal_that_is_closed_ends_it_cleanly(
    terminal: Callable[..., Terminal], parrot: Path, folder: Path
) -> None:
    (folder / "kept.json").write_text('{"messages": []}')
    waiting, answering = terminal("chat", parrot), terminal("chat", parrot, "--load", "kept.json")
    waiting.until(PROMPT)
    answering.until(PROMPT)
    os.write(answering.ours, b"count\n")
    answering.until("0 1 2 3 ")
    for each in (waiting, answering):
        each.hang_up()
        assert each.process.wait(SECONDS) == 128 + signal.SIGHUP
    assert [path.name for path in folder.iterdir()] == ["kept.json"]


# In a script --------------------------------------------------------------------------------------


@pytest.fixture
def script(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``script(lines, *arguments)``: what it prints of lines that come from no terminal."""

    def call(lines: str | bytes, *arguments: object) -> Outcome:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        return command(app, *map(str, arguments), prog="apt-chat")

    return call


def test_a_script_gets_answers_alone_on_stdout(
    script: Callable[..., Outcome], parrot: Path, folder: Path
) -> None:
    done = script("one\n\n/undo\ntwo\n/exit\nnever\n", parrot, "--system", "S")
    assert (done.code, done.out) == (0, "[0] s:S|u:one\n[1] s:S|u:two\n")
    assert done.err == "taken back: one\n"
    (folder / "kept.json").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    done = script('/retry\n"""a\nb', parrot, "--load", "kept.json")
    assert done.out == "[0] u:x\n[1] u:x|a:[0]|u:a\nb\n"
    for lines, expected in {
        "a\n/nothing\nb\n": "there is no command /nothing",
        "/load none.json\n": "none.json: the conversation cannot be read",
        "/retry\n": "there is nothing to answer again",
        b"a\n\xff\n": "the input is not UTF-8",
    }.items():
        done = script(lines, parrot)
        assert done.code == 2 and expected in done.err and "u:b" not in done.out


def test_what_does_not_fit_into_the_context_is_left_out_by_turns_and_said_once(
    script: Callable[..., Outcome], parrot: Path
) -> None:
    lines = "".join(f"{name * 40}\n" for name in "abcdef")
    done = script(lines, parrot, "--system", "kept", "--stop", "]")
    # Every answer is "[N": what is shown of a prompt is its length alone.
    assert done.out.splitlines() == [f"[{number}" for number in range(6)]
    assert done.err == ""
    done = script(lines, parrot, "--system", "kept")
    seen = done.out.splitlines()
    assert all(f"] s:kept|u:{'abcdef'[0] * 40}" in line for line in seen[:3])
    assert f"] s:kept|u:{'c' * 40}|" in seen[-1] or f"] s:kept|u:{'d' * 40}|" in seen[-1]
    assert done.err.count("the model sees the newest turns that fit") == 1
    # What is left out makes room for several turns, which begin with the same prompt.
    lines = "".join(f"{name * 40}\n/history\n" for name in "abcdefghijklmnopqrst")
    done = script(lines, parrot, "--stop", "]")
    first_seen = [
        history.count("user (not seen)") for history in re.split(r"^\[\d+\n", done.out, flags=re.M)
    ][1:]
    assert first_seen == sorted(first_seen) and first_seen[-1] > 8
    assert all(first_seen.count(turn) > 1 for turn in {*first_seen[:-2]}), first_seen
    long = script(f"{'x' * 600}\n", parrot, "--stop", "]")
    assert re.fullmatch(
        r"\(the first \d+ of 60\d tokens do not fit into the context of 512; the model did not "
        r"see them\)\n",
        long.err,
    )


def test_a_model_that_was_not_taught_to_chat_says_so(
    script: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = speaking_run(tmp_path_factory.mktemp("text"), conversations=False)
    done = script("one\ntwo\n", run)
    assert done.out == "[0] one\n[1] one[0] one\ntwo\n"
    assert done.err == (
        "this model was trained on plain text: it continues what you write rather than answering "
        "it\n"
    )
    done = script("one\ntwo\n", run, "--format", "dialogue", "--system", "S")
    assert (done.out, done.err) == ("[0] S\n[1] S\n", "")  # it ends before another \nUser:


def test_an_answer_that_cannot_be_given_leaves_the_conversation_as_it_was(
    terminal: Callable[..., Terminal], parrot: Path, folder: Path
) -> None:
    (folder / "loud.py").write_text(LOUD)
    chat = terminal("chat", parrot, "--plugin", "loud.py", "--plugin", "no:parrot", "--stop", "~")
    chat.until(PROMPT)
    printed = chat.say("say nothing")
    assert "printed by a plugin" in printed
    assert "error: the model's logits are not finite: it cannot answer" in printed
    assert "(nothing was said)" in chat.say("/history")
    assert "there is nothing to answer again" in chat.say("/retry")


LOUD = """
import torch

from apt_core import hookimpl


@hookimpl
def on_generation_start(request, session):
    print("printed by a plugin")
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.fill_(torch.nan)
"""
