"""Runs a GGUF in llama.cpp, through the library of the package xllamacpp.

Sums and the cache of keys and values are fp32, without flash attention: by itself llama.cpp rounds
keys and values to 16 bits, which changes logits more than most faults of an export. ``settings``
has ``file``, the name of the GGUF in the target.
"""

import contextlib
import ctypes
import http.client
import importlib.metadata
import importlib.util
import json
import os
import struct
import sys
import urllib.parse
from collections.abc import Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_void_p,
)
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from child import Runtime, main, threads

F32, F16 = 0, 1
"""Numbers of ggml's types."""

ERROR = 4
"""The level of messages of errors."""

PADDING = 256
"""llama.cpp makes the length of a context a multiple of this."""

TIMEOUT = 60
"""Seconds in which its server answers."""

Log = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
Look = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)


class Parameters(ctypes.Structure):
    """A structure of settings, which llama.cpp passes by value. Its fields change from release to
    release; that it is not longer than this is all that is known of it. What follows it is passed
    along unread."""

    _fields_ = (("words", ctypes.c_uint64 * 64),)


class Batch(ctypes.Structure):
    """llama_batch: tokens, their places and texts, and for which of them logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class Library:
    """The functions of llama.cpp that are used."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("xllamacpp")
        if found is None or not found.submodule_search_locations:
            raise ImportError("xllamacpp is not installed")
        folder = found.submodule_search_locations[0]
        (name,) = (each for each in os.listdir(folder) if each.startswith("xllamacpp."))
        self._library = ctypes.CDLL(os.path.join(folder, name))
        self.errors: list[str] = []
        take = self._take
        self.model_defaults = take("llama_model_default_params", Parameters)
        self.context_defaults = take("llama_context_default_params", Parameters)
        self.load = take("llama_model_load_from_file", c_void_p, c_char_p, Parameters)
        self.unload = take("llama_model_free", None, c_void_p)
        self.open = take("llama_init_from_model", c_void_p, c_void_p, Parameters)
        self.close = take("llama_free", None, c_void_p)
        self.decode = take("llama_decode", c_int32, c_void_p, Batch)
        self.logits = take("llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)
        self.set_threads = take("llama_set_n_threads", None, c_void_p, c_int32, c_int32)
        self.memory = take("llama_get_memory", c_void_p, c_void_p)
        self.forget = take("llama_memory_clear", None, c_void_p, c_bool)
        self.vocabulary = take("llama_model_get_vocab", c_void_p, c_void_p)
        self.vocabulary_size = take("llama_vocab_n_tokens", c_int32, c_void_p)
        self.is_end = take("llama_vocab_is_eog", c_bool, c_void_p, c_int32)
        self.template = take("llama_model_chat_template", c_char_p, c_void_p, c_char_p)
        self.name = take("ggml_get_name", c_char_p, c_void_p)
        self.count = take("ggml_nelements", ctypes.c_int64, c_void_p)
        self.nbytes = take("ggml_nbytes", c_size_t, c_void_p)
        self.read = take("ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
        tokenize = (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
        self.tokenize = take("llama_tokenize", c_int32, *tokenize)
        self._log = Log(self._keep)
        take("llama_log_set", None, Log, c_void_p)(self._log, None)

    def _take(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def _keep(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            self.errors.append(text.decode("utf-8", "replace").strip())

    def refusal(self, what: str) -> RuntimeError:
        """That llama.cpp has failed, with what it says itself."""
        reason = "; ".join(self.errors[-3:])
        return RuntimeError(f"llama.cpp {what}" + (f": {reason}" if reason else ""))


def precise(defaults: Parameters, texts: int, length: int, look: Any) -> Parameters:
    """The default settings of a context, changed to so many ``texts`` of at most ``length`` tokens,
    fp32 and without flash attention; ``look`` is shown every value that is computed.

    Fields are found by the values around them, since no release promises their places.
    """
    held = bytearray(bytes(defaults))
    if struct.unpack_from("<4I", held) != (512, 2048, 512, 1):
        raise RuntimeError("llama.cpp's settings begin in another way: its release is unknown")
    size = texts * -(-length // PADDING) * PADDING
    struct.pack_into("<4I", held, 0, size, size, size, texts)
    # How RoPE is scaled, how texts are pooled and attention masked, and flash attention: all left
    # to llama.cpp. Then RoPE's base and scale and a factor of YaRN: all left to the model.
    attention = struct.pack("<4i3f", -1, -1, -1, -1, 0.0, 0.0, -1.0)
    struct.pack_into("<i", held, _place(held, attention, 4) + 12, 0)
    # A callback and its data, the types of keys and values, a callback and its data.
    cache = struct.pack("<2Q2i2Q", 0, 0, F16, F16, 0, 0)
    place = _place(held, cache, 8)
    struct.pack_into("<Q", held, place, ctypes.cast(look, c_void_p).value)
    struct.pack_into("<2i", held, place + 16, F32, F32)
    return Parameters.from_buffer_copy(held)


def _place(held: bytearray, pattern: bytes, alignment: int) -> int:
    place = held.find(pattern)
    if place < 0 or place % alignment or held.find(pattern, place + 1) >= 0:
        raise RuntimeError("llama.cpp has settings in another order: its release is unknown")
    return place


class LlamaCpp(Runtime):
    few_ends = True

    def __init__(self, target: str, settings: dict[str, Any]) -> None:
        super().__init__()
        import numpy

        self.np = numpy
        self.versions = {"xllamacpp": importlib.metadata.version("xllamacpp")}
        self.path = os.path.join(target, settings["file"])
        self.llama = Library()
        self.model = self.llama.load(os.fsencode(self.path), self.llama.model_defaults())
        if not self.model:
            raise self.llama.refusal("does not load the model")
        self.vocabulary = self.llama.vocabulary(self.model)
        self.size: int = self.llama.vocabulary_size(self.vocabulary)
        self.context: Any = None
        self.wanted, self.seen = False, dict[int, Any]()
        self.fault: Exception | None = None
        self.look = Look(self._look)
        self.server: Any = None

    def close(self) -> None:
        self._close()
        self.server = None
        self.llama.unload(self.model)

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, Sequence[Any] | None]:
        self._open(1, len(ids))
        self.seen, self.wanted = {}, stream
        # Of the last block, llama.cpp computes only those places whose logits are wanted.
        logits = self._decode([ids], [0], every=stream)
        self.wanted = False
        if self.fault is not None:
            raise self.fault
        return logits, [self.seen[n].reshape(len(ids), -1) for n in sorted(self.seen)] or None

    def greedy_together(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        self._open(len(prompts), max(map(len, prompts)) + count)
        found: list[list[int]] = [[] for _ in prompts]
        new, at = prompts, [0] * len(prompts)
        for _ in range(count):
            best = self._decode(new, at).argmax(-1).tolist()
            at = [place + len(text) for place, text in zip(at, new, strict=True)]
            new = [[token] for token in best]
            for text, token in zip(found, best, strict=True):
                text.append(token)
        return found

    def encode(self, text: str) -> list[int]:
        return self._ids(text, True)

    def encode_conversation(self, messages: list[dict[str, str]]) -> list[int] | None:
        if self.llama.template(self.model, None) is None:
            return None
        return self._ids(self._rendered(messages), True)

    def ends(self) -> list[int]:
        return [each for each in range(self.size) if self.llama.is_end(self.vocabulary, each)]

    def _open(self, texts: int, length: int) -> None:
        """Have an empty context for texts of at most ``length`` tokens."""
        self._close()
        parameters = precise(self.llama.context_defaults(), texts, length, self.look)
        self.context = self.llama.open(self.model, parameters)
        if not self.context:
            raise self.llama.refusal("does not open a context")
        self.llama.set_threads(self.context, threads(), threads())

    def _close(self) -> None:
        if self.context:
            self.llama.close(self.context)
            self.context = None

    def _decode(self, texts: list[list[int]], at: list[int], every: bool = False) -> Any:
        """The logits after the last token of each text, whose tokens begin at the places ``at``; of
        one text, after ``every`` token."""
        ids = [token for text in texts for token in text]
        count = len(ids)
        places = [at[n] + place for n, text in enumerate(texts) for place in range(len(text))]
        marks = [every or place == len(text) - 1 for text in texts for place in range(len(text))]
        names = [POINTER(c_int32)(c_int32(number)) for number in range(len(texts))]
        batch = Batch(
            count,
            (c_int32 * count)(*ids),
            None,
            (c_int32 * count)(*places),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*(names[n] for n, text in enumerate(texts) for _ in text)),
            (c_int8 * count)(*marks),
        )
        if code := self.llama.decode(self.context, batch):
            raise self.llama.refusal(f"does not compute (code {code})")
        rows = [self.llama.logits(self.context, place) for place in range(count) if marks[place]]
        return self.np.stack([self.np.ctypeslib.as_array(row, (self.size,)).copy() for row in rows])

    def _look(self, tensor: Any, ask: bool, _: Any) -> bool:
        """Keep the stream after each block, which llama.cpp calls ``l_out-N``."""
        if not self.wanted:  # asked of every value of every token
            return not ask
        try:
            name, _, block = self.llama.name(tensor).decode().partition("-")
            if name != "l_out":
                return not ask
            if not ask:
                values = self.np.empty(self.llama.count(tensor), self.np.float32)
                if self.llama.nbytes(tensor) != values.nbytes:
                    raise RuntimeError("llama.cpp does not compute in fp32")
                self.llama.read(tensor, values.ctypes.data, 0, values.nbytes)
                self.seen[int(block)] = values
        except Exception as error:  # which ctypes would only print
            self.fault = error
        return True

    def _ids(self, text: str, around: bool) -> list[int]:
        held = text.encode("utf-8")
        size = len(held) + 8
        found = (c_int32 * size)()
        count = self.llama.tokenize(self.vocabulary, held, len(held), found, size, around, True)
        return list(found[:count])

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """What the file's template makes of a conversation: llama.cpp has an engine of its own for
        templates, in its server, which listens on loopback."""
        if self.server is None:
            import xllamacpp

            parameters = xllamacpp.CommonParams()
            parameters.model.path = self.path
            parameters.n_parallel = 1
            parameters.warmup = parameters.fit_params = False
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads()
            self.server = xllamacpp.Server(parameters)
            # A server that is closed before its loop of tasks has begun waits for ever. An answer
            # to a task shows that it has.
            self._asked("/completion", {"prompt": [0], "n_predict": 1})
        return str(self._asked("/apply-template", {"messages": messages})["prompt"])

    def _asked(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers. Raises RuntimeError where it refuses."""
        address = urllib.parse.urlsplit(self.server.listening_address)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            answer = json.load(response)
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"llama.cpp's server refuses {path}: {answer}")
        return answer


if __name__ == "__main__":
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger would be asked what happened
    main(LlamaCpp)
