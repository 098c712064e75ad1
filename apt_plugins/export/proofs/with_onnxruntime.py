"""Runs an ONNX export in ONNX Runtime on the CPU, by both of its graphs; without torch.

Legend: B batch, T new tokens, V token ids, D d_model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from child import Runtime, main, padded, threads


class Graph(Runtime):
    """One of the graphs of an export. It is opened when it is first asked: each holds its weights
    in a form of its own."""

    def __init__(self, target: str, name: str) -> None:
        super().__init__()
        self._target, self._name = target, name
        self._opened_file: Any = None
        self._showing: tuple[Any, list[str]] | None = None

    @property
    def _session(self) -> Any:
        if self._opened_file is None:
            self._opened_file = self._opened(os.path.join(self._target, self._name))
        return self._opened_file

    def close(self) -> None:
        self._opened_file = self._showing = None

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, Sequence[Any] | None]:
        # As the file on disk computes them, and then as it does with the streams as outputs, too.
        if not stream:
            return self._last(ids), None
        [logits] = self._outputs(self._session, ids, ["logits"])
        if self._showing is None:
            self._showing = self._showing_blocks()
        session, names = self._showing
        return logits, self._outputs(session, ids, names)

    def _last(self, ids: list[int]) -> Any:
        """The logits [1, V] of the last place of a text."""
        return self._outputs(self._session, ids, ["logits"])[0][-1:]

    def _outputs(self, session: Any, ids: list[int], names: list[str]) -> list[Any]:
        """These outputs [T, …] of a text."""
        import numpy as np

        text = _Texts(session)
        found = [text.append([part], names) for part in self._parts(ids)]
        return [np.concatenate([each[0] for each in parts]) for parts in zip(*found, strict=True)]

    def _parts(self, ids: list[int]) -> list[list[int]]:
        """A text in as many parts as it is to be read in."""
        return [ids]

    def _opened(self, source: str | bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads()
        # Threads that wait for each other would keep the CPU from those that they wait for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # What a long text takes is given back after it, and not doubled in advance.
        options.enable_cpu_mem_arena = False
        if isinstance(source, bytes):
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, self._target)
        return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])

    def _showing_blocks(self) -> tuple[Any, list[str]]:
        """The graph with the stream after each block [B, T, D] among its outputs, and the names of
        these. The files stay as they are."""
        import onnx

        model = onnx.load(os.path.join(self._target, self._name), load_external_data=False)
        made = {output for node in model.graph.node for output in node.output}
        names: list[str] = []
        while (name := f"blocks.{len(names)}.output") in made:
            names.append(name)
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            model.graph.output.append(value)
        return self._opened(model.SerializeToString()), names


class WithoutCaches(Graph):
    """The graph that reads whole texts. ``guess`` generates, too."""

    def __init__(self, target: str, name: str, guess: WithCaches) -> None:
        super().__init__(target, name)
        self._guess = guess

    def forward(self, ids: list[int], stream: bool) -> tuple[Any, Sequence[Any] | None]:
        self._guess.close()  # it has given all its answers
        return super().forward(ids, stream)

    def greedy_together(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        self._showing = None  # its memory
        # One forward of texts that are guessed gives the most likely token after each place: those
        # up to the first that was guessed wrongly are what follows.
        guesses = self._guess.greedy_together(prompts, count)
        return [self._after(prompt, guess) for prompt, guess in zip(prompts, guesses, strict=True)]

    def _after(self, prompt: list[int], guess: list[int]) -> list[int]:
        """The most likely tokens after a prompt, as many as were guessed."""
        found = list[int]()
        while len(found) < len(guess):
            text = [*prompt, *found, *guess[len(found) : -1]]
            likeliest = self._session.run(["logits"], _inputs([text]))[0].argmax(-1)[0].tolist()
            for token in likeliest[len(prompt) + len(found) - 1 :]:
                found.append(token)
                if token != guess[len(found) - 1]:
                    break
        return found


class WithCaches(Graph):
    """The graph that goes on from caches."""

    def __init__(self, target: str, name: str) -> None:
        super().__init__(target, name)
        self._generated: list[tuple[list[list[int]], int, list[list[int]]]] = []

    def _parts(self, ids: list[int]) -> list[list[int]]:
        # So that the second one reads what the first has left in the caches.
        cut = len(ids) // 2
        return [part for part in (ids[:cut], ids[cut:]) if part]

    def _last(self, ids: list[int]) -> Any:
        text = _Texts(self._session)
        text.read([ids[:-1]])
        return text.append([ids[-1:]], ["logits"])[0][0]

    def greedy_together(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        for asked, many, answered in self._generated:
            if asked == prompts and many == count:
                return answered
        self._showing = None
        rows, mask = padded(prompts)
        text, found = _Texts(self._session, mask), [list[int]() for _ in prompts]
        text.read([row[:-1] for row in rows])
        new = [row[-1:] for row in rows]
        for _ in range(count):
            [logits] = text.append(new, ["logits"])
            new = logits[:, -1:].argmax(-1).tolist()
            for tokens, token in zip(found, new, strict=True):
                tokens += token
        self._generated.append((prompts, count, found))
        return found


class OnnxRuntime(WithCaches):
    """An export: its graph with caches, the other one, and its tokenizer."""

    def __init__(self, target: str, settings: dict[str, Any]) -> None:
        super().__init__(target, settings["with_caches"])
        import onnx
        import onnxruntime
        import tokenizers

        packages = (onnxruntime, onnx, tokenizers)
        self.versions = {each.__name__: each.__version__ for each in packages}
        other = settings["without_caches"]
        self.also = {other: WithoutCaches(target, other, self)}
        self._tokenizer = tokenizers.Tokenizer.from_file(os.path.join(target, "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def encode_all(self, texts: list[str]) -> list[list[int] | None]:
        return [list(each.ids) for each in self._tokenizer.encode_batch(texts)]

    def encode_conversation(self, messages: list[dict[str, str]]) -> list[int] | None:
        path = os.path.join(self._target, "chat_template.jinja")
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8") as file:
            template = _environment().from_string(file.read())
        tokens = {
            name: value
            for name, value in self._json("tokenizer_config.json").items()
            if name.endswith("_token") and isinstance(value, str)
        }
        text = template.render(messages=messages, add_generation_prompt=True, **tokens)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def ends(self) -> list[int]:
        ends = self._json("generation_config.json").get("eos_token_id")
        return [] if ends is None else sorted([ends] if isinstance(ends, int) else ends)

    def _json(self, name: str) -> dict[str, Any]:
        with open(os.path.join(self._target, name), encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
        return found


class _Texts:
    """Texts that grow, with their caches; their first ids may be padding, by ``mask``."""

    def __init__(self, session: Any, mask: Sequence[Sequence[int]] = ((),)) -> None:
        import numpy as np
        from onnxruntime import OrtValue

        number = len(mask)
        self._session, self._length = session, 0
        self._mask = np.array(mask, dtype=np.int64)
        # Values of the runtime, which are handed back to it without a copy.
        self._past = {
            each.name: OrtValue.ortvalue_from_numpy(
                np.zeros((number, each.shape[1], 0, each.shape[3]), np.float32)
            )
            for each in session.get_inputs()
            if each.name.startswith("past_key_values.")
        }

    def read(self, ids: list[list[int]]) -> None:
        """Put these ids into the caches, without logits."""
        if self._past and ids[0]:
            self.append(ids, [])

    def append(self, ids: list[list[int]], names: list[str]) -> list[Any]:
        """The outputs ``names`` for these ids after those before."""
        from onnxruntime import OrtValue, RunOptions

        self._length += len(ids[0])
        kept = [name.replace("past_key_values", "present") for name in self._past]
        inputs = _inputs(ids, self._length)
        known = min(self._length, self._mask.shape[1])
        inputs["attention_mask"][:, :known] = self._mask[:, :known]
        values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        options = RunOptions()
        options.only_execute_path_to_fetches = True
        found = self._session.run_with_ort_values(
            [*names, *kept], {**values, **self._past}, options
        )
        self._past = dict(zip(self._past, found[len(names) :], strict=True))
        return [each.numpy() for each in found[: len(names)]]


def _inputs(ids: list[list[int]], length: int | None = None) -> dict[str, Any]:
    """The inputs for the last ids of texts of ``length`` tokens, by default of all of them."""
    import numpy as np

    rows = np.array(ids, dtype=np.int64)
    mask = np.ones((len(rows), length or rows.shape[1]), dtype=np.int64)
    return {"input_ids": rows, "attention_mask": mask}


def _environment() -> Any:
    """Jinja as chat templates expect it."""
    from jinja2 import ext, sandbox

    class Generation(ext.Extension):
        """Marks what the assistant says, in training alone."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    found = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    found.globals["raise_exception"] = refuse
    found.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return found


if __name__ == "__main__":
    main(OnnxRuntime)
