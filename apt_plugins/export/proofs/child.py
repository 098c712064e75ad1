"""Answers what a certificate asks of an export: the part that is the same for every runtime.

A script beside this file defines how a runtime is opened, and calls :func:`main` with that. It is
run as ``python -I SCRIPT REQUEST.json …`` and imports nothing of APT; ``OMP_NUM_THREADS`` says with
how many threads to compute, to libraries that do not read it by :func:`threads`. A request has

- ``target``: the folder of the export; ``settings``: those of the exporter's proof;
- ``prompts``: lists of token ids; ``whole``: the numbers of those whose logits are wanted at all
  places and whose stream is wanted after each block (of the others the last place);
- ``new_tokens``: for each prompt, how many tokens to generate greedily, the end of texts included;
- ``texts``, and ``conversations`` (lists of messages with ``role`` and ``content``), to encode;
- ``output``: a folder, into which ``outputs.npz`` goes (``logits.N`` [T, V], ``stream.N.B`` [T, D]
  after block B), and then ``answers.json``: ``versions``, ``tokens`` (lists of ids), ``text_ids``,
  ``conversation_ids``, ``ends`` (the ids that end a text) and ``few_ends``; null stands for what
  the runtime has not. ``also`` has the ``tokens`` of each other way to run the export, by its name;
  its arrays have ``NAME:`` before theirs.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

FORBIDDEN = ("apt_core", "apt_plugins")


class Runtime:
    """An export opened in a runtime. A subclass overrides what the runtime has."""

    few_ends = False
    """Whether it can be told of one end of a text and one of a turn alone, and knows others by
    their names."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        """The packages that compute, with their versions."""
        self.also: dict[str, Runtime] = {}
        """Other ways to run the same export, by name: each computes and generates, too."""

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, Sequence[Any] | None]:
        """The logits float32 [T, V] of token ids, and with ``stream`` the stream [T, D] after each
        block, where the runtime shows it (else None). Without ``stream`` the logits of the last
        place are enough."""
        raise NotImplementedError

    def greedy(self, ids: list[int], count: int) -> Sequence[int]:
        """The ``count`` most likely tokens after ids, one after the other."""
        raise NotImplementedError

    def greedy_together(self, prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        """:meth:`greedy` of several prompts, of any lengths; a runtime that is faster on many at
        once overrides it, and lets :func:`padded` make them one length if it needs that."""
        return [self.greedy(ids, count) for ids in prompts]

    def encode(self, text: str) -> list[int] | None:
        """The ids of a prompt, as the runtime encodes it without being told anything else."""
        return None

    def encode_all(self, texts: list[str]) -> list[list[int] | None]:
        """:meth:`encode` of each text, of which there may be as many as token ids; a runtime that
        is faster on many at once overrides it."""
        return [self.encode(text) for text in texts]

    def encode_conversation(self, messages: list[dict[str, str]]) -> list[int] | None:
        """The ids after which the assistant is to answer, as the runtime's template has them."""
        return None

    def ends(self) -> list[int] | None:
        """The ids at which the runtime ends a text by itself."""
        return None

    def close(self) -> None:
        """Let go of what the runtime holds."""


def threads() -> int:
    """The number of threads to compute with."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else len(os.sched_getaffinity(0))


def padded(texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Texts of one length, by zeros before them, and which of their ids are no padding (1)."""
    longest = max(map(len, texts))
    rows = [[0] * (longest - len(text)) + text for text in texts]
    return rows, [[0] * (longest - len(text)) + [1] * len(text) for text in texts]


class _Forbid:
    """Refuses imports of APT: what is proven must not need it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not to be imported here")


def main(open_runtime: Callable[[str, dict[str, Any]], Runtime]) -> None:
    """Answer the requests of the command line; ``open_runtime(target, settings)`` gives the
    :class:`Runtime` of an export."""
    sys.meta_path.insert(0, _Forbid())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            request = json.load(file)

        def tell(what: str, target: str = request["target"]) -> None:
            try:
                print(json.dumps([target, what]), file=answers, flush=True)
            except BrokenPipeError:  # whoever asked is gone
                os._exit(1)

        tell("opening")
        _answer(open_runtime(request["target"], request["settings"]), request, tell)
    sys.stdout.flush()


def _answer(runtime: Runtime, request: dict[str, Any], tell: Callable[[str], None]) -> None:
    import numpy as np

    arrays: dict[str, Any] = {}
    tokens = _computed(runtime, request, tell, arrays)
    also = {
        name: _computed(each, request, tell, arrays, f"{name}:")
        for name, each in runtime.also.items()
    }
    tell("tokenizer")
    encoded = said = None
    if type(runtime).encode is not Runtime.encode:
        encoded = runtime.encode_all(request["texts"])
    if type(runtime).encode_conversation is not Runtime.encode_conversation:
        said = [runtime.encode_conversation(each) for each in request["conversations"]]
    np.savez(os.path.join(request["output"], "outputs.npz"), **arrays)
    found = {
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__, **runtime.versions},
        "tokens": tokens,
        "also": also,
        "text_ids": encoded,
        "conversation_ids": said,
        "ends": runtime.ends(),
        "few_ends": runtime.few_ends,
    }
    runtime.close()
    with open(os.path.join(request["output"], "answers.json"), "w", encoding="utf-8") as file:
        json.dump(found, file)


def _computed(
    runtime: Runtime,
    request: dict[str, Any],
    tell: Callable[[str], None],
    arrays: dict[str, Any],
    way: str = "",
) -> list[list[int]]:
    """The tokens after each prompt. Logits and streams go into ``arrays``; ``way`` begins their
    names."""
    import numpy as np

    prompts, whole = request["prompts"], set(request["whole"])
    for number, ids in enumerate(prompts):
        tell(f"{way} prompt {number + 1} of {len(prompts)}".strip())
        logits, stream = runtime.forward(ids, number in whole)
        logits = np.asarray(logits, dtype=np.float32)
        arrays[f"{way}logits.{number}"] = logits if number in whole else logits[-1:]
        for block, values in enumerate(stream or ()):
            arrays[f"{way}stream.{number}.{block}"] = np.asarray(values, dtype=np.float32)
    tokens: list[list[int]] = [[] for _ in prompts]
    groups: dict[int, list[int]] = {}
    for number, count in enumerate(request["new_tokens"]):
        if count:
            groups.setdefault(count, []).append(number)
    for count, numbers in groups.items():
        tell(f"{way} {count} tokens after {len(numbers)} prompts".strip())
        texts = runtime.greedy_together([prompts[number] for number in numbers], count)
        for number, text in zip(numbers, texts, strict=True):
            tokens[number] = [int(token) for token in text]
    return tokens
