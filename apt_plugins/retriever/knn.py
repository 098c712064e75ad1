"""Next tokens by the nearest places of a text (kNN-LM, Khandelwal et al. 2020).

Shapes: N places, D d_model, T tokens, V token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
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
from apt_plugins.retriever.parts import made
from apt_plugins.retriever.settings import KnnSettings

log = get_logger("apt.retriever")


class Datastore:
    """The ``keys`` [N, D], the model's last hidden state at each place of a text, and ``values``
    [N], the token that comes next there."""

    def __init__(self, folder: Path) -> None:
        keys = np.load(folder / "keys.npy", mmap_mode="c", allow_pickle=False)
        values = np.load(folder / "values.npy", allow_pickle=False)
        self.keys, self.values = torch.from_numpy(keys), torch.from_numpy(values)
        self._squares = torch.cat([part.square().sum(-1) for part in self.keys.split(1 << 14)])

    def probabilities(self, hidden: Tensor, k: int, temperature: float, size: int) -> Tensor:
        """p_kNN [V] for a hidden state [D]: the ``k`` places with the smallest mean squared
        difference d have the weights softmax(-d / temperature), each for its own token."""
        distances = (self._squares - 2 * (self.keys @ hidden) + hidden.square().sum()) / len(hidden)
        nearest, places = distances.topk(min(k, len(distances)), largest=False)
        weights = (-nearest / temperature).softmax(-1)
        return torch.zeros(size).index_add_(0, self.values[places], weights)


def datastore_of(session: Session, index: Index, settings: KnnSettings) -> Datastore:
    """The places of the passages of ``index`` for the model of ``session``, from what is kept, or
    computed and kept."""
    name = f"knn-{_model_hash(session)}-{settings.max_tokens}"
    return Datastore(made(index.path / name, lambda to: _write(to, session, index, settings)))


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
    keys: Any = None
    at = 0
    with session.computing(), autocast(session.device, dtype_for(session)):
        for seen, first, following in _windows(texts, session.config.model.max_seq_len):
            told.of("kNN: %d of %d tokens went through the model", at, places)
            count = min(len(following), places - at)
            batch = Batch.of_ids(session.tensor(seen))
            output: ModelOutput = forward_batch(model, model, batch)
            hidden = output.hidden[0, first : first + count]
            if keys is None:
                shape = places, hidden.shape[-1]
                keys = np.lib.format.open_memmap(folder / "keys.npy", "w+", np.float32, shape)
            keys[at : at + count] = hidden.float().cpu().numpy()
            values[at : at + count] = following[:count]
            at += count
            if at == places:
                break
    if not np.isfinite(keys).all():
        raise ValueError("the model's hidden states are not finite")
    keys.flush()
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
