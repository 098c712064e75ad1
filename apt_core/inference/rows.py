"""A request that is worked on or waits for it: its text, its settings, and what becomes of both.

Shape: V token ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt_core.errors import ConfigError
from apt_core.inference.branches import Branches
from apt_core.inference.decoding import Decoder
from apt_core.inference.lookup import Guesses
from apt_core.inference.request_hooks import RequestHooks
from apt_core.inference.sampling import Sampling, penalized
from apt_core.inference.stopping import GrowingText, whole_characters
from apt_core.inference.texts import Text, window_start
from apt_core.log import get_logger
from apt_core.providers.documents import Document
from apt_core.runs.session import Session
from apt_core.types import GenerationRequest, GenerationResult, TokenLogprob

log = get_logger("apt.inference")


@dataclass(frozen=True)
class Delta:
    """What a stream adds: the ``text`` and the ``token_ids`` since the one before, with their
    ``logprobs`` where the request asks for them. The last has the ``result``, whose text and tokens
    are those of all deltas together."""

    text: str
    token_ids: tuple[int, ...] = ()
    result: GenerationResult | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


OnDelta = Callable[[Delta], None]


class Ticket:
    """A request that was submitted to an engine. ``result`` is there once it is ``done``; ``error``
    is what ended it where the engine's step failed."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.result: GenerationResult | None = None
        self.error: BaseException | None = None
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.result is not None or self.error is not None

    def cancel(self) -> None:
        """End it before the next token; its result is what there is by then."""
        self.cancelled = True


Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""The log-probability of a token, and the ids and log-probabilities of the most likely ones."""


class Row:
    """A request that is worked on or waits for it."""

    def __init__(
        self, session: Session, request: GenerationRequest, on_delta: OnDelta | None
    ) -> None:
        self._session, self._on_delta = session, on_delta
        asked = request
        request = session.manager.chain("apt_rewrite_prompt", request, "prompt", session=session)
        self.request = request
        self.ticket = Ticket(asked)
        self.text = Text(_ids_of(session, request), request.max_new_tokens)
        self.sampling = Sampling.of(request)
        self.decided: int | None = None
        # Python promises that a seed draws the same on every machine and in every version.
        self._random = random.Random(request.seed % (1 << 64))  # noqa: S311
        self._ends = _ends_of(session, request)
        self._asked_plugins = self.begun = False
        self._guesses = Guesses()
        self._guess_from = 0
        self._hooks: RequestHooks | None = None
        self._growing: GrowingText | None = None
        if request.stop or on_delta is not None:
            self._growing = GrowingText(session.tokenizer, request.stop)
        self._logprobs: list[TokenLogprob] = []
        self._extra = 0
        self._untold: list[int] = []

    def begin(self) -> None:
        """Tell the plugins, and ask them what they change."""
        self._asked_plugins = True
        self._session.manager.hook.on_generation_start(request=self.request, session=self._session)
        hooks = RequestHooks(self._session, self.request)
        self._hooks = hooks if hooks else None

    def draw(self) -> float:
        """The next uniform number of the request's seed."""
        return self._random.random()

    def guessed(self, room: int) -> list[int]:
        """A guess of its next tokens, at most ``room``; empty unless the most likely token is taken
        whatever comes."""
        if not self.takes_likeliest or len(self.text.ids) < self._guess_from:
            return []
        return self._guesses.of(self.text.ids, min(room, self.text.most - len(self.text.ids) - 1))

    def guess_less(self) -> None:
        """Guess nothing for the next token, whose logits are to be computed alone."""
        self._guess_from = len(self.text.ids) + 1

    @property
    def takes_likeliest(self) -> bool:
        """Whether it takes the most likely token, and asks for nothing else of the logits."""
        return self.sampling.greedy and not self.changes_logits and self.request.logprobs is None

    @property
    def changes_logits(self) -> bool:
        """Whether its logits have to be looked at alone."""
        return self._hooks is not None or self.request.repetition_penalty != 1

    def changed(self, logits: Tensor, decoder: Decoder) -> Tensor:
        """Its logits [V] as plugins and the penalty change them; decides the token if a plugin
        does."""
        self.decided = None
        window = decoder.window(self.text) if self._hooks is not None else None
        if self._hooks is not None and window is not None:
            logits = self._hooks.processed(window, logits)
        if self.request.repetition_penalty != 1:
            held = torch.tensor(self.text.ids).to(logits.device, non_blocking=True)
            seen = torch.zeros_like(logits, dtype=torch.bool).index_fill_(0, held, True)
            logits = penalized(logits, seen, self.request.repetition_penalty)
        if self._hooks is not None and window is not None:
            branches = Branches(decoder, self.text, self.sampling, self._ends)
            self.decided = self._hooks.chosen(window, logits, branches)
            self._extra += branches.tokens
        return logits

    def add(self, token: int, logprobs: Logprobs | None) -> str | None:
        """Add a token, -1 for logits that were not finite; the reason to end if there is one."""
        self.begun = True
        if token < 0:
            log.warning("generation stopped: the model's logits are not finite")
            return "not_finite"
        if token in self._ends:
            return "stop"
        self.text.ids.append(token)
        if logprobs is not None:
            own = self._session.tokenizer.decode([token])
            self._logprobs.append(TokenLogprob(token, own, *logprobs))
        if self._growing is not None:
            piece = self._growing.add(token)
            self._untold.append(token)
            if self._growing.stopped:
                return "stop" if not piece else self._tell(piece, "stop")
            if piece:
                self._tell(piece)
        return "length" if len(self.text.ids) == self.text.most else None

    def _tell(self, piece: str, reason: str | None = None) -> str | None:
        if self._on_delta is not None:
            self._on_delta(self._delta(piece))
            self._untold.clear()
        return reason

    def _delta(self, piece: str, result: GenerationResult | None = None) -> Delta:
        logprobs = self._logprobs[-len(self._untold) :] if self._untold else ()
        return Delta(piece, tuple(self._untold), result, tuple(logprobs))

    def end(self, reason: str) -> None:
        """Make the result, and tell plugins of it if they were told of the beginning."""
        request, text, growing = self.request, self.text, self._growing
        ids = tuple(text.ids[text.start :])
        cut = reason != "stop"
        if growing is None:
            decoded = self._session.tokenizer.decode(ids)
            piece, whole = "", whole_characters(decoded) if cut else decoded
        else:
            piece = growing.finish(cut=cut)
            whole = growing.text
        result = GenerationResult(
            whole,
            ids,
            "stop" if growing is not None and growing.stopped else reason,
            prompt_tokens=text.start,
            logprobs=None if request.logprobs is None else tuple(self._logprobs),
            sources=tuple(request.sources),
            dropped_tokens=window_start(text.start, self._session.config.model.max_seq_len),
            extra_tokens=self._extra,
        )
        self.ticket.result = result
        if self._asked_plugins:
            self._session.manager.hook.on_generation_end(
                request=request, result=result, session=self._session
            )
        if self._on_delta is not None:
            self._on_delta(self._delta(piece, result))


def _ids_of(session: Session, request: GenerationRequest) -> list[int]:
    """The ids of the prompt; an empty prompt is the place after a document."""
    tokenizer, prompt = session.tokenizer, request.prompt
    whole: dict[str, Any] = (
        {"text": prompt} if isinstance(prompt, str) else {"messages": tuple(prompt)}
    )
    try:
        ids = tokenizer.encode_prompt(Document(**whole))
    except ValueError as error:
        raise ConfigError(str(error), key="prompt") from error
    return list(ids) or [tokenizer.special.eos or 0]


def _ends_of(session: Session, request: GenerationRequest) -> frozenset[int]:
    """The tokens that end the text: that of a document and further ones, and in a conversation also
    that of a turn and those with which another one begins."""
    special = session.tokenizer.special
    ends = {special.eos, *special.ends}
    if not isinstance(request.prompt, str):
        ends |= {special.end, *special.roles.values()}
    return frozenset(token for token in ends if token is not None)
