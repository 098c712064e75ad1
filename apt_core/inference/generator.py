"""Sampling a continuation, with the hooks of a generation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.device import autocast
from apt_core.hook_returns import logits
from apt_core.log import get_logger
from apt_core.modeling.casts import KeptCasts
from apt_core.plugin_manager import PluginManager
from apt_core.providers.documents import Document
from apt_core.runs.session import Session
from apt_core.types import GenerationRequest, GenerationResult

log = get_logger("apt.inference")

Processor = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def generate(
    session: Session,
    request: GenerationRequest,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> GenerationResult:
    """Continue ``request.prompt`` by up to ``request.max_new_tokens`` tokens, or to the end of the
    document, with the model, the tokenizer and the plugins of ``session``.

    The model sees the text from :func:`window_start` on, and computes in :func:`dtype_for`.
    Sampling has a generator of its own, seeded by ``request.seed``; temperature 0 takes the most
    likely token. The host waits for the device once per token, to check that the logits are finite
    and whether the text has ended; plugins may add waits of their own.
    """
    manager, tokenizer, device = session.manager, session.tokenizer, session.device
    max_seq_len, dtype = session.config.model.max_seq_len, dtype_for(session)
    request = manager.chain("apt_rewrite_prompt", request, "prompt", session=session)
    manager.hook.on_generation_start(request=request, session=session)
    processors = _processors(session, request)
    decoder = _Decoder(session, request)
    generator = torch.Generator(device=device).manual_seed(request.seed)
    eos = tokenizer.special.eos
    # An empty prompt is the place after a document.
    ids = tokenizer.encode_prompt(Document(text=request.prompt)) or [eos or 0]
    start = len(ids)
    with session.computing(), _casts_kept(device, dtype):
        room = min(max_seq_len, start + request.max_new_tokens)
        reader = _Reader(session.model, ids, max_seq_len, room, device, dtype)
        for _ in range(request.max_new_tokens):
            if interrupted():
                break
            input_ids, logits = reader.read()
            logits = logits[: tokenizer.vocab_size]
            finite, ended = _state(logits, reader.last if reader.length > start else None, eos)
            if ended:
                reader.drop_last()
                break
            if not finite:
                log.warning("generation stopped: the model's logits are not finite")
                break
            for processor in processors:
                logits = processor(input_ids, logits)
            reader.append(decoder.choose(input_ids, logits, generator))
    ids = reader.ids()
    result = GenerationResult(tokenizer.decode(ids[start:]), tuple(ids[start:]))
    manager.hook.on_generation_end(request=request, result=result, session=session)
    return result


def _state(logits: Tensor, last: Tensor | None, eos: int | None) -> tuple[bool, bool]:
    """Whether the logits are finite, and whether the last new token ends the document."""
    finite = logits.isfinite().all()
    if last is None or eos is None:
        return bool(finite), False
    known = torch.stack([finite, last == eos]).tolist()
    return known[0], known[1]


def dtype_for(session: Session) -> torch.dtype | None:
    """The autocast dtype of a generation: the run's, or on a CPU always None (fp32)."""
    return None if session.device.type == "cpu" else session.dtype


