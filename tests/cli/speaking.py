"""A run whose model says what it is shown, for tests of the commands that talk with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apt_core.testing import tiny_run

PARROT = """
from apt_core import hookimpl


class Planned:
    def __init__(self, tokenizer, text):
        self.ids, self.end = iter(tokenizer.encode(text)), tokenizer.special.eos

    def choose(self, input_ids, logits):
        return next(self.ids, self.end)


def answer(request):
    prompt = request.prompt
    last = prompt if isinstance(prompt, str) else prompt[-1].content
    if last.endswith("count"):
        return "".join(f"{number} " for number in range(100_000))
    if last.endswith("be silent"):
        return ""
    if last.endswith("fail"):
        raise ValueError("the parrot fails")
    seen = prompt if isinstance(prompt, str) else "|".join(map(shown, prompt))
    return f"[{request.seed}] {seen}"


def shown(message):
    # Of its own answers the beginning: they would grow without end.
    text = message.content[:3] if message.role == "assistant" else message.content
    return f"{message.role[0]}:{text}"


@hookimpl
def apt_decoder(request, session):
    return Planned(session.tokenizer, answer(request))
"""
"""Its model answers with the seed and everything that it sees; it counts without end when it is
told to count."""

KEYS = {
    "model.max_seq_len": 512,
    "data.max_length": 32,
    "evaluation.sample_tokens": 0,
    "evaluation.eval_freq": 0,
}


def speaking_run(folder: Path, *, conversations: bool = True) -> Path:
    """A run with the parrot in ``folder``, trained on conversations or on a text."""
    (folder / "parrot.py").write_text(PARROT, encoding="utf-8")
    keys: dict[str, Any] = {}
    if conversations:
        with (folder / "talk.jsonl").open("w", encoding="utf-8") as file:
            for n in range(40):
                ask, answer = (f"{n} and {n + 1}", f"{n + n + 1}, of course")
                turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
        keys = {"data.loader": "jsonl", "data.train_path": str(folder / "talk.jsonl")}
    tiny_run(str(folder / "parrot.py"), steps=2, overrides={**KEYS, **keys}, output=folder / "run")
    return folder / "run"
