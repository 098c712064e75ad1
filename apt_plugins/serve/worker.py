"""The thread that owns the engine: requests join and leave between two tokens."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from apt_core import ConfigError, GenerationRequest, GenerationResult
from apt_core.error_text import one_line
from apt_core.inference import Delta, Engine, Ticket
from apt_core.log import get_logger
from apt_core.types import TokenLogprob

log = get_logger("apt.serve")

TopLogprobs = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Token:
    """A token's text with its log-probability, and the texts of the ``top`` most likely ones with
    theirs."""

    text: str
    logprob: float
    top: TopLogprobs


@dataclass(frozen=True)
class Piece:
    """What an answer gained."""

    text: str
    tokens: tuple[Token, ...] = ()


class Busy(Exception):
    """As many answers are asked for as the server takes on."""


class Closing(Exception):
    """The server takes on nothing any more."""


class Answer:
    """An answer that is being made, as the event loop sees it: its ``pieces`` so far that nobody
    has taken, and in the end its ``result`` or ``error``. What is not taken gets together, so that
    a slow reader keeps no more than its own text.

    ``on_change`` is called in the loop's thread.
    """

    def __init__(
        self,
        make: Callable[[], GenerationRequest],
        loop: asyncio.AbstractEventLoop,
        on_change: Callable[[], None],
        *,
        streamed: bool,
    ) -> None:
        self.make, self.streamed = make, streamed
        self.pieces: list[Piece] = []
        self.result: GenerationResult | None = None
        self.tokens: tuple[Token, ...] = ()
        self.error: Exception | None = None
        self.loop, self._on_change = loop, on_change

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.result is not None or self.error is not None

    def take(self) -> Piece | None:
        """What came since the last call, in one piece."""
        if not self.pieces:
            return None
        taken, self.pieces = self.pieces, []
        tokens = tuple(token for piece in taken for token in piece.tokens)
        return Piece("".join(piece.text for piece in taken), tokens)

    def receive(self, news: _News) -> None:
        """Take in what the worker says."""
        if news.piece is not None:
            self.pieces.append(news.piece)
        if news.result is not None:
            self.result, self.tokens = news.result, news.tokens
        self.error = news.error or self.error
        self._on_change()


@dataclass(frozen=True)
class _News:
    piece: Piece | None = None
    result: GenerationResult | None = None
    tokens: tuple[Token, ...] = ()
    error: Exception | None = None


@dataclass(eq=False)
class _Job:
    """An answer as the worker sees it. ``told`` is the text that was told. One that was begun
    ``again`` is told no further before it has ``seen`` as much."""

    answer: Answer
    request: GenerationRequest
    ticket: Ticket | None = None
    told: str = ""
    told_tokens: int = 0
    again: bool = False
    seen: str = ""
    seen_tokens: int = 0


class Worker:
    """Makes answers with the engines of ``make_engine``, in a thread of its own. Up to
    ``max_answers`` are worked on or wait.

    Where a step of the engine fails, each of its answers is begun again alone, without saying twice
    what it has said: the one that fails again ends with its error, the others go on.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, max_answers: int) -> None:
        self._make_engine, self._max_answers = make_engine, max_answers
        self._engine = make_engine()
        self._session = self._engine.session
        self._changed = threading.Condition()
        self._new: deque[Answer] = deque()
        self._given_up: list[Answer] = []
        self._open = 0
        self._closing = self._stopping = False
        self._jobs: dict[Answer, _Job] = {}
        self._suspects: deque[_Job] = deque()
        self._alone = False
        self._news: list[tuple[Answer, _News]] = []
        self.failure: BaseException | None = None
        # A thread begins with an empty context, and the context says where a run's log goes.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name="apt-serve engine", daemon=True
        )

    # Called in the event loop's thread -----------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def open_answers(self) -> int:
        """The answers that are worked on or wait."""
        return self._open

    @property
    def closing(self) -> bool:
        """Whether nothing new is taken on."""
        return self._closing or self.failure is not None

    def submit(self, answers: Sequence[Answer]) -> None:
        """Take on all of ``answers``, or none. Raises Busy, and Closing."""
        with self._changed:
            if self.closing:
                raise Closing
            if self._open + len(answers) > self._max_answers:
                raise Busy
            self._open += len(answers)
            self._new.extend(answers)
            self._changed.notify()

    def give_up(self, answers: Sequence[Answer]) -> None:
        """End ``answers`` before their next token, with what there is by then."""
        with self._changed:
            self._given_up += answers
            self._changed.notify()

    def close(self) -> None:
        """Take on nothing any more."""
        self._closing = True

    def end_all(self) -> None:
        """End every answer before its next token."""
        with self._changed:
            self._closing = True
            self._given_up += [*self._new, *self._jobs]
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """End every answer and the thread, for which this waits at most ``seconds``."""
        self.end_all()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    # Called in the worker's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                # An engine that failed is replaced, and with it what it computes in.
                engine = self._engine
                with engine.computing():
                    while self._turn() and self._engine is engine:
                        pass
        except BaseException as error:  # nothing can be answered any more: the server ends with it
            self.failure = error
            with self._changed:
                left = [*self._jobs, *self._new]
                self._jobs.clear()
                self._new.clear()
            for answer in left:
                self._end(answer, _News(error=RuntimeError(one_line(error))))
            self._deliver()

    def _await_work(self) -> bool:
        with self._changed:
            while not (self._new or self._given_up or self._jobs or self._stopping):
                self._changed.wait()
            return bool(self._new or self._jobs or self._given_up) or not self._stopping

    def _turn(self) -> bool:
        """One token for every answer; returns whether there is more to do."""
        with self._changed:
            given_up, self._given_up = self._given_up, []
            # While a suspect is worked on, nothing is to fail with it.
            new = [] if self._alone or self._suspects else [*self._new]
            for answer in new:
                self._jobs[answer] = _Job(answer, GenerationRequest(""))
            if new:
                self._new.clear()
        for answer in given_up:
            self._let_go(answer)
        for answer in new:
            if answer in self._jobs:
                self._begin(self._jobs[answer])
        self._step()
        if not self._working():
            self._alone = False
            if self._suspects:
                job = self._suspects.popleft()
                self._alone = True
                self._submit(job)
        self._deliver()
        return bool(self._jobs)

    def _working(self) -> bool:
        return any(job.ticket is not None for job in self._jobs.values())

    def _begin(self, job: _Job) -> None:
        try:
            job.request = job.answer.make()
        except Exception as error:
            self._fail(job, error)
        else:
            self._submit(job)

    def _submit(self, job: _Job) -> None:
        def on_delta(delta: Delta) -> None:
            self._tell(job, delta)

        try:
            job.ticket = self._engine.submit(job.request, on_delta if job.answer.streamed else None)
        except Exception as error:
            self._fail(job, error)

    def _let_go(self, answer: Answer) -> None:
        with self._changed:
            waiting = answer in self._new
            if waiting:
                self._new.remove(answer)
        job = self._jobs.get(answer)
        if job is not None and job.ticket is not None:
            job.ticket.cancel()
        elif job is not None or waiting:
            if job is not None and job in self._suspects:
                self._suspects.remove(job)
            self._end(answer, _News(result=GenerationResult("", (), "interrupted")))

    def _step(self) -> None:
        if not self._working():
            return
        error: Exception | None = None
        try:
            self._engine.step()
        except Exception as failed:
            error = failed
            log.warning("a step of the engine failed: %s", one_line(error))
            log.debug("the engine's failure", exc_info=error)
        for job in [*self._jobs.values()]:
            if job.ticket is not None and job.ticket.result is not None:
                result = job.ticket.result
                tokens = () if job.answer.streamed else self._tokens(result.logprobs)
                self._end(job.answer, _News(result=result, tokens=tokens))
        if error is not None:
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Go on with an engine that has not failed."""
        self._engine = self._make_engine()
        left = [job for job in self._jobs.values() if job.ticket is not None]
        if self._alone:
            for job in left:
                self._fail(job, error)
            return
        for job in left:
            job.ticket = None
            job.again = True
            self._suspects.append(job)

    def _fail(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, ConfigError):
            log.error("an answer failed: %s", one_line(error))
        self._end(job.answer, _News(error=error))

    def _end(self, answer: Answer, news: _News) -> None:
        with self._changed:
            self._jobs.pop(answer, None)
            self._open -= 1
        self._news.append((answer, news))

    def _tell(self, job: _Job, delta: Delta) -> None:
        text, tokens = delta.text, self._tokens(delta.logprobs)
        if job.again:
            job.seen += text
            job.seen_tokens += len(tokens)
            if not job.seen.startswith(job.told[: len(job.seen)]):
                raise RuntimeError("the answer begins differently the second time")
            text = job.seen[len(job.told) :]
            tokens = tokens[max(0, len(tokens) - max(0, job.seen_tokens - job.told_tokens)) :]
            if job.seen_tokens <= job.told_tokens:
                tokens = ()
        job.told += text
        job.told_tokens += len(tokens)
        if text or tokens:
            self._news.append((job.answer, _News(Piece(text, tokens))))

    def _tokens(self, logprobs: Sequence[TokenLogprob] | None) -> tuple[Token, ...]:
        decode = self._session.tokenizer.decode
        return tuple(
            Token(each.text, each.logprob, tuple((decode([id_]), value) for id_, value in each.top))
            for each in logprobs or ()
        )

    def _deliver(self) -> None:
        news, self._news = self._news, []
        if not news:
            return

        def hand_out() -> None:
            for answer, each in news:
                answer.receive(each)

        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            news[0][0].loop.call_soon_threadsafe(hand_out)