def window_start(length: int, max_seq_len: int) -> int:
    """The first position of the window that the model sees of a text of ``length`` tokens: 0 while
    the text fits into ``max_seq_len``. Later the window moves by half its size at a time, so that
    a cache can be used for many tokens.

    >>> [window_start(length, 8) for length in (1, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    stride = max(1, max_seq_len // 2)
    return max(0, -(-(length - max_seq_len) // stride) * stride)


def _casts_kept(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """A context in which torch keeps the casts of weights from one autocast context to the next.
    Computations outside of autocast are not affected."""
    return nullcontext() if dtype is None else torch.autocast(device.type, enabled=False)


class _Reader:
    """A growing text on the device, and the logits after it. With caches each token is computed
    once until the window moves; without them the whole window is computed for every token."""

    def __init__(
        self,
        model: nn.Module,
        ids: list[int],
        max_seq_len: int,
        room: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """The text begins with ``ids``; caches have room for ``room`` tokens."""
        self._model, self._max_seq_len, self._room = model, max_seq_len, room
        self._device, self._dtype, self._casts = device, dtype, KeptCasts(model)
        self._text, self._length = torch.tensor(ids, device=device), len(ids)
        self._start = self._read = 0
        self._create = getattr(model, "create_caches", None)
        self._caches = self._new_caches()
        if self._caches is None:
            log.info("generation computes the whole text anew for every token: no cache")

    def _new_caches(self) -> Any:
        return None if self._create is None else self._create(self._room)

    def append(self, token: Tensor | int) -> None:
        """Add a token id, a number or 0-d on the device."""
        if self._length == len(self._text):
            self._text = torch.cat([self._text, torch.empty_like(self._text)])
        self._text[self._length] = token
        self._length += 1

    @property
    def length(self) -> int:
        """The number of tokens of the text."""
        return self._length

    @property
    def last(self) -> Tensor:
        """The last token, 0-d."""
        return self._text[self._length - 1]

    def drop_last(self) -> None:
        """Take the last token back; nothing is read after it."""
        self._length -= 1

    def ids(self) -> list[int]:
        """The whole text; waits for the device."""
        ids: list[int] = self._text[: self._length].tolist()
        return ids

    def read(self) -> tuple[Tensor, Tensor]:
        """The window [1, S] and the fp32 logits [V] after it."""
        start = window_start(self._length, self._max_seq_len)
        if start != self._start:
            self._start = self._read = start
            self._caches = self._new_caches()
        # A copy, since plugins get it and may keep it.
        window = self._text[None, start : self._length].clone()
        if self._caches is not None:
            logits = self._logits(window[:, self._read - start :], caches=self._caches)
            self._read = self._length
            if all(cache.length == window.shape[1] for cache in self._caches):
                return window, logits
            log.warning("a cache does not hold what its layer read: computing everything anew")
            self._create = self._caches = None
        return window, self._logits(window)

    def _logits(self, input_ids: Tensor, **options: Any) -> Tensor:
        with self._casts.used(self._dtype), autocast(self._device, self._dtype):
            logits: Tensor = self._model(input_ids, **options).logits
        return logits[0, -1].float()


def sample(logits: Tensor, request: GenerationRequest, generator: torch.Generator) -> Tensor:
    """A token id, 0-d, from ``logits`` [V] by temperature and top-k, without a wait for the
    device."""
    likely = logits.argmax()
    if request.temperature <= 0:
        return likely
    probabilities, ids = candidates(logits, request)
    # The draw of torch.multinomial, without its check of the probabilities on the host.
    draws = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = ids[(probabilities / draws).argmax(0, keepdim=True)].squeeze(0)
    # With a temperature near 0 the logits may overflow: then take the most likely token.
    return torch.where(probabilities.isfinite().all(), drawn, likely)


def candidates(logits: Tensor, request: GenerationRequest) -> tuple[Tensor, Tensor]:
    """The probabilities [K] and token ids [K] of the top k, the most probable first, for ``logits``
    [V] and a temperature above 0."""
    kept = min(request.top_k, logits.numel()) if request.top_k > 0 else logits.numel()
    values, ids = (logits / request.temperature).topk(kept)
    return values.softmax(-1), ids


def _processors(session: Session, request: GenerationRequest) -> list[Processor]:
    given = {"request": request, "session": session}
    return [
        _guarded(session.manager, plugin, function)
        for plugin, functions in session.manager.call_each("apt_logits_processors", **given)
        for function in functions
    ]


def _guarded(manager: PluginManager, plugin: str, function: Any) -> Processor:
    """A logits processor that is skipped after it fails; the failure counts as its plugin's."""
    alive = True

    def process(input_ids: Tensor, given: Tensor) -> Tensor:
        nonlocal alive
        if not alive:
            return given
        changed = manager.attempt(
            plugin,
            "apt_logits_processors",
            lambda: logits(function(input_ids, given.clone()), given),
        )
        alive = changed is not None
        return given if changed is None else changed

    return process


class _Decoder:
    """Chooses tokens by a plugin's decoder, or by sampling if it fails or returns None."""

    def __init__(self, session: Session, request: GenerationRequest) -> None:
        self._manager, self._request = session.manager, request
        self._chosen = self._manager.call_first("apt_decoder", request=request, session=session)

    def choose(self, input_ids: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor | int:
        token = self._token_of_plugin(input_ids, logits)
        return sample(logits, self._request, generator) if token is None else token

    def _token_of_plugin(self, input_ids: Tensor, logits: Tensor) -> int | None:
        """The token of the plugin's decoder, or None if it returns none or has failed."""
        if self._chosen is None:
            return None
        plugin, decoder = self._chosen

        def chosen() -> tuple[int | None]:
            token = decoder.choose(input_ids, logits.clone())
            if token is None:
                return (None,)
            token = operator.index(token)
            if not 0 <= token < logits.numel():
                raise ValueError(f"the decoder chose token {token} of {logits.numel()}")
            return (token,)

        answer = self._manager.attempt(plugin, "apt_decoder", chosen)
        if answer is None:
            self._chosen = None
            return None
        return answer[0]
