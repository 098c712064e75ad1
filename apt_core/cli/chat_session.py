"""A conversation at the keyboard: messages, answers, and commands that begin with ``/``."""

from __future__ import annotations

import glob
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO, cast

from apt_core.cli.chat_input import Input
from apt_core.cli.output import KEPT, make_console, output_apart, say
from apt_core.cli.sampling_options import FIELDS, check_settings, settings_of, stop_strings
from apt_core.code_source import short_path
from apt_core.error_text import one_line
from apt_core.errors import AptError, ConfigError, Interrupted, did_you_mean
from apt_core.inference.chat import ChatFormat, Conversation, Prompt, Said, fitting, format_called
from apt_core.log import TolerantStream
from apt_core.parallel.signals import Interrupts, handling
from apt_core.printable import printable
from apt_core.profile_paths import user_path
from apt_core.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from apt_core.inference import Engine
    from apt_core.runs import Session

FORMAT = "format"
"""The setting that is the chat's own, beside those of a request."""

KEPT_SHARE = 0.75
"""How much of the room for a prompt the turns take that are kept when others are left out."""

SHOWN = 60
"""Characters of a message that are repeated where it is spoken of."""


class Chat:
    """A conversation with the model of ``engine``, by the settings of ``request``."""

    def __init__(
        self,
        engine: Engine,
        request: GenerationRequest,
        chat_format: ChatFormat,
        conversation: Conversation | None = None,
    ) -> None:
        self._engine, self._session = engine, engine.session
        self._max_seq_len = engine.session.config.model.max_seq_len
        self.request, self.format = request, chat_format
        self.conversation = conversation or Conversation()
        self._answers = 0
        self._first_turn = 0
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "show this list", self._help),
            "system": (
                "[TEXT]",
                'set the system message, "" for none; alone: show it',
                self._system,
            ),
            "retry": ("", "answer the last message again", self._retry),
            "undo": ("", "take the last message and its answer back", self._undo),
            "set": ("[KEY [VALUE]]", "change a setting; alone: show them", self._set),
            "history": ("", "show the conversation", self._history),
            "save": ("FILE", "keep the conversation in a file", self._save),
            "load": ("FILE", "go on with a conversation that was kept", self._load),
            "clear": ("", "forget the conversation but for the system message", self._clear),
            "exit": ("", "end", self._exit),
        }
        self._ended = False
        self._input = Input(self.completions)

    # The session ------------------------------------------------------------------------------

    def run(self, notice: str = "") -> None:
        """Talk until the input ends, after a ``notice``. In a script, the first error ends it; at a
        terminal it is shown.

        Raises Interrupted for a signal that asks the process to end.
        """
        with _ending():
            if self._input.interactive:
                say_aside(model_line(self._session))
                say_aside("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
            if notice:
                say_aside(notice)
            while not self._ended:
                try:
                    text = self._input.read()
                    if text is None:
                        if self._input.interactive:
                            say()  # Ctrl-D leaves the cursor where it is
                        break
                    self.take(text)
                except (Interrupted, OSError):  # nobody takes the output any more
                    raise
                except KeyboardInterrupt:
                    say_aside("\n(Ctrl-D or /exit ends)")
                except Exception as error:
                    if not self._input.interactive:
                        raise
                    known = isinstance(error, AptError)
                    say_aside(f"error: {error if known else one_line(error)}")

    def take(self, text: str) -> None:
        """Do the command that ``text`` is, or answer it. ``//`` begins a message with a ``/``.
        Raises ConfigError for what is no command, or cannot be done."""
        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            self._command(text[1:])
            return
        self.conversation.ask(text.removeprefix("/") if text.startswith("//") else text)
        before = self.conversation.said[:-1]
        with self._restored_on_error(before):
            if not self._answer():
                self.conversation.said[:] = before
                say_aside("(stopped before the answer; the message is taken back)")

    def completions(self, line: str) -> Iterable[str]:
        """The lines that ``line`` may become."""
        command, _, begin = line.partition(" ")
        if command in ("/save", "/load") and line != command:
            found = sorted(glob.glob(f"{glob.escape(begin)}*"))
            return [f"{command} {path}{os.sep if os.path.isdir(path) else ''}" for path in found]
        if line.startswith("/set "):
            return [f"/set {key} " for key in (*FIELDS, FORMAT)]
        return [f"/{name}" + (" " if takes else "") for name, (takes, *_) in self._commands.items()]

    # Answers ----------------------------------------------------------------------------------

    def _answer(self) -> bool:
        """Answer the last message of the user, and say how that ended. Returns whether there is an
        answer: a signal may have come before."""
        prompt = self._fitting()
        request = replace(
            self.request,
            prompt=prompt,
            seed=self.request.seed + self._answers,
            stop=(*self.request.stop, *self.format.stop),
        )
        interrupts = Interrupts()
        try:
            with (
                interrupts.listening(),
                _Answer(stripped=self.format.stripped) as answer,
                suppress(Interrupted),  # what was said stays
            ):
                for delta in self._engine.stream(request, interrupted=lambda: bool(interrupts)):
                    answer.add(delta.text)
                    answer.result = delta.result
        finally:
            self._answers += 1
            if interrupts.received not in (None, signal.SIGINT):
                raise Interrupted(interrupts.exit_code - 128)
        if interrupts and not answer.text:
            return False
        self._keep(answer, interrupted=bool(interrupts))
        return True

    def _fitting(self) -> Prompt:
        """The prompt of as many turns as fit beside an answer; says when they no longer all do.

        Where turns are left out, there are enough of them that the next ones fit too: all of these
        prompts begin in the same way, which is computed once.
        """
        room = min(self.request.max_new_tokens, self._max_seq_len // 4)
        most = self._max_seq_len - room
        given = self.conversation, self.format, self._session.tokenizer
        known = min(self._first_turn, len(self.conversation.turns) - 1)
        prompt, first_turn = fitting(*given, most, known)
        if first_turn > known:
            prompt, first_turn = fitting(*given, int(KEPT_SHARE * most), first_turn)
        if first_turn and not self._first_turn:
            turns = "turn is" if first_turn == 1 else f"{first_turn} turns are"
            say_aside(
                f"(the first {turns} beyond the context of {self._max_seq_len:,} tokens; the model "
                "sees the newest turns that fit)"
            )
        self._first_turn = first_turn
        return prompt

    def _keep(self, answer: _Answer, *, interrupted: bool) -> None:
        """Add the answer to the conversation, and say what is particular about it."""
        result = answer.result
        reason = "interrupted" if interrupted or result is None else result.finish_reason
        if result is not None and reason == "not_finite":
            raise AptError("the model's logits are not finite: it cannot answer")
        self.conversation.answer(answer.text, "" if reason == "stop" else reason)
        if not answer.text and self._input.interactive:
            say_aside("(an empty answer)")
        if interrupted:
            say_aside("(stopped)")
        if result is None:
            return
        if reason == "length" and self.format.ends:
            say_aside(f"(cut at {len(result.token_ids):,} tokens; /set max_new_tokens allows more)")
        if result.dropped_tokens:
            say_aside(
                f"(the first {result.dropped_tokens:,} of {result.prompt_tokens:,} tokens do not "
                f"fit into the context of {self._max_seq_len:,}; the model did not see them)"
            )
        for source in result.sources:
            say_aside(f"source: {source.path}:{source.first_line}")

    @contextmanager
    def _restored_on_error(self, said: list[Said]) -> Iterator[None]:
        """Put the conversation back to what was ``said`` if the context fails."""
        try:
            yield
        except Interrupted:
            raise
        except BaseException:
            self.conversation.said[:] = said
            raise

    # Commands ---------------------------------------------------------------------------------

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            near = did_you_mean(name, self._commands).replace("'", "'/", 1)
            hint = near or "/help lists them"
            raise ConfigError(
                f"there is no command /{name}", hint=f"{hint}; //{name} sends it as a message"
            )
        takes, _, do = self._commands[name]
        rest = rest.strip()
        if rest and not takes:
            raise ConfigError(f"/{name} takes nothing", hint=f"it was given {rest!r}")
        if not rest and takes and not takes.startswith("["):
            raise ConfigError(f"/{name} needs its {takes}")
        do(rest)

    def _help(self, _: str) -> None:
        forms = {name: f"/{name} {takes}" for name, (takes, *_) in self._commands.items()}
        width = max(map(len, forms.values()))
        for name, (_takes, what, _do) in self._commands.items():
            say(f"{forms[name]:{width}}  {what}")
        say('A line that ends in \\ goes on in the next; """ begins and ends a message of several.')

    def _system(self, rest: str) -> None:
        if not rest:
            say(self.conversation.system or "(there is no system message)")
            return
        self.conversation.system = "" if rest in ('""', "''") else rest
        self._first_turn = 0

    def _retry(self, _: str) -> None:
        before = [*self.conversation.said]
        if not self.conversation.take_back_answer():
            raise ConfigError("there is nothing to answer again")
        if self.request.temperature == 0:
            say_aside("(at temperature 0 an answer is always the same: /set temperature)")
        with self._restored_on_error(before):
            if not self._answer():
                self.conversation.said[:] = before
                say_aside("(stopped before the answer; the last one stays)")

    def _undo(self, _: str) -> None:
        text = self.conversation.undo()
        if text is None:
            raise ConfigError("there is nothing to take back")
        self._first_turn = 0
        say_aside(f"taken back: {beginning(text)}")

    def _clear(self, _: str) -> None:
        self.conversation.said.clear()
        self._first_turn = 0

    def _exit(self, _: str) -> None:
        self._ended = True

    def _history(self, _: str) -> None:
        if self.conversation.system:
            say(f"system: {self.conversation.system}")
        unseen = self.conversation.turns[self._first_turn] if self._first_turn else 0
        for number, each in enumerate(self.conversation.said):
            marks = [each.finish_reason] if each.finish_reason not in ("", "length") else []
            marks += ["not seen"] if number < unseen else []
            mark = f" ({', '.join(marks)})" if marks else ""
            say(f"{each.message.role}{mark}: {each.message.content}")
        if not (self.conversation.said or self.conversation.system):
            say("(nothing was said)")

    def _set(self, rest: str) -> None:
        key, _, value = rest.replace("=", " ", 1).partition(" ") if rest else ("", "", "")
        key, value = key.replace("-", "_"), value.strip()
        shown = {**settings_of(self.request), FORMAT: self.format.name}
        if key and key not in shown:
            hint = did_you_mean(key, shown) or f"there are {', '.join(shown)}"
            raise ConfigError(f"there is no setting {key!r}", hint=hint)
        if not value:
            for name in [key] if key else shown:
                say(f"{name} {json.dumps(shown[name], ensure_ascii=False)}")
        elif key == FORMAT:
            self.format = format_called(value, "format")
            self._first_turn = 0
        else:
            self.request = with_setting(self.request, key, value)

    def _save(self, rest: str) -> None:
        path = user_path(rest)
        checkpoint = self._session.checkpoint
        self.conversation.save(
            path,
            {
                "checkpoint": None if checkpoint is None else str(checkpoint),
                FORMAT: self.format.name,
                "settings": settings_of(self.request),
            },
        )
        say_aside(f"kept in {short_path(str(path.absolute()))}")

    def _load(self, rest: str) -> None:
        self.conversation, self._first_turn = Conversation.load(user_path(rest)), 0
        turns = len(self.conversation.turns)
        say_aside(f"{turns} {'turn' if turns == 1 else 'turns'}; /history shows them")


class _Answer:
    """An answer while it is given: written to stdout, while what else is printed goes to stderr.
    White space around one that is ``stripped`` is no part of it."""

    def __init__(self, *, stripped: bool) -> None:
        self._stripped = stripped
        self._text = ""
        self.result: GenerationResult | None = None
        self._apart = output_apart()

    def __enter__(self) -> _Answer:
        self._stdout = self._apart.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self._text or error[0] is None:
                self._write("" if self._text.endswith("\n") else "\n")
        finally:
            self._apart.__exit__(*error)

    @property
    def text(self) -> str:
        """What was said."""
        return self._text.strip() if self._stripped else self._text

    def add(self, text: str) -> None:
        """Write a piece of it."""
        if self._stripped and not self._text:
            text = text.lstrip()
        self._text += text
        self._write(printable(text, KEPT) if self._stdout.isatty() else text)

    def _write(self, text: str) -> None:
        self._stdout.write(text)
        self._stdout.flush()


def with_setting(request: GenerationRequest, key: str, value: str) -> GenerationRequest:
    """``request`` with a setting as it is typed. Raises ConfigError for one that is not valid."""
    kind = type(getattr(request, key))
    try:
        if key == "stop":
            given = json.loads(value) if value.startswith(("[", '"')) else stop_strings([value])
            parsed: Any = (given,) if isinstance(given, str) else tuple(given)
        else:
            parsed = kind(value)
    except ValueError:
        what = {int: "whole number", float: "number"}.get(kind, "text or JSON list of texts")
        raise ConfigError(f"{value!r} is no {what}", key=key) from None
    changed = replace(request, **{key: parsed})
    check_settings(changed, {})
    return changed


def model_line(session: Session) -> str:
    """One line on the model that somebody talks with."""
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    context = session.config.model.max_seq_len
    return (
        f"{session.config.name}, step {session.position.step:,}: {parameters:,} parameters on "
        f"{session.device}, a context of {context:,} tokens"
    )


def beginning(text: str) -> str:
    """The first line of a message, shortened."""
    line = text.strip().split("\n")[0]
    return line if len(line) <= SHOWN and "\n" not in text.strip() else f"{line[:SHOWN]}…"


def say_aside(text: str) -> None:
    """Say something that is no part of the conversation, on stderr."""
    console = make_console(cast(TextIO, TolerantStream(sys.stderr)))
    console.print(text, style="dim", markup=False)


@contextmanager
def _ending() -> Iterator[None]:
    """While the context lasts, the signals that ask a process to end raise Interrupted."""

    def end(number: int, _: object) -> None:
        raise Interrupted(number)

    with handling((signal.SIGTERM, signal.SIGHUP), end):
        yield
