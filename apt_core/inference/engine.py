"""Generates text for many requests at once, one token of each in a step.

Shapes: B rows, V token ids.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from apt_core.errors import ConfigError
from apt_core.generation_requests import check_request
from apt_core.inference.decoding import Decoder, dtype_for
from apt_core.inference.lookup import LOOKUPS, TIE, Lookup, Payoff
from apt_core.inference.rows import Delta, Logprobs, OnDelta, Row, Ticket
from apt_core.inference.sampling import Sampling, choose, log_probabilities
from apt_core.runs.session import Session
from apt_core.types import GenerationRequest, GenerationResult


class Engine:
    """Generates with the model, the tokenizer and the plugins of a session.

    Up to ``max_batch`` requests are worked on at once; the others wait for their turn, in the order
    of their submission. A request's result is what it would be alone: its tokens depend on its own
    prompt, settings and seed, up to the last bits of the logits, which may depend on the size of
    the batch.

    With ``lookup``, texts whose tokens are the most likely ones are also continued by guesses from
    what they have said before, several tokens a step; ``auto`` does so where it is faster. It
    changes no token (:data:`apt_core.inference.lookup.TIE`). ``int8`` rounds weights to 8 bits
    where that is faster on this CPU, which changes results a little; there is no look-up then, nor
    with weights that are kept as integers (apt-quantize), for which x is rounded to bf16 on a CPU
    unless results are to be ``exact``: those of the model's forward. ``compiled`` compiles what a
    single text is computed by on a CPU, when its first token is made.

    One thread computes with an engine at a time; another one is refused meanwhile. Engines may
    share a session, in one thread.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_batch: int = 16,
        lookup: Lookup = "auto",
        int8: bool = False,
        compiled: bool = False,
        exact: bool = False,
    ) -> None:
        """Raises ConfigError for settings that are not valid."""
        if max_batch < 1:
            raise ConfigError(f"is {max_batch}: at least one text must fit", key="max_batch")
        if lookup not in LOOKUPS:
            raise ConfigError(f"is {lookup!r}", key="lookup", hint=f"one of {', '.join(LOOKUPS)}")
        self.session, self.max_batch = session, max_batch
        self.lookup = Payoff("never" if int8 else lookup)
        self._decoder = Decoder(
            session.model,
            device=session.device,
            max_seq_len=session.config.model.max_seq_len,
            vocab_size=session.tokenizer.vocab_size,
            dtype=dtype_for(session),
            int8=int8,
            compiled=compiled,
            exact=exact,
        )
        self._waiting: deque[Row] = deque()
        self._active: list[Row] = []
        self._used = threading.Lock()
        self._thread: int | None = None  # the one that is computing

    # Asking ----------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_delta: OnDelta | None = None) -> Ticket:
        """Put ``request`` behind those that wait. ``on_delta`` is called in :meth:`step` with each
        piece of its text.

        Raises ConfigError for a request that is not valid or that the tokenizer cannot encode.
        """
        row = Row(self.session, check_request(request), on_delta)
        self._waiting.append(row)
        return row.ticket

    def run(
        self,
        requests: Sequence[GenerationRequest],
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[GenerationResult]:
        """The results of ``requests``, in their order. Once ``interrupted`` returns True, they end
        with what they have by then. Raises what :meth:`submit` and the model raise."""
        checked = [check_request(request) for request in requests]
        tickets: list[Ticket] = []
        with self.computing(), self._cancelled_on_error(tickets):
            for request in checked:
                tickets.append(self.submit(request))
            self._run(tickets, interrupted)
        results = [ticket.result for ticket in tickets]
        return [result for result in results if result is not None]

    def stream(
        self,
        request: GenerationRequest,
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Delta]:
        """The text of ``request`` piece by piece. Raises as :meth:`run` does; a generator that is
        closed before its end cancels the request."""
        deltas: deque[Delta] = deque()
        row = Row(self.session, check_request(request), deltas.append)
        return self._streamed(row, deltas, interrupted)

    def _streamed(
        self, row: Row, deltas: deque[Delta], interrupted: Callable[[], bool]
    ) -> Iterator[Delta]:
        # It waits from here on: a generator that is never begun leaves nothing behind.
        self._waiting.append(row)
        ticket = row.ticket
        with self._cancelled_on_error([ticket]):
            while not ticket.done:
                if interrupted():
                    ticket.cancel()
                self.step()
                while deltas:
                    yield deltas.popleft()

    def _run(self, tickets: Sequence[Ticket], interrupted: Callable[[], bool]) -> None:
        while not all(ticket.done for ticket in tickets):
            if interrupted():
                for ticket in tickets:
                    ticket.cancel()
            self.step()

    @contextmanager
    def _cancelled_on_error(self, tickets: Sequence[Ticket]) -> Iterator[None]:
        """Let go of ``tickets`` where what waits for them ends early."""
        try:
            yield
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            if self._thread in (None, threading.get_ident()):
                self._drop_cancelled()
            raise

    # Working ---------------------------------------------------------------------------------

    def computing(self) -> AbstractContextManager[object]:
        """A context for many steps: what :meth:`step` would otherwise set up and put back each
        time. Nothing else should be computed in it. Raises RuntimeError while another thread is in
        it."""
        if self._thread == threading.get_ident():
            return nullcontext()
        return self._computing()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if not self._used.acquire(blocking=False):
            raise RuntimeError(
                "another thread computes with this engine: give each thread an engine of its own, "
                "or put a lock around it"
            )
        try:
            with self.session.computing(), self._decoder.kept_casts():
                self._thread = threading.get_ident()
                try:
                    yield
                finally:
                    self._thread = None
        finally:
            self._used.release()

    def step(self) -> bool:
        """Begin with what waits and fits, and add a token to every text that is worked on. Returns
        whether there is more to do.

        Where the model or a caller's ``on_delta`` raises, all texts that were worked on end with
        that error, which is raised.
        """
        with self.computing():
            self._drop_cancelled()
            try:
                self._take_step()
            except BaseException as error:
                for row in [*self._active]:
                    row.ticket.error = error
                    self._leave(row)
                raise
        return bool(self._active or self._waiting)

    def _take_step(self) -> None:
        if not self._active and self._waiting:
            self._decoder.refresh()
        while self._waiting and len(self._active) < self.max_batch:
            self._active.append(self._waiting.popleft())
            self._active[-1].begin()
        rows, start = [*self._active], time.perf_counter()
        if not rows:
            return
        guesses = self._guesses(rows) if self.lookup.wanted else []
        if any(guesses):
            before = sum(len(row.text.ids) for row in rows)
            kept = self._add_guessed(rows, guesses)
            added = sum(len(row.text.ids) for row in rows) - before
            seconds = time.perf_counter() - start
            guessed = sum(map(len, guesses))
            self.lookup.guessed_step(seconds, added, guessed=guessed, kept=kept)
            return
        one_each = all(row.begun for row in rows)
        texts = [row.text for row in rows]
        if all(row.takes_likeliest for row in rows):
            read = self._decoder.likeliest(texts).tolist()
            self._add(rows, [_token(*each) for each in read], [None] * len(rows))
        else:
            self._add_tokens(rows, self._decoder.logits(texts))
        if one_each:
            self.lookup.plain_step(time.perf_counter() - start, len(rows))

    def _guesses(self, rows: Sequence[Row]) -> list[list[int]]:
        """Guesses of the next tokens of each row; empty where a text is not ready for them."""
        rooms = [self._decoder.room(row.text) for row in rows]
        if not all(rooms):
            return []
        return [row.guessed(room) for row, room in zip(rows, rooms, strict=True)]

    def _add_guessed(self, rows: Sequence[Row], guesses: Sequence[list[int]]) -> int:
        """Verify ``guesses`` and add tokens to ``rows``; how many guesses were right."""
        verified = self._decoder.verified([row.text for row in rows], guesses)
        others = [row for row, guess in zip(rows, guesses, strict=True) if not guess]
        firsts = [logits[0] for logits, guess in zip(verified, guesses, strict=True) if not guess]
        likely = [_likely(logits) for logits, guess in zip(verified, guesses, strict=True) if guess]
        known = torch.cat(likely).tolist()
        kept = 0
        for row in others:
            self._decoder.truncate(row.text)
        for row, guess in zip(rows, guesses, strict=True):
            if not guess:
                continue
            reason = None
            of_row, known = known[: len(guess) + 1], known[len(guess) + 1 :]
            for (token, margin), guessed in zip(of_row, [*guess, -1], strict=True):
                if not TIE <= margin < math.inf:  # or it is NaN
                    row.guess_less()
                    break
                reason = row.add(int(token), None)
                if reason is not None or int(token) != guessed:
                    break
                kept += 1
            self._decoder.truncate(row.text)
            if reason is not None:
                self._leave(row)
                row.end(reason)
        if others:
            self._add_tokens(others, torch.stack(firsts))
        return kept

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._waiting if row.ticket.cancelled]:
            self._waiting.remove(row)
            row.end("interrupted")
        for row in [row for row in self._active if row.ticket.cancelled]:
            self._leave(row)
            row.end("interrupted")

    def _leave(self, row: Row, *, spoiled: bool = False) -> None:
        self._active.remove(row)
        self._decoder.release(row.text, spoiled=spoiled)

    def _add_tokens(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose a token for each of ``rows`` by its ``logits`` [B, V], and add it."""
        # A sum is not finite if one of its terms is not.
        sums, given = logits.sum(-1), logits
        if any(row.changes_logits for row in rows):
            given = self._changed(rows, logits, sums.isfinite().tolist())
        self._add(rows, *self._read(rows, logits, sums, self._chosen(rows, given)))

    def _add(
        self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[Logprobs | None]
    ) -> None:
        for row, token, known in zip([*rows], tokens, logprobs, strict=True):
            reason = row.add(token, known)
            if reason is not None:
                self._leave(row, spoiled=reason == "not_finite")
                row.end(reason)

    def _changed(self, rows: Sequence[Row], logits: Tensor, finite: Sequence[bool]) -> Tensor:
        """``logits`` as the rows' plugins and penalties change them."""
        changed = logits.clone()
        for index, row in enumerate(rows):
            if row.changes_logits and finite[index]:
                changed[index] = row.changed(changed[index], self._decoder)
        return changed

    def _chosen(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """A token for each row, int64 [B]; rows with the same settings are drawn together."""
        groups: dict[Sampling, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.sampling, []).append(index)
        chosen: Tensor | None = None
        for sampling, indices in groups.items():
            draws = None
            if not sampling.greedy:
                uniform = [rows[index].draw() for index in indices]
                draws = torch.tensor(uniform, dtype=torch.float64)
                if logits.device.type == "mps":
                    draws = draws.float()
                draws = draws.to(logits.device, non_blocking=True)
            if len(groups) == 1:
                chosen = choose(logits, sampling, draws)
                break
            if chosen is None:
                chosen = logits.new_zeros(len(rows), dtype=torch.int64)
            where = torch.tensor(indices).to(logits.device, non_blocking=True)
            chosen[where] = choose(logits[where], sampling, draws)
        assert chosen is not None
        decided = [(index, row.decided) for index, row in enumerate(rows)]
        for index, token in decided:
            if token is not None:
                chosen[index] = token
        return chosen

    def _read(
        self, rows: Sequence[Row], logits: Tensor, sums: Tensor, tokens: Tensor
    ) -> tuple[list[int], list[Logprobs | None]]:
        """The ``tokens`` as numbers, -1 where ``sums`` of the logits are not finite, with the
        log-probabilities of rows that ask for them. Here the host waits for the device."""
        asked = [row.request.logprobs for row in rows]
        most = max((count for count in asked if count is not None), default=None)
        # All in one tensor, of fp32, which holds ids below 2**24 exactly.
        read = torch.stack([sums, tokens.float()], 1)
        if most is not None:
            own, values, ids = log_probabilities(logits, tokens, most)
            read = torch.cat([read, own[:, None], values, ids.float()], 1)
        packed = read.tolist()
        found = [_token(total, token) for total, token, *_ in packed]
        if most is None:
            return found, [None] * len(rows)
        logprobs: list[Logprobs | None] = []
        for count, (_, _, logprob, *others) in zip(asked, packed, strict=True):
            half = len(others) // 2
            pairs = zip(others[half:], others[:half], strict=True)
            top = tuple((int(i), v) for i, v in pairs)[:count]
            logprobs.append(None if count is None else (logprob, top))
        return found, logprobs


def _token(total: float, token: float) -> int:
    """The id ``token``, -1 if the sum ``total`` of the logits is not finite."""
    return int(token) if math.isfinite(total) else -1


def _likely(logits: Tensor) -> Tensor:
    """Of logits [T, V]: the most likely token of each, and how far its logit is above the next one;
    float64 [T, 2]."""
    values, ids = logits.topk(2)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.stack([ids[:, 0].to(wide), (values[:, 0] - values[:, 1]).to(wide)], dim=1)


def generate(
    session: Session,
    request: GenerationRequest,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> GenerationResult:
    """The result of one request; see :class:`Engine`. The engine is kept with the session."""
    # Taken out while it is used, for a plugin may generate within a generation.
    engine = session.kept.pop("engine", None) or Engine(session, max_batch=1)
    result: GenerationResult = engine.run([request], interrupted=interrupted)[0]
    session.kept["engine"] = engine
    return result
