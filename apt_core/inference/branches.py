"""Continuations of a text that is being generated, for decoders that look ahead."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_core.inference.decoding import Decoder
from apt_core.inference.sampling import Sampling, choose
from apt_core.inference.texts import Text


@dataclass(frozen=True)
class Branch:
    """A continuation: its ``token_ids``, at least one, and the log-probability of each by the
    model's softmax. It ends early with the text, and ``ended`` says so: its last token is then the
    one that ends the text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool = False

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The tokens without the one that ends the text."""
        return self.token_ids[:-1] if self.ended else self.token_ids


class Branches:
    """Continues a text in several ways, from copies of what its caches hold; the text itself goes
    on unchanged. ``tokens`` counts the tokens that were computed."""

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        sampling: Sampling,
        ends: Collection[int],
    ) -> None:
        self._decoder, self._text, self._sampling = decoder, text, sampling
        self._ends, self.tokens = ends, 0

    def __call__(self, logits: Tensor, length: int, seeds: Sequence[int]) -> list[Branch]:
        """A continuation of up to ``length`` tokens for each of ``seeds``. The first token is drawn
        from ``logits`` [V], each other one from the model's, as the request says: by temperature,
        top-k, top-p and min-p. Raises ValueError for a length below 1."""
        if length < 1:
            raise ValueError(f"a continuation has at least one token, not {length}")
        room = max(0, self._text.most - len(self._text.ids))
        found = [_Growing(seed) for seed in seeds]
        texts: list[Text] = []
        try:
            self._extend(found, logits.float().expand(len(found), -1))
            alive = [branch for branch in found if not branch.ended]
            for _ in range(min(length, room) - 1):
                if not alive:
                    break
                for branch in alive:
                    if branch.text is None:
                        branch.text = Text(self._text.ids, 0)
                        branch.text.most = self._text.most
                        texts.append(branch.text)
                    branch.text.ids.append(branch.token_ids[-1])
                given = self._decoder.logits([b.text for b in alive if b.text is not None])
                self.tokens += len(alive)
                self._extend(alive, given)
                for branch in alive:
                    if branch.ended and branch.text is not None:
                        self._decoder.release(branch.text, keep=False)
                        texts.remove(branch.text)
                alive = [branch for branch in alive if not branch.ended]
        finally:
            for text in reversed(texts):
                self._decoder.release(text, keep=False)
        return [Branch(tuple(each.token_ids), tuple(each.logprobs), each.ended) for each in found]

    def _extend(self, branches: Sequence[_Growing], logits: Tensor) -> None:
        """Draw a token for each of ``branches`` from ``logits`` [B, V]."""
        draws = None
        if not self._sampling.greedy:
            draws = torch.tensor([branch.draw() for branch in branches], dtype=torch.float64)
            draws = draws.to(logits.device, non_blocking=True)
        tokens = choose(logits, self._sampling, draws)
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        known = torch.stack([tokens.to(logprobs.dtype), logprobs]).tolist()
        for branch, token, logprob in zip(branches, *known, strict=True):
            branch.ended = int(token) in self._ends
            branch.token_ids.append(int(token))
            branch.logprobs.append(logprob)


class _Growing:
    """A branch as it grows."""

    def __init__(self, seed: int) -> None:
        self.draw: Callable[[], float] = random.Random(seed % (1 << 64)).random  # noqa: S311
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text: Text | None = None
        self.ended = False
