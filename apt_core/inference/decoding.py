"""Computes the logits after growing texts, with caches where the model has them.

Shapes: B rows, S tokens of a window, V token ids that texts may have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.device import autocast
from apt_core.error_text import one_line
from apt_core.inference.slots import Slots
from apt_core.inference.texts import Text, window_start
from apt_core.log import get_logger
from apt_core.modeling.casts import KeptCasts
from apt_core.modeling.compiled_rows import CompiledToken, Compiler
from apt_core.modeling.row_decoding import CALLED, Int8Products, Products, likeliest
from apt_core.parallel.world import local_part
from apt_core.runs.session import Session

log = get_logger("apt.inference")

SAMPLED = 16
"""About how many elements of a weight are looked at to notice that it has changed."""


def dtype_for(session: Session) -> torch.dtype | None:
    """The autocast dtype of a generation: the run's, or on a CPU always None (fp32)."""
    return None if session.device.type == "cpu" else session.dtype


class Decoder:
    """The logits after each of several texts, which grow one token at a time.

    A model whose layers all take part in decoding rows computes the texts together
    (:class:`~apt_core.inference.slots.Slots`). Any other computes one text after the other, with
    the caches that it makes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        max_seq_len: int,
        vocab_size: int,
        dtype: torch.dtype | None = None,
        int8: bool = False,
        compiled: bool = False,
        exact: bool = False,
    ) -> None:
        """``vocab_size`` is the number V of ids that texts may have, of whatever the model has
        logits for. ``dtype`` is the type in which the model is computed by autocast, None for none.
        ``exact``: weights that are kept as integers are computed with as forwards do."""
        self._compiler = Compiler() if compiled else None
        self._exact = exact
        self._rounds = False
        self._model, self._device, self._max_seq_len = model, device, max_seq_len
        self._vocab_size = vocab_size
        self._dtype, self._casts, self._int8 = dtype, KeptCasts(model), int8
        self._readers: dict[Text, _Reader] = {}
        self._slots: Slots | None = None
        self._made_of: Any = None
        self._told = False

    def __len__(self) -> int:
        """How many texts are worked on."""
        return len(self._readers) + (0 if self._slots is None else len(self._slots))

    def refresh(self) -> None:
        """Look, where no text is worked on, whether the model is still the one that weights were
        folded of and caches computed with. To be called before the first text."""
        if len(self):
            return
        made_of = _state_of(self._model)
        if self._made_of == made_of:
            return
        self._made_of, self._slots = made_of, None
        computed = None
        # A model that makes no caches is not to be computed with any.
        if hasattr(self._model, "rows") and self._has_caches():
            kind = Int8Products if self._int8 else Products
            compiled = self._compiler is not None
            products = kind(self._dtype, exact=self._exact, compiled=compiled)
            computed = self._model.rows(products)
            if isinstance(products, Int8Products):
                log.info("int8 weights in %d of %d products", products.used, products.number)
            self._rounds = products.rounded > 0
        token = None
        if self._compiler is not None:
            token = self._compiled(computed, self._compiler)
        if computed is not None:
            self._slots = Slots(
                self._model,
                computed,
                device=self._device,
                max_seq_len=self._max_seq_len,
                compiled=token,
            )

    def _compiled(self, rows: Any, compiler: Compiler) -> CompiledToken | None:
        """What one token is computed by, compiled; or None, and why is said."""
        if self._device.type != "cpu" or self._dtype is not None:
            reason = "only decoding in fp32 on a CPU is compiled"
        elif not hasattr(rows, "compiled"):
            reason = f"{type(self._model).__name__} has nothing to compile"
        else:
            compiler.forget_weights()
            try:
                token: CompiledToken | None = rows.compiled(compiler, self._vocab_size)
                if token is not None:
                    log.info("decoding of a token is compiled in %d blocks", token.number)
                    return token
                reason = "none of its layers has parts that can be compiled"
            except Exception as error:  # what the model raises, it raises again uncompiled
                reason = one_line(error)
        log.warning("decoding is not compiled: %s", reason)
        return None

    def kept_casts(self) -> AbstractContextManager[object]:
        """A context in which torch keeps the casts of weights from one autocast context to the
        next. Computations outside of autocast are not affected."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, enabled=False)

    def window(self, text: Text) -> Tensor:
        """What the model sees of ``text``, int64 [1, S]."""
        return self.tensor(text.ids[window_start(len(text.ids), self._max_seq_len) :])

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """int64 [1, T] on the device."""
        return torch.tensor([ids], dtype=torch.int64).to(self._device, non_blocking=True)

    def logits(self, texts: Sequence[Text]) -> Tensor:
        """The fp32 logits [B, V] after each of ``texts``."""
        if self._slots is not None:
            found = self._slots.compiled(texts)
            if found is not None:
                return found[0]
            with self._rows_computing():
                return self._logits_of_slots(texts)
        rows = []
        for text in texts:
            reader = self._readers.get(text)
            if reader is None:
                reader = self._readers[text] = self._reader(text)
            rows.append(reader.read())
        return torch.stack(rows)[:, : self._vocab_size]

    def likeliest(self, texts: Sequence[Text]) -> Tensor:
        """What :func:`~apt_core.modeling.row_decoding.likeliest` gives of the logits [B, V] after
        each of ``texts``."""
        if self._slots is None:
            return likeliest(self.logits(texts))
        found = self._slots.compiled(texts)
        if found is not None:
            return found[1]
        with self._rows_computing():
            return likeliest(self._logits_of_slots(texts))

    def _logits_of_slots(self, texts: Sequence[Text]) -> Tensor:
        assert self._slots is not None
        return self._slots.logits(texts)[:, : self._vocab_size].float()

    def room(self, text: Text) -> int:
        """How many guesses after ``text`` :meth:`verified` takes: none where x is rounded for
        products, since several tokens at once then differ from one by more than the last bits."""
        return 0 if self._slots is None or self._rounds else self._slots.room(text)

    def verified(self, texts: Sequence[Text], guesses: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each of ``texts``, which are all, the fp32 logits [1 + k, V] after it and after each
        of its k tokens of ``guesses``; then :meth:`truncate` it."""
        assert self._slots is not None
        with self._rows_computing():
            verified = self._slots.verified(texts, guesses)
            return [logits[:, : self._vocab_size].float() for logits in verified]

    def truncate(self, text: Text) -> None:
        """Forget guesses that were not appended to ``text``."""
        assert self._slots is not None
        self._slots.truncate(text)

    def release(self, text: Text, *, spoiled: bool = False, keep: bool = True) -> None:
        """Free the caches of ``text``, which are ``spoiled`` if its logits were not finite; with
        ``keep``, a later text that begins with it may use them."""
        if self._slots is not None:
            with self._rows_computing():
                self._slots.release(text, spoiled=spoiled, keep=keep)
        self._readers.pop(text, None)

    @contextmanager
    def _in_dtype(self) -> Iterator[None]:
        with self._casts.used(self._dtype), autocast(self._device, self._dtype):
            yield

    def _computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._dtype is None else self._in_dtype()

    def _rows_computing(self) -> AbstractContextManager[object]:
        """A step of rows is mostly small tensors: on a CPU inference mode saves a fifth of its
        time."""
        if self._device.type == "cpu" and self._dtype is None:
            return torch.inference_mode()
        return self._computing()

    def _reader(self, text: Text) -> _Reader:
        """A reader of a new text: a fork of one that has read its beginning and no more."""
        for known, reader in self._readers.items():
            if known.most >= text.most and text.ids[: len(known.ids)] == known.ids:
                fork = reader.fork(text)
                if fork is not None:
                    return fork
        return _Reader(self, text)

    def _has_caches(self) -> bool:
        create = getattr(self._model, "create_caches", None)
        return create is not None and create(1) is not None

    def new_caches(self, text: Text) -> Any:
        """Caches with room for what will be seen of ``text``; None if the model has none."""
        create = getattr(self._model, "create_caches", None)
        caches = None if create is None else create(min(self._max_seq_len, text.most))
        if caches is None and not self._told:
            self._told = True
            log.info("generation computes the whole text anew for every token: no cache")
        return caches

    def compute(self, input_ids: Tensor, **options: Any) -> Tensor:
        """The fp32 logits [V] after ``input_ids`` [1, T]."""
        with self._computing():
            logits: Tensor = self._model(input_ids, **options).logits
        return logits[0, -1].float()


class _Reader:
    """One text. With caches each token is computed once until the window moves; without them the
    whole window is computed for every token."""

    def __init__(self, decoder: Decoder, text: Text) -> None:
        self._decoder, self._text = decoder, text
        self._start = self._read = window_start(len(text.ids), decoder._max_seq_len)
        self._caches = decoder.new_caches(text)
        self._last: Tensor | None = None

    def fork(self, text: Text) -> _Reader | None:
        """A reader of ``text``, which begins with all that this one has read; None if a cache
        cannot be forked."""
        if self._caches is None or self._last is None or self._read != len(self._text.ids):
            return None
        if not all(hasattr(cache, "fork") for cache in self._caches):
            return None
        other = object.__new__(_Reader)
        other.__dict__.update(self.__dict__)
        other._text, other._caches = text, [cache.fork() for cache in self._caches]
        return other

    def read(self) -> Tensor:
        """The fp32 logits [V] after the text."""
        text, decoder = self._text, self._decoder
        length = len(text.ids)
        if self._read == length and self._last is not None:
            return self._last
        start = window_start(length, decoder._max_seq_len)
        if start != self._start:
            self._start = self._read = start
            self._caches = None if self._caches is None else decoder.new_caches(text)
        if self._caches is not None:
            fed = decoder.tensor(text.ids[self._read :])
            logits = decoder.compute(fed, caches=self._caches)
            if all(cache.length == length - start for cache in self._caches):
                self._read, self._last = length, logits
                return logits
            log.warning("a cache does not hold what its layer read: computing everything anew")
            self._caches = None
        return decoder.compute(decoder.window(text))


def _state_of(model: nn.Module) -> Any:
    """What changes if a weight of ``model`` is written to or replaced, a hook is registered, or a
    module is given another forward or other caches.

    torch does not count what its fused optimizers write, nor what is written through ``.data``:
    that shows in a few elements of each weight, unless it leaves all of these as they are.
    """
    tensors = [
        (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    with torch.no_grad():
        weights = [local_part(parameter) for parameter in model.parameters()]
        sampled = [
            weight.view(-1)[:: 1 + weight.numel() // SAMPLED].float()
            for weight in weights
            if weight.is_contiguous()
        ]
        elements = torch.cat(sampled).cpu().numpy().tobytes() if sampled else b""
    called = [id(getattr(type(model), name, None)) for name in CALLED]
    modules = [
        (
            id(module),
            id(type(module)),
            len(own["_forward_hooks"]),
            len(own["_forward_pre_hooks"]),
            *(id(own.get(name)) for name in CALLED),
        )
        for module in model.modules()
        for own in (module.__dict__,)
    ]
    return tensors, elements, called, modules
