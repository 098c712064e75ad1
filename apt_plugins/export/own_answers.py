"""What the run's model answers to the questions of a certificate.

Shapes: T tokens, V token ids, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apt_core.data.batches import Batch
from apt_core.inference import Engine
from apt_core.inference.chat import FORMATS, ChatFormat, encoded
from apt_core.modeling import forward_batch
from apt_core.modeling.blocks import block_stack
from apt_core.plugin_manager import PluginManager
from apt_core.providers import PlainModel, SpecialTokens, TokenizerProvider
from apt_core.providers.documents import Document, Message
from apt_core.runs import Session
from apt_core.types import GenerationRequest
from apt_plugins.export.computing import PlainRunner
from apt_plugins.export.tokenizers import expressed


class OwnAnswers:
    """Answers with the model of ``session``, computed in fp32 without a cache, and with its
    tokenizer, to which ``chat_format`` gives conversations; plugins that change logits or texts
    take no part."""

    generates = True

    def __init__(self, session: Session, chat_format: ChatFormat = FORMATS["template"]) -> None:
        # Products in TF32, which a run may take on a GPU, would be further off than the tolerance.
        hardware = session.config.hardware.model_copy(update={"tf32": False})
        config = session.config.model_copy(update={"hardware": hardware})
        self._session = replace(session, config=config)
        self._size = session.tokenizer.vocab_size
        self._chat_format = chat_format

    def forward(self, ids: Sequence[int], *, whole: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The logits [T, V] of ``ids``, and the stream [T, D] after each block, where the model has
        a list of them; without ``whole`` no streams, and the logits may be [1, V], of the last
        place."""
        session, streams = self._session, []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            streams.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())

        with ExitStack() as stack:
            for block in block_stack(session.model)[1] if whole else ():
                stack.callback(block.register_forward_hook(keep).remove)
            stack.enter_context(session.computing())
            text = session.tensor(ids)
            batch = Batch(text, text, text.numel())
            logits = forward_batch(session.model, session.model, batch).logits
        return logits[0, 0 if whole else -1 :, : self._size].float().cpu(), streams

    def greedy(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """The tokens that generation gives after ``prompts`` at temperature 0, as many as
        ``counts`` says, also beyond the end of a text."""
        wanted = [number for number, count in enumerate(counts) if count]
        session = replace(
            self._session,
            tokenizer=_Ids(prompts, self._size),
            manager=PluginManager(),
            dtype=None,
        )
        requests = [
            GenerationRequest(str(number), max_new_tokens=counts[number], temperature=0.0)
            for number in wanted
        ]
        engine = Engine(session, max_batch=max(1, len(requests)), lookup="never", exact=True)
        results = engine.run(requests)
        found: list[tuple[int, ...]] = [()] * len(prompts)
        for number, result in zip(wanted, results, strict=True):
            found[number] = result.token_ids
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt."""
        return self._session.tokenizer.encode_prompt(Document(text=text))

    def encode_conversation(self, messages: tuple[Message, ...]) -> list[int]:
        """The ids after which the assistant is to answer."""
        return encoded(self._session.tokenizer, self._chat_format.render(messages))

    def ends(self) -> list[int]:
        """The ids that end a text."""
        return list(expressed(self._session.tokenizer).ends)

    def main_ends(self) -> set[int]:
        """The ids of the end of a text and of the end of a turn."""
        special = self._session.tokenizer.special
        return {token for token in (special.eos, special.end) if token is not None}

    def special(self) -> set[int]:
        """The ids that stand for no text."""
        return set(self._session.tokenizer.special.names)


class RoundedAnswers(OwnAnswers):
    """Answers with ``model`` in plain form in place of the session's; it generates no texts."""

    generates = False

    def __init__(
        self, session: Session, model: PlainModel, chat_format: ChatFormat = FORMATS["template"]
    ) -> None:
        super().__init__(session, chat_format)
        self._runner = PlainRunner(model)

    def forward(self, ids: Sequence[int], *, whole: bool = True) -> tuple[Tensor, list[Tensor]]:
        return self._runner.forward(ids, whole=whole)


class _Ids(TokenizerProvider):
    """Stands in for the tokenizer: the text of a prompt is its number."""

    def __init__(self, prompts: Sequence[Sequence[int]], size: int) -> None:
        super().__init__()
        self._prompts, self._size = prompts, size

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens()

    def encode(self, text: str) -> list[int]:
        return list(self._prompts[int(text)])

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def gap(logits: Tensor, tokens: Sequence[int]) -> float:
    """How far the best of ``logits`` [V] is above the least of those of ``tokens``."""
    chosen = torch.stack([logits[token] for token in tokens])
    return float(logits.max() - chosen.min())
