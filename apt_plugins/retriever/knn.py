"""Next tokens by the nearest places of a text (kNN-LM, Khandelwal et al. 2020).

Shapes: N places, D d_model, T tokens, V token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt_core.data.batches import Batch
from apt_core.device import autocast
from apt_core.errors import ConfigError
from apt_core.inference.decoding import dtype_for
from apt_core.log import get_logger
from apt_core.modeling import forward_batch
from apt_core.runs import Session
from apt_core.types import ModelOutput
from apt_plugins.retriever.index import Index, Told
from apt_plugins.retriever.matrix import MatrixWriter, matrix_in
from apt_plugins.retriever.settings import KnnSettings

log = get_logger("apt.retriever")

KEYS = "keys.npy"


class Datastore:
    """The ``keys`` [N, D], the model's last hidden state at each place of a text, and ``values``
    [N], the token that comes next there."""

    def __init__(self, folder: Path) -> None:
        self.keys = matrix_in(folder / KEYS)
        self.values = torch.from_numpy(np.load(folder / "values.npy", allow_pickle=False))
        self._squares = np.concatenate(
            [np.einsum("nd,nd->n", block, block) for block in self.keys.blocks()]
        )

    def probabilities(self, hidden: Tensor, k: int, temperature: float, size: int) -> Tensor:
        """p_kNN [V] for a hidden state [D]: the ``k`` places with the smallest mean squared
        difference d have the weights softmax(-d / temperature), each for its own token."""
        state = hidden.numpy()
        distances = (self._squares - 2 * self.keys.dot(state) + state @ state) / len(state)
        nearest, places = torch.from_numpy(distances).topk(min(k, len(distances)), largest=False)
        weights = (-nearest / temperature).softmax(-1)
        return torch.zeros(size).index_add_(0, self.values[places], weights)


def datastore_of(session: Session, index: Index, settings: KnnSettings) -> Datastore:
    """The places of the passages of ``index`` for the model of ``session``, from what is kept, or
    computed and kept."""
    name = f"knn-{_model_hash(session)}-{settings.max_tokens}"
    return index.kept(name, lambda to: _write(to, session, index, settings), Datastore)


def processor_of(
    session: Session, datastore: Datastore, settings: KnnSettings
) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor: logits [V] to log(λ·p_kNN + (1 - λ)·p) for the ``weight`` λ. It computes
    the model once more for each token, with caches of its own where the model has them."""
    hidden = LastHidden(session)

    def mixed(input_ids: Tensor, logits: Tensor) -> Tensor:
        state = hidden(input_ids).float().cpu()
        nearest = datastore.probabilities(state, settings.k, settings.temperature, len(logits))
        own = logits.float().softmax(-1)
        return (settings.weight * nearest.to(own) + (1 - settings.weight) * own).log()

    return mixed


class LastHidden:
    """The model's last hidden state [D] at the end of a text that grows."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._read: list[int] = []
        self._caches: Any = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The state after ``input_ids`` [1, T]."""
        model, ids = self._session.model, input_ids[0].tolist()
        known = len(self._read)
        if self._caches is None or not known < len(ids) or ids[:known] != self._read:
            create = getattr(model, "create_caches", None)
            longest = self._session.config.model.max_seq_len
            self._caches, known = None if create is None else create(longest), 0
        options = {} if self._caches is None else {"caches": self._caches}
        with autocast(self._session.device, dtype_for(self._session)):
            output = model(input_ids[:, known:], **options)
        self._read = ids
        found: Tensor = output.hidden[0, -1]
        return found


def _write(folder: Path, session: Session, index: Index, settings: KnnSettings) -> None:
    model, told = session.model, Told()
    texts: list[list[int]] = []
    places = 0
    for text in index.passages.texts():
        texts.append(list(session.tokenizer.encode(text)))
        places += max(0, len(texts[-1]) - 1)
        if places >= settings.max_tokens:
            break
    places = min(places, settings.max_tokens)
    if len(texts) < len(index.passages):
        log.warning("kNN: the first %d of %d passages are used", len(texts), len(index.passages))
    if not places:
        raise ConfigError("no passage has two tokens", "retriever.folder")
    values = np.zeros(places, np.int64)
    at = 0
    keys: MatrixWriter | None = None
    with ExitStack() as opened, session.computing(), autocast(session.device, dtype_for(session)):
        for seen, first, following in _windows(texts, session.config.model.max_seq_len):
            told.of("kNN: %d of %d tokens went through the model", at, places)
            count = min(len(following), places - at)
            batch = Batch.of_ids(session.tensor(seen))
            output: ModelOutput = forward_batch(model, model, batch)
            hidden = output.hidden[0, first : first + count].float().cpu().numpy()
            if not np.isfinite(hidden).all():
                raise ValueError("the model's hidden states are not finite")
            if keys is None:
                shape = places, hidden.shape[-1]
                keys = opened.enter_context(MatrixWriter(folder / KEYS, shape))
            keys.put(range(at, at + count), hidden)
            values[at : at + count] = following[:count]
            at += count
            if at == places:
                break
    np.save(folder / "values.npy", values, allow_pickle=False)


def _windows(
    texts: Sequence[Sequence[int]], context: int
) -> Iterator[tuple[Sequence[int], int, Sequence[int]]]:
    """Windows over each of ``texts``, which move on by half the ``context``: the tokens that the
    model sees, the first place that no window before had, and what follows that place and those
    after it."""
    for ids in texts:
        start = done = 0
        while done < len(ids) - 1:
            seen = ids[start : start + context]
            end = min(start + len(seen), len(ids) - 1)
            yield seen, done - start, ids[done + 1 : end + 1]
            done, start = end, start + max(1, context // 2)


def _model_hash(session: Session) -> str:
    """A hash of the model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(session.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
